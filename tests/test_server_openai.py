"""OpenAI's API for pictures, spoken by its unmodified client against a server on a socket."""

import base64
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sfumato.pipeline import Pipeline
from sfumato.server import openai as door
from sfumato.server.app import create_app
from sfumato.server.desk import Desk, Settings
from sfumato.server.keys import Keys
from sfumato.types import Job

from .served import served


@contextmanager
def serving(desk: Desk, only_local: bool = True) -> Iterator[str]:
    """The address of a server in a thread."""
    app = create_app(desk, routers=[door.router], only_local=only_local)
    with served(app) as port:
        yield f"http://127.0.0.1:{port}/v1"


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def desk(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    return Desk(pipeline, Settings(tmp_path_factory.mktemp("openai") / "data", deterministic=True))


@pytest.fixture(scope="module")
def api(desk: Desk) -> Iterator[openai.OpenAI]:
    with serving(desk) as url:
        yield client_of(url)


def pixels_of(drawing: openai.types.Image) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(drawing.b64_json))) as picture:
        return np.asarray(picture)


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.name = "picture.png"
    file.seek(0)
    return file


def noisy(side: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)


def test_it_draws_what_the_pipeline_draws(api: openai.OpenAI, desk: Desk) -> None:
    found = api.images.generate(
        prompt="a red apple", model="tiny", n=2, size="24x16", extra_body={"seed": 5, "steps": 3, "negative": "rain"}
    )
    expected = desk.pipeline.draw(Job("a red apple", "rain", seed=5, count=2, steps=3, width=24, height=16)).images
    assert [np.array_equal(pixels_of(each), wanted) for each, wanted in zip(found.data, expected, strict=True)] == [
        True,
        True,
    ]
    assert found.size == "24x16" and found.output_format == "png" and abs(found.created - time.time()) < 60


def test_seeds_that_nobody_chose_differ(api: openai.OpenAI) -> None:
    first, second = (pixels_of(api.images.generate(prompt="a").data[0]) for _ in "ab")
    assert first.shape == (16, 16, 3) and not np.array_equal(first, second)


def test_quality_and_style_are_steps_and_guidance(api: openai.OpenAI, desk: Desk) -> None:
    found = api.images.generate(prompt="a", quality="low", style="vivid", extra_body={"seed": 1}).data[0]
    usual = desk.pipeline.model.family.defaults
    expected = desk.pipeline.draw(Job("a", seed=1, steps=usual.steps // 2, guidance=usual.guidance * 1.25)).images[0]
    assert np.array_equal(pixels_of(found), expected)


@pytest.mark.parametrize("kind, pillow", [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats(api: openai.OpenAI, kind: str, pillow: str) -> None:
    sizes = []
    for compression in (100, 5):
        found = api.images.generate(
            prompt="a", size="64x64", output_format=kind, output_compression=compression, extra_body={"seed": 3}
        )
        content = base64.b64decode(found.data[0].b64_json)
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == pillow and picture.size == (64, 64)
        sizes.append(len(content))
    assert sizes[0] > sizes[1]


def test_a_url_leads_to_the_picture(api: openai.OpenAI) -> None:
    found = api.images.generate(prompt="a", response_format="url", user="ann").data[0]
    assert found.b64_json is None
    answer = httpx.get(found.url)
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"


def test_an_edit_draws_what_is_transparent_in_the_mask(api: openai.OpenAI) -> None:
    before = noisy()
    mask = np.full((16, 16, 4), 255, np.uint8)
    mask[:, :8, 3] = 0
    found = api.images.edit(image=png(before), mask=png(mask), prompt="a blue bird", extra_body={"seed": "2"})
    after = pixels_of(found.data[0])
    assert np.array_equal(after[:, 10:], before[:, 10:]) and not np.array_equal(after[:, :6], before[:, :6])


def test_an_edit_draws_what_is_transparent_in_the_picture(api: openai.OpenAI) -> None:
    before = noisy(channels=4)
    before[..., 3] = 255
    before[:8, :, 3] = 0
    after = pixels_of(api.images.edit(image=[png(before)], prompt="a blue bird").data[0])
    assert np.array_equal(after[10:], before[10:, :, :3]) and not np.array_equal(after[:6], before[:6, :, :3])


def test_an_edit_without_a_mask_is_over_all_of_the_picture(api: openai.OpenAI, desk: Desk) -> None:
    before = noisy()
    body = {"seed": 2, "strength": 0.5}
    after = pixels_of(api.images.edit(image=png(before), prompt="b", size="32x32", n=1, extra_body=body).data[0])
    assert after.shape == (32, 32, 3)
    same, other = (
        pixels_of(api.images.edit(image=png(before), prompt=prompt, extra_body=body).data[0]) for prompt in ("b", "c")
    )
    assert same.shape == (16, 16, 3) and not np.array_equal(same, other)


def test_variations_differ_and_are_near(api: openai.OpenAI) -> None:
    before = noisy()
    found = api.images.create_variation(image=png(before), n=2, response_format="b64_json", size="32x32")
    first, second = map(pixels_of, found.data)
    assert first.shape == (32, 32, 3) and not np.array_equal(first, second)


def test_models_are_listed(api: openai.OpenAI, desk: Desk) -> None:
    [model] = list(api.models.list())
    assert model.id == desk.model_name and model.object == "model" and model.owned_by == "sfumato"
    assert abs(model.created - time.time()) < 3600


REFUSED = {
    "model": {"model": "dall-e-2"}, "size": {"size": "large"}, "n": {"n": 11}, "quality": {"quality": "best"},
    "style": {"style": "grim"}, "background": {"background": "transparent"}, "output_format": {"output_format": "gif"},
    "output_compression": {"output_compression": 5}, "stream": {"extra_body": {"stream": True}},
    "frame_count": {"frame_count": 3}, "steps": {"extra_body": {"steps": 0}}, "prompt": {"extra_body": {"prompt": 5}},
}  # fmt: skip


@pytest.mark.parametrize("param", REFUSED)
def test_what_cannot_be_done_is_refused_in_openais_form(api: openai.OpenAI, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.generate(**{"prompt": "a", **REFUSED[param]})
    assert caught.value.param == param and caught.value.type == "invalid_request_error" and caught.value.message
    assert caught.value.code == ("model_not_found" if param == "model" else None)


def test_a_size_that_cannot_be_drawn_is_said_of_size(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.generate(prompt="a", size="17x16")
    assert caught.value.param == "size"


def test_what_is_no_picture_or_no_mask_is_refused(api: openai.OpenAI) -> None:
    opaque = np.full((16, 16, 4), 255, np.uint8)
    clear = np.zeros((8, 8, 4), np.uint8)
    for files, param in (
        ({"image": io.BytesIO(b"no picture")}, "image"), ({"image": png(noisy()), "mask": png(opaque)}, "mask"),
        ({"image": png(noisy()), "mask": png(clear)}, "mask"), ({"image": [png(noisy()), png(noisy())]}, "image"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            api.images.edit(prompt="a", **files)
        assert caught.value.param == param, caught.value
    url = f"{api.base_url}images/edits"
    for answer in (
        httpx.post(url, data={"prompt": "a"}), httpx.post(url, json={"prompt": "a"}),
        httpx.post(url, content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}),
        httpx.post(url, data={"prompt": "a"}, files={"image": png(noisy()), "other": b"x"}),
    ):  # fmt: skip
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_whoever_goes_away_leaves_no_work_behind(api: openai.OpenAI, desk: Desk) -> None:
    with pytest.raises(openai.APITimeoutError):
        api.with_options(timeout=0.5).images.generate(prompt="gone", n=10, size="64x64", extra_body={"steps": 200})
    for _ in range(200):
        [job] = desk.queue.page(limit=1)
        if job.state == "cancelled":
            break
        time.sleep(0.05)
    assert job.state == "cancelled" and job.job["prompt"] == "gone"


def test_keys_are_bearer_tokens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    desk = Desk(pipeline, Settings(tmp_path / "data"))
    keys = Keys(tmp_path / "data" / "keys.json")
    key, few = keys.add("ann", steps=5), keys.add("bob", requests=1)
    with serving(desk, only_local=False) as url:
        with pytest.raises(openai.AuthenticationError) as caught:
            client_of(url, "sk-none").images.generate(prompt="a")
        assert caught.value.code == "invalid_api_key"
        ann = client_of(url, key)
        found = ann.images.generate(prompt="a", response_format="url").data[0]
        assert httpx.get(found.url).status_code == 401
        assert httpx.get(found.url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        with pytest.raises(openai.BadRequestError, match="5 are allowed"):
            ann.images.generate(prompt="a", extra_body={"steps": 6})
        bob = client_of(url, few)
        bob.models.list()
        with pytest.raises(openai.RateLimitError) as often:
            bob.images.generate(prompt="a")
        assert often.value.code == "rate_limit_exceeded"
