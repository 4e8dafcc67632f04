"""The web page: its form, its drawing and its results without a browser; through Gradio's client; in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

gradio = pytest.importorskip("gradio")

from gradio_client import Client, handle_file  # noqa: E402

from sfumato.images import load_png, save_png  # noqa: E402
from sfumato.pipeline import Pipeline, recipe  # noqa: E402
from sfumato.server.app import create_app  # noqa: E402
from sfumato.server.desk import LOCAL, Desk, Settings  # noqa: E402
from sfumato.server.keys import Keys, Limits, User  # noqa: E402
from sfumato.server.page.form import drawing_of, flattened, form_of, job_of, with_lora, with_word  # noqa: E402
from sfumato.server.page.mounting import mount  # noqa: E402
from sfumato.server.page.watching import Sight, found, watched  # noqa: E402
from sfumato.server.queue import Entry  # noqa: E402
from sfumato.types import Hires, Job  # noqa: E402

from .served import served  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Page

ANYBODY = User(LOCAL, Limits())


@contextmanager
def serving(desk: Desk, only_local: bool = True) -> Iterator[str]:
    """The address of a server with the page, in a thread."""
    app = create_app(desk, only_local=only_local, grace=0.0)
    mount(app, desk)
    with served(app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def desk(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
        yield Desk(pipeline, Settings(folder / "data", deterministic=True))


@pytest.fixture(scope="module")
def url(desk: Desk) -> Iterator[str]:
    with serving(desk) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(f"{url}/page/", verbose=False, download_files=False)


async def seen(desk: Desk, plain: dict, user: User = ANYBODY) -> list[Sight]:
    return [sight async for sight in watched(desk, user, plain)]


def run(desk: Desk, plain: dict, user: User = ANYBODY) -> list[Sight]:
    import asyncio

    return asyncio.run(seen(desk, plain, user))


def picture(tmp_path: Path, side: int = 16) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def test_blanks_leave_a_field_open_and_a_seed_is_chosen(desk: Desk) -> None:
    form = {"prompt": "a", "negative": "", "steps": 3.0, "sampler": "its own", "width": None, "guidance": ""}
    first, second = job_of(form, desk.stores), job_of(form, desk.stores)
    assert first["seed"] != second["seed"]
    assert {**first, "seed": 0} == {"prompt": "a", "negative": "", "steps": 3, "seed": 0}
    assert job_of({**form, "seed": 7.0, "more": '{"clip_skip": 2}'}, desk.stores)["clip_skip"] == 2
    assert job_of({"hires": True, "hires_scale": 2, "hires_strength": 0.5}, desk.stores)["hires"]["scale"] == 2


def test_each_mode_becomes_its_task(desk: Desk, tmp_path: Path) -> None:
    path = str(picture(tmp_path))
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[:, :8] = (255, 90, 0, 255)
    drawn = {"background": np.full((16, 16, 4), 200, np.uint8), "layers": [layer]}
    for form, size in (
        ({"mode": "picture", "picture": path, "strength": 0.5}, (16, 16)),
        ({"mode": "inpaint", "drawn": drawn, "inpaint_strength": 1.0}, (16, 16)),
        ({"mode": "outpaint", "ground": path, "left": 8.0}, (24, 16)),
        ({"mode": "upscale", "small": path, "upscale": 2, "upscale_strength": 0.3}, (32, 32)),
    ):
        last = run(desk, job_of({"prompt": "a", "steps": 3, **form}, desk.stores))[-1]
        assert last.state == "done", (form["mode"], last.error)
        with Image.open(desk.stores.results.path(last.results[0])) as result:
            assert result.size == size, form["mode"]


def test_what_is_brushed_over_alone_is_drawn_anew(desk: Desk) -> None:
    background = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[:, :8, 3] = 255
    image, mask = drawing_of({"background": background, "layers": [layer]})
    assert np.array_equal(image, background) and mask[:, :8].min() == 255 and mask[:, 8:].max() == 0
    form = {"mode": "inpaint", "drawn": {"background": background, "layers": [layer]}, "inpaint_strength": 1.0}
    result, _ = load_png(desk.stores.results.path(run(desk, job_of({**form, "steps": 3}, desk.stores))[-1].results[0]))
    assert np.array_equal(result[:, 10:], background[:, 10:]) and not np.array_equal(result[:, :6], background[:, :6])
    assert (flattened(np.zeros((2, 2, 4), np.uint8)) == 255).all()


@pytest.mark.parametrize("form, why", [
    ({"steps": "many"}, "steps='many'"),
    ({"mode": "magic"}, "mode="), ({"mode": "picture"}, "picture: drop"), ({"mode": "inpaint"}, "picture: drop"),
    ({"mode": "inpaint", "drawn": {"background": np.zeros((4, 4, 3), np.uint8), "layers": []}}, "mask: draw"),
    ({"mode": "outpaint", "left": 0}, "new ground"), ({"more": "{"}, "more: not JSON"), ({"more": "3"}, "more: names"),
])  # fmt: skip
def test_a_form_that_cannot_be_drawn_is_refused(desk: Desk, form: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        job_of(form, desk.stores)


def test_prompts_take_tags_and_words() -> None:
    assert with_lora("a cat", "ink", 0.8) == "a cat <lora:ink:0.8>"
    assert with_lora("a <lora:ink:0.8> cat", "ink", 1) == "a <lora:ink:1> cat"
    assert with_lora("a", "", 1) == with_lora("a", None, 1) == "a"
    assert with_word("a cat", "odd") == "a cat, odd" == with_word("a cat, odd", "odd") and with_word("", "odd") == "odd"


def test_a_recipe_fills_the_form_and_draws_the_same(desk: Desk, tmp_path: Path) -> None:
    job = Job("a red apple", "rain", seed=4, count=2, steps=3, sampler="euler", clip_skip=2, hires=Hires(scale=2.0))
    result = desk.pipeline.draw(job)
    save_png(tmp_path / "second.png", result.images[1], recipe(result, 1))
    form = form_of(tmp_path / "second.png")
    assert (form["prompt"], form["negative"], form["seed"], form["count"]) == ("a red apple", "rain", 5, 1)
    assert form["hires"] and form["hires_scale"] == 2.0 and json.loads(form["more"])["clip_skip"] == 2
    plain = job_of(form, desk.stores)
    plain["hires"]["steps"] = result.job.hires.steps
    pixels, _ = load_png(desk.stores.results.path(run(desk, plain)[-1].results[0]))
    assert np.array_equal(pixels, result.images[1])


def test_a1111s_text_fills_the_form(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nNegative prompt: dogs\nSteps: 12, Sampler: Euler a, CFG scale: 6.5, Seed: 3, "
                  "Size: 24x16, Model: x")  # fmt: skip
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    form = form_of(tmp_path / "a.png")
    assert form["prompt"] == "a cat" and form["negative"] == "dogs" and form["sampler"] == "euler_a"
    assert (form["steps"], form["guidance"], form["seed"], form["width"], form["height"]) == (12, 6.5, 3, 24, 16)
    for name, content in (("b.png", b"none"), ("c.png", picture(tmp_path).read_bytes())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="recipe"):
            form_of(tmp_path / name)


def test_progress_previews_and_limits(desk: Desk) -> None:
    desk.service.preview = lambda x0: np.zeros((len(x0), 4, 4, 3), np.uint8)
    sights = run(desk, {"prompt": "a", "steps": 80, "seed": 1})
    assert sights[-1].state == "done" and len(sights[-1].results) == 1
    steps = [sight.done for sight in sights if sight.total == 80]
    assert len(set(steps)) > 2 and steps == sorted(steps)
    assert any(sight.preview is not None for sight in sights)
    with pytest.raises(ValueError, match="steps=6: 5 are allowed"):
        run(desk, {"prompt": "a", "steps": 6}, User("few", Limits(steps=5)))
    often = User("often", Limits(requests=1))
    run(desk, {"prompt": "a", "steps": 1}, often)
    with pytest.raises(ValueError, match="1 a minute"):
        run(desk, {"prompt": "a", "steps": 1}, often)


def test_results_are_ones_own_and_searched_by_words(desk: Desk) -> None:
    eve = User("eve", Limits())
    run(desk, {"prompt": "a green boat", "steps": 1, "seed": 8, "count": 2}, eve)
    run(desk, {"prompt": "a red boat", "steps": 1}, eve)
    assert [each.job["prompt"] for each in found(desk, eve)] == ["a red boat", "a green boat", "a green boat"]
    assert [each.seed for each in found(desk, eve, "Boat green")] == [8, 9]
    assert found(desk, eve, "car") == [] == found(desk, User("adam", Limits()))


HOSTS = re.compile(r"""(?:src|href|action)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)|@import|url\(["']?(?:https?:)?//""")


def test_the_page_is_whole_without_the_internet(url: str) -> None:
    answer = httpx.get(url, follow_redirects=True)
    assert answer.status_code == 200 and str(answer.url).startswith(f"{url}/page") and "Sfumato" in answer.text
    loaded = [each[1] for each in HOSTS.finditer(answer.text) if not (each[1] or "").startswith(url)]
    assert loaded == []
    config = httpx.get(f"{url}/page/config").json()
    assert config["analytics_enabled"] is False and not config.get("stylesheets")
    assert not HOSTS.search(httpx.get(f"{url}/page/theme.css").text)


def test_a_picture_through_gradios_client(client: Client, desk: Desk, url: str) -> None:
    job = client.submit(prompt="a red apple", negative="", steps=30, seed=5, api_name="/draw")
    last = job.result(timeout=60)
    told = " ".join(str(each) for each in job.outputs())
    assert "step 30 of 30" in told or re.search(r"step \d+ of 30", told)
    [entry] = [each for each in desk.queue.page(limit=20) if each.job["prompt"] == "a red apple"][:1]
    assert entry.job["seed"] == 5 and entry.user == LOCAL
    assert f"{url}/v1/results/{entry.results[0]}.png" in str(last) and "drawn in" in str(last)
    expected = desk.pipeline.draw(Job("a red apple", seed=5, steps=30)).images[0]
    assert np.array_equal(load_png(desk.stores.results.path(entry.results[0]))[0], expected)


def test_errors_are_one_line_through_gradios_client(client: Client, desk: Desk) -> None:
    told = str(client.predict(prompt="a", steps=100_000, api_name="/draw"))
    assert "steps=100000" in told and "wrong" in told and str(desk.settings.data) not in told
    assert "\n" not in re.search(r'<div class="said wrong"[^>]*>(.*?)</div>', told, re.S)[1]


def test_a_dropped_recipe_and_results_through_gradios_client(client: Client, desk: Desk, tmp_path: Path) -> None:
    result = desk.pipeline.draw(Job("a blue cup", seed=6, steps=2))
    save_png(tmp_path / "cup.png", result.images[0], recipe(result, 0))
    told = str(client.predict(handle_file(tmp_path / "cup.png"), api_name="/recipe"))
    assert "a blue cup" in told and "the recipe is in the form" in told
    run(desk, {"prompt": "only here", "steps": 1})
    assert "only here" in str(client.predict("only here", api_name="/results"))


def test_the_page_asks_for_a_key_where_there_are_keys(tiny_checkpoint: Path, tmp_path: Path) -> None:
    desk = Desk(Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[]), Settings(tmp_path / "data"))
    key = Keys(tmp_path / "data" / "keys.json").add("ann")
    with serving(desk, only_local=False) as url:
        answer = httpx.get(f"{url}/page/")
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(f"{url}/page/config").status_code == 401
        for wrong in ("no", ""):
            assert httpx.get(f"{url}/page/", auth=("ann", wrong)).status_code == 401
        assert httpx.get(f"{url}/page/", auth=("ann", key)).status_code == 200
        basic = base64.b64encode(f"ann:{key}".encode()).decode()
        client = Client(
            f"{url}/page/", headers={"Authorization": f"Basic {basic}"}, verbose=False, download_files=False
        )
        client.predict(prompt="hers", steps=1, api_name="/draw")
        assert [(each.user, each.job["prompt"]) for each in desk.queue.page()] == [("ann", "hers")]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser(url: str, desk: Desk) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/page/")
        page.locator("#prompt textarea").fill("a browser's apple")
        page.locator("#prompt textarea").press("Control+Enter")
        page.locator("#message", has_text="drawn in").wait_for(timeout=40_000)
        shown = page.locator("#pictures img").first
        shown.wait_for()
        [entry] = desk.queue.page(limit=1)
        assert entry.job["prompt"] == "a browser's apple" and entry.results[0] in shown.get_attribute("src")
        assert page.evaluate("document.querySelector('#pictures img').naturalWidth") == 16
        page.get_by_label("More fields of the job").wait_for(state="hidden")
        assert not page.get_by_label("Steps").first.is_visible(), "the first view is plain"
        page.get_by_text("Advanced", exact=True).click()
        page.get_by_label("Steps").first.wait_for(state="visible")
        page.get_by_label("Steps").first.fill("2")
        page.locator("#draw").click()
        page.locator("#pictures img").first.wait_for()
        for _ in range(200):
            [entry] = desk.queue.page(limit=1)
            if entry.state == "done" and entry.job.get("steps") == 2:
                break
            time.sleep(0.1)
        assert (entry.state, entry.job["steps"]) == ("done", 2) and "width" not in entry.job, "blanks stay open"
        strangers = [each for each in asked if not each.startswith((url, "data:", "blob:"))]
        assert strangers == []
        browser.close()


@contextmanager
def browsing(url: str) -> Iterator[Page]:
    """A page of the server in a browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{url}/page/")
        page.locator("#prompt textarea").wait_for()
        yield page
        browser.close()


def over(desk: Desk, prompt: str) -> Entry:
    """The newest job with a prompt, once it is over."""
    for _ in range(600):
        found = [entry for entry in desk.queue.page(limit=5) if entry.job["prompt"] == prompt]
        if found and found[0].state in ("done", "failed", "cancelled"):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(found)


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_mask_is_brushed_in_a_browser(url: str, desk: Desk, tmp_path: Path) -> None:
    before = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(before).save(tmp_path / "ground.png")
    with browsing(url) as page:
        page.locator("#prompt textarea").fill("brushed")
        page.get_by_role("tab", name="Inpaint").click()
        with page.expect_file_chooser() as chooser:
            page.locator("#editor").get_by_role("button", name="Upload", exact=True).click()
        chooser.value.set_files(tmp_path / "ground.png")
        canvas = page.locator("#editor canvas").first
        canvas.wait_for()
        page.wait_for_timeout(4000)  # the editor lays the picture out anew
        page.locator("#editor").get_by_role("button", name="Brush", exact=True).click()
        box = canvas.bounding_box()
        middle = box["y"] + box["height"] / 2
        for down in (-0.1, 0.0, 0.1):  # strokes across the left of the picture, which lies in the middle
            page.mouse.move(box["x"] + box["width"] * 0.42, middle + down * box["height"])
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] * 0.48, middle + down * box["height"], steps=8)
            page.mouse.up()
        page.wait_for_timeout(1000)
        page.locator("#draw").click()
        entry = over(desk, "brushed")
        assert entry.state == "done", entry.error
        page.locator("#message", has_text="drawn in").wait_for()
    mask = np.asarray(desk.stores.find(entry.job["mask"]).pixels)[..., 0]
    kept = np.asarray(desk.stores.find(entry.job["image"]).pixels)
    assert np.array_equal(kept, before), "the picture goes in as it was dropped"
    assert 0 < (mask == 255).mean() < 0.9 and set(np.unique(mask)) == {0, 255}
    after, _ = load_png(desk.stores.results.path(entry.results[0]))
    assert np.array_equal(after[mask == 0], before[mask == 0]) and not np.array_equal(after, before)


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_progress_is_live_and_a_running_job_is_cancelled_in_a_browser(
    url: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = desk.pipeline.model.unet.forward

    def slowly(*args: Any, **named: Any) -> Any:
        time.sleep(0.2)
        return forward(*args, **named)

    # Else it may be over before the button is pressed.
    monkeypatch.setattr(desk.pipeline.model.unet, "forward", slowly)
    with browsing(url) as page:
        page.locator("#prompt textarea").fill("a long one")
        page.get_by_text("Advanced", exact=True).click()
        page.get_by_label("Steps", exact=True).fill("150")
        page.get_by_label("Pictures", exact=True).first.fill("60")
        page.locator("#draw").click()
        page.wait_for_function("() => document.querySelector('#message progress')?.value > 0")
        first = page.evaluate("document.querySelector('#message progress').value")
        page.wait_for_function(f"() => document.querySelector('#message progress')?.value > {first}")
        page.locator("#cancel").click()
        page.locator("#message", has_text="cancelled").wait_for()
        entry = over(desk, "a long one")
        assert entry.state == "cancelled" and entry.done < entry.total == 9000
        assert page.locator("#draw").is_enabled()


DROP = """([name, text]) => {
  const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, {type: 'image/png'}));
  const target = document.querySelector('#recipe button') ?? document.querySelector('#recipe');
  for (const kind of ['dragenter', 'dragover', 'drop'])
    target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}));
}"""


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_dropped_picture_fills_the_form_in_a_browser(url: str, desk: Desk, tmp_path: Path) -> None:
    result = desk.pipeline.draw(Job("a dropped cup", "rain", seed=6, steps=2))
    save_png(tmp_path / "cup.png", result.images[0], recipe(result, 0))
    with browsing(url) as page:
        page.get_by_text("Recipe of a picture", exact=True).click()
        page.locator("#recipe").wait_for(state="visible")
        text = base64.b64encode((tmp_path / "cup.png").read_bytes()).decode("ascii")
        page.evaluate(DROP, ["cup.png", text])
        page.locator("#message", has_text="the recipe is in the form").wait_for()
        assert page.locator("#prompt textarea").input_value() == "a dropped cup"
        assert page.locator("#negative textarea, #negative input").first.input_value() == "rain"
        page.locator("#draw").click()
        entry = over(desk, "a dropped cup")
    assert (entry.state, entry.job["seed"], entry.job["steps"]) == ("done", 6, 2)
    assert np.array_equal(load_png(desk.stores.results.path(entry.results[0]))[0], result.images[0])
