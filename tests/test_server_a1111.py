"""A1111's API, spoken by its unmodified client webuiapi against a server in a thread."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webuiapi
from PIL import Image

from sfumato.pipeline import Pipeline
from sfumato.server import a1111
from sfumato.server.app import create_app
from sfumato.server.desk import Desk, Settings
from sfumato.server.infotext import infotext, parsed
from sfumato.tasks.checks import complete
from sfumato.types import Job

from .served import served


@pytest.fixture(scope="module")
def desk(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    return Desk(pipeline, Settings(tmp_path_factory.mktemp("a1111") / "data", deterministic=True))


@pytest.fixture(scope="module")
def api(desk: Desk) -> Iterator[webuiapi.WebUIApi]:
    app = create_app(desk, routers=[a1111.router])
    with served(app) as port:
        yield webuiapi.WebUIApi(port=port, steps=3)


def test_txt2img_draws_what_the_profile_draws(api: webuiapi.WebUIApi, desk: Desk) -> None:
    found = api.txt2img(prompt="a red apple", negative_prompt="rain", seed=5, batch_size=2, width=16, height=16)
    job = Job(
        "a red apple", "rain", seed=5, count=2, steps=3, guidance=7.0, sampler="euler_a", eta=1.0, like="a1111",
        width=16, height=16,
    )  # fmt: skip
    expected = desk.pipeline.draw(job).images
    assert len(found.images) == 2
    for image, pixels in zip(found.images, expected, strict=True):
        assert np.array_equal(np.asarray(image), pixels)
    assert found.info["all_seeds"] == [5, 6] and found.info["sampler_name"] == "Euler a"
    told = api.png_info(found.images[1])
    assert told.info.startswith("a red apple\nNegative prompt: rain\nSteps: 3, Sampler: Euler a, Schedule type: ")
    assert "Seed: 6, Size: 16x16, Model hash: " in told.info
    assert told.parameters["Size-1"] == "16" and told.parameters["Negative prompt"] == "rain"


def test_seeds_that_nobody_chose_differ(api: webuiapi.WebUIApi) -> None:
    first, second = (api.txt2img(prompt="a", width=16, height=16).info["seed"] for _ in "ab")
    assert first != second and first >= 0


def test_hires_and_img2img_with_a_mask(api: webuiapi.WebUIApi) -> None:
    large = api.txt2img(prompt="a", width=16, height=16, enable_hr=True, hr_scale=2, seed=1)
    assert large.image.size == (32, 32)
    mask = Image.new("L", large.image.size, 0)
    mask.paste(255, (0, 0, 16, 32))
    redrawn = api.img2img(
        [large.image],
        prompt="b",
        mask_image=mask,
        mask_blur=0,
        inpaint_full_res=False,
        inpainting_fill=1,
        width=32,
        height=32,
    )
    before, after = (np.asarray(image).astype(int) for image in (large.image, redrawn.image))
    assert redrawn.image.size == (32, 32)
    assert np.array_equal(before[:, 20:], after[:, 20:]) and not np.array_equal(before[:, :12], after[:, :12])


def test_lists_and_options(api: webuiapi.WebUIApi, desk: Desk) -> None:
    assert {"Euler a", "DPM++ 2M"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras"} <= set(api.util_get_scheduler_names())
    [title] = api.util_get_model_names()
    api.util_set_model(title, find_closest=False)
    assert api.util_get_current_model() == title
    assert {"lanczos"} <= {each["name"] for each in api.get_upscalers()}
    assert api.get_loras() == [] and api.get_embeddings()["loaded"] == {} and api.get_hypernetworks() == []
    plain = api.txt2img(prompt="a", seed=1, width=16, height=16).image
    api.set_options({"CLIP_stop_at_last_layers": 2})
    skipped = api.txt2img(prompt="a", seed=1, width=16, height=16).image
    api.set_options({"CLIP_stop_at_last_layers": 1})
    assert not np.array_equal(np.asarray(plain), np.asarray(skipped))
    with pytest.raises(Exception, match="4"):
        api.txt2img(prompt="a", width=16, height=16, override_settings={"sd_model_checkpoint": "another"})


def test_progress_and_interrupt(api: webuiapi.WebUIApi) -> None:
    answers = []
    drawing = threading.Thread(
        target=lambda: answers.append(api.txt2img(prompt="a", steps=200, batch_size=8, width=16, height=16))
    )
    drawing.start()
    while not 0 < api.get_progress()["progress"] < 1:
        time.sleep(0.02)
    api.interrupt()
    drawing.join(60)
    assert answers[0].info["interrupted"] and answers[0].images == []
    assert api.get_progress()["state"]["job_count"] == 0


def test_an_extra_image_is_enlarged(api: webuiapi.WebUIApi) -> None:
    found = api.extra_single_image(Image.new("RGB", (8, 6), (9, 9, 9)), upscaling_resize=2, upscaler_1="Lanczos")
    assert found.image.size == (16, 12)


def test_what_cannot_be_done_is_refused(api: webuiapi.WebUIApi) -> None:
    url = api.baseurl
    for path, body in (
        ("txt2img", {"script_name": "x/y/z plot"}), ("txt2img", {"sampler_name": "magic"}),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}), ("txt2img", {"steps": "many"}),
        ("txt2img", {"width": 10**9}), ("img2img", {}), ("img2img", {"init_images": ["/etc/passwd"]}),
        ("img2img", {"init_images": ["http://localhost/a.png"]}), ("png-info", {"image": "%"}),
        ("extra-single-image", {"image": "AAAA", "upscaler_1": "/etc/passwd"}),
        ("options", {"CLIP_stop_at_last_layers": "x"}),
    ):  # fmt: skip
        answer = api.session.post(f"{url}/{path}", json=body)
        assert 400 <= answer.status_code < 500 and answer.json()["detail"], (path, body, answer.text)


def test_a_text_is_read_as_it_was_written(desk: Desk) -> None:
    job = complete(Job("a, b: c\nsecond line", "no, no", seed=3), desk.pipeline.model.family)
    found = parsed(infotext(job, 3, "a, strange: name", "0" * 64, "v1"))
    assert found["Prompt"] == "a, b: c\nsecond line" and found["Negative prompt"] == "no, no"
    assert found["Model"] == "a, strange: name" and found["Seed"] == "3" and found["Size-2"] == "16"
    assert parsed("only words, with: one") == {"Prompt": "only words, with: one", "Negative prompt": ""}


def test_base64_pictures_come_back_as_files(api: webuiapi.WebUIApi) -> None:
    answer = api.session.post(f"{api.baseurl}/txt2img", json={"prompt": "a", "steps": 1, "width": 16, "height": 16})
    said = answer.json()
    with Image.open(io.BytesIO(base64.b64decode(said["images"][0]))) as picture:
        assert json.loads(picture.info["sfumato"])["job"]["prompt"] == "a" and "Steps: 1" in picture.info["parameters"]
