"""ControlNet units of A1111's API, from its unmodified client; and what is refused of controls when they are posted."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests
import torch
import webuiapi
from PIL import Image

from sfumato.images.annotate import annotate
from sfumato.images.fitting import fitted
from sfumato.models.clip import CLIPVisionConfig
from sfumato.models.controlnet import ControlNet
from sfumato.models.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from sfumato.pipeline import Pipeline
from sfumato.server import a1111, controlnet, hints, openai
from sfumato.server.a1111_units import MODULES, Unit, controls_of, options_of, units_of
from sfumato.server.app import create_app
from sfumato.server.aside import LINE, THREADS, Allowance, Aside
from sfumato.server.desk import LOCAL, Desk, Settings
from sfumato.server.keys import Limits, User
from sfumato.server.orders import keep_picture
from sfumato.server.queue import Full
from sfumato.types import Control, Job
from sfumato.weights.controls import hed, save_control, save_ip_adapter
from sfumato.weights.files import save_safetensors
from sfumato.weights.towers import ImageTower
from tests.conftest import randomise

from .served import served

SIZE = {"width": 16, "height": 16, "seed": 3}
VISION = CLIPVisionConfig(28, 14, 32, 2, 4)


@pytest.fixture(scope="module")
def shelf(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ControlNet, an IP-Adapter, and two image encoders of which one fits it."""
    folder = tmp_path_factory.mktemp("shelf")
    model = Pipeline.from_pretrained(tiny_checkpoint, adapters=[]).model
    (folder / "ControlNet").mkdir()
    (folder / "clip_vision").mkdir()
    save_control(folder / "ControlNet" / "edges.safetensors", randomise(ControlNet.from_unet(model.unet, factor=2), 1))
    dims = [attention.to_q.out_features for attention in cross_attentions(model.unet)]
    adapter = randomise(IPAdapter(IPAdapterConfig(image_dim=20, context_dim=16), dims), 4)
    save_ip_adapter(folder / "ControlNet" / "ip-adapter.safetensors", adapter)
    torch.manual_seed(2)
    for name, width in (("fits", 20), ("other", 24)):
        save_safetensors(folder / "clip_vision" / f"{name}.safetensors", ImageTower(VISION, width).state_dict(), {})
    return folder


@pytest.fixture(scope="module")
def desk(tiny_checkpoint: Path, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[shelf])
    return Desk(pipeline, Settings(tmp_path_factory.mktemp("units") / "data", deterministic=True))


@pytest.fixture(scope="module")
def api(desk: Desk) -> Iterator[webuiapi.WebUIApi]:
    app = create_app(desk, routers=[a1111.router, controlnet.router, openai.router])
    with served(app) as port:
        yield webuiapi.WebUIApi(port=port, steps=3)


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """A disc on a slope of grey, 40 x 24 px."""
    y, x = np.mgrid[:24, :40]
    grey = np.where((x - 20) ** 2 + (y - 12) ** 2 < 49, 230, 3 * x).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


def sent(picture: Image.Image) -> str:
    written = io.BytesIO()
    picture.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode("ascii")


def drawn(desk: Desk, picture: Image.Image, control: Control, **fields: object) -> np.ndarray:
    """What the pipeline draws of a job as A1111's client asks for it, with a control."""
    name, kept = keep_picture(base64.b64decode(sent(picture)), desk.stores)
    options = {"sampler": "euler_a", "eta": 1.0, "like": "a1111", "steps": 3, "guidance": 7.0, **SIZE, **fields}
    job = Job("a", controls=(Control(**{**vars(control), "image": f"sha256:{name}"}),), **options)
    return desk.service.submit(job, pictures={f"sha256:{name}": kept}).wait(60).images[0]


def test_the_lists_are_the_extensions(api: webuiapi.WebUIApi) -> None:
    assert api.controlnet_version() == 2
    assert api.controlnet_model_list() == ["edges", "ip-adapter"]
    names = api.controlnet_module_list()
    assert names[0] == "none" and {"canny", "invert", "scribble_xdog", "tile_resample"} <= set(names)
    root = api.baseurl.removesuffix("/sdapi/v1")
    said = api.session.get(f"{root}/controlnet/module_list").json()["module_detail"]["canny"]["sliders"]
    assert [each["value"] for each in said] == [512, 100, 200]
    assert api.session.get(f"{root}/controlnet/settings").json() == {"control_net_unit_count": 8}
    types = api.session.get(f"{root}/controlnet/control_types").json()["control_types"]
    assert types["All"]["model_list"] == ["None", "edges", "ip-adapter"]
    assert api.get_scripts()["txt2img"][0] == "controlnet"


def test_a_unit_of_the_client_steers_as_a_control_does(api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image) -> None:
    plain = np.asarray(api.txt2img(prompt="a", **SIZE).image)
    unit = webuiapi.ControlNetUnit(image=scene, module="none", model="edges", weight=0.8, resize_mode="Just Resize")
    found = np.asarray(api.txt2img(prompt="a", controlnet_units=[unit], **SIZE).image)
    assert not np.array_equal(found, plain)
    assert np.array_equal(found, drawn(desk, scene, Control("edges", weight=0.8, resize="stretch")))
    off = webuiapi.ControlNetUnit(image=scene, module="canny", model="edges", enabled=False)
    assert np.array_equal(np.asarray(api.txt2img(prompt="a", controlnet_units=[off], **SIZE).image), plain)


@pytest.mark.parametrize("mode, ours", [(0, "balanced"), (1, "prompt"), (2, "control")])
def test_pixel_perfect_hints_are_made_at_the_size_drawn(
    api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image, mode: int, ours: str
) -> None:
    unit = webuiapi.ControlNetUnit(
        image=scene, module="canny", model="edges [0123abcd]", pixel_perfect=True, threshold_a=40, threshold_b=90,
        guidance_start=0.2, guidance_end=0.9, control_mode=mode, resize_mode="Crop and Resize",
    )  # fmt: skip
    found = np.asarray(api.txt2img(prompt="a", controlnet_units=[unit], **SIZE).image)
    options = {"low": 40, "high": 90}
    control = Control("edges", annotate="canny", options=options, start=0.2, end=0.9, mode=ours)
    assert np.array_equal(found, drawn(desk, scene, control))


def test_other_hints_are_made_at_their_own_resolution(api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image) -> None:
    unit = webuiapi.ControlNetUnit(image=scene, module="canny", model="edges", processor_res=96)
    found = np.asarray(api.txt2img(prompt="a", controlnet_units=[unit], **SIZE).image)
    hint = annotate(fitted(np.asarray(scene), 160, 96, "stretch"), "canny", low=64, high=64)
    assert np.array_equal(found, drawn(desk, Image.fromarray(hint), Control("edges", resize="fill")))
    detected = api.controlnet_detect([scene], module="canny", processor_res=96)
    assert detected.info == "Success" and np.array_equal(np.asarray(detected.image), hint)


def test_without_a_picture_of_its_own_a_unit_sees_the_init_image(
    api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image
) -> None:
    unit = webuiapi.ControlNetUnit(module="invert", model="edges", pixel_perfect=True)
    plain = api.img2img([scene], prompt="a", width=16, height=16, seed=3).image
    steered = api.img2img([scene], prompt="a", width=16, height=16, seed=3, controlnet_units=[unit]).image
    assert not np.array_equal(np.asarray(plain), np.asarray(steered))
    [entry] = desk.queue.page(limit=1)
    assert entry.job["controls"][0]["annotate"] == "invert" and "image" not in entry.job["controls"][0]


def test_an_ip_adapter_takes_its_encoder_as_module(api: webuiapi.WebUIApi, scene: Image.Image) -> None:
    plain = np.asarray(api.txt2img(prompt="a", **SIZE).image)
    unit = webuiapi.ControlNetUnit(image=scene, module="fits", model="ip-adapter")
    assert not np.array_equal(np.asarray(api.txt2img(prompt="a", controlnet_units=[unit], **SIZE).image), plain)


WRONG = (
    ({"model": "edgy"}, "model"), ({"model": None}, "model"), ({"module": "openpose_full"}, "module"),
    ({"control_mode": 3}, "control_mode"), ({"control_mode": "Harder"}, "control_mode"), ({"weight": "x"}, "weight"),
    ({"resize_mode": "Bend"}, "resize_mode"), ({"image": "/etc/passwd"}, "base64"), ({"mask": "AAAA"}, "mask"),
    ({"hr_option": "Low res only"}, "hr_option"), ({"guidance_start": 0.9, "guidance_end": 0.1}, "start"),
    ({"image": None}, "image"), ({"weight": -1}, "weight"), ({"image": "AAAA", "module": "canny"}, "picture"),
    ({"module": "other", "model": "ip-adapter"}, "encoder gives 24"), ({"model": "ip-adapter"}, "image encoder"),
)  # fmt: skip


@pytest.mark.parametrize("wrong, why", WRONG)
def test_what_a_unit_cannot_be_is_4xx_and_says_why(
    api: webuiapi.WebUIApi, scene: Image.Image, wrong: dict, why: str
) -> None:
    unit = {"image": sent(scene), "module": "none", "model": "edges", "pixel_perfect": True, **wrong}
    body = {"prompt": "a", "steps": 1, **SIZE, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    answer = api.session.post(f"{api.baseurl}/txt2img", json=body)
    assert 400 <= answer.status_code < 500 and why in answer.json()["detail"], answer.text


@pytest.mark.parametrize("args", [3, [3], [[1]], [{"image": 5}], [{"image": {"image": 3}}], [{}] * 9])
def test_what_is_no_unit_is_4xx(api: webuiapi.WebUIApi, args: object) -> None:
    body = {"prompt": "a", "alwayson_scripts": {"ControlNet": {"args": args}}}
    answer = api.session.post(f"{api.baseurl}/txt2img", json=body)
    assert 400 <= answer.status_code < 500 and "controlnet" in answer.json()["detail"].lower(), answer.text


def detect_of(api: webuiapi.WebUIApi) -> str:
    return f"{api.baseurl.removesuffix('/sdapi/v1')}/controlnet/detect"


@contextmanager
def limited(desk: Desk, **limits: int) -> Iterator[None]:
    """The one local user with other limits."""
    usual = desk.settings
    desk.settings = replace(usual, limits=replace(usual.limits, **limits))
    yield
    desk.settings = usual


def test_what_cannot_be_detected_is_4xx(api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image) -> None:
    url = detect_of(api)
    line = Image.new("RGB", (2000, 1))
    for body, why in (
        ({}, "one picture"), ({"controlnet_module": "magic", "controlnet_input_images": [sent(scene)]}, "one of none"),
        ({"controlnet_input_images": ["AAAA"]}, "picture"), ({"controlnet_input_images": [sent(scene)] * 9}, "images"),
        ({"controlnet_module": "canny", "controlnet_input_images": [sent(line)]}, "px for its hint"),
        ({"controlnet_input_images": [sent(Image.new("L", (2049, 2048)))]}, "2049 x 2048 px for its hint"),
    ):  # fmt: skip
        answer = api.session.post(url, json=body)
        assert answer.status_code == 422 and why in answer.json()["detail"], answer.text


def test_the_pictures_of_one_request_are_bounded_together(
    api: webuiapi.WebUIApi, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def hint(service: object, pixels: np.ndarray, name: str, options: object, side: int) -> np.ndarray:
        made.append(side)
        return pixels

    monkeypatch.setattr(controlnet, "hint_of", hint)
    square = sent(Image.new("RGB", (8, 8)))
    body = {"controlnet_module": "invert", "controlnet_processor_res": 1024, "controlnet_input_images": [square] * 4}
    assert api.session.post(detect_of(api), json=body).status_code == 200 and made == [1024] * 4
    made.clear()
    wide = sent(Image.new("RGB", (9, 8)))
    answer = api.session.post(detect_of(api), json={**body, "controlnet_input_images": [square] * 3 + [wide]})
    assert answer.status_code == 422 and "4194304 in all" in answer.json()["detail"], answer.text
    with limited(desk, pixels=1024 * 1024):
        answer = api.session.post(detect_of(api), json=body)
        assert answer.status_code == 422 and "1048576 in all" in answer.json()["detail"], answer.text
    with limited(desk, count=3):
        answer = api.session.post(detect_of(api), json=body)
        assert answer.status_code == 422 and "4 pictures; 3 are allowed" in answer.json()["detail"], answer.text
    with limited(desk, pixels=200), pytest.raises(ValueError, match="too many pixels together"):
        allowance = Allowance(desk.settings.limits)
        for _ in range(4):
            allowance.take((8, 8), 1, "image")
    with limited(desk, requests=1):
        assert api.session.post(detect_of(api), json=body).status_code == 429
    assert not made, "nothing is made of a request that is refused"


def test_hints_leave_threads_for_all_else(
    api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, at_work, most = threading.Event(), [], []

    def slow(service: object, pixels: np.ndarray, *said: object) -> np.ndarray:
        at_work.append(1)
        most.append(len(at_work))
        assert go.wait(30)
        at_work.pop()
        return pixels

    monkeypatch.setattr(controlnet, "hint_of", slow)
    body = {"controlnet_module": "canny", "controlnet_input_images": [sent(scene)]}
    root = api.baseurl.removesuffix("/sdapi/v1")
    with ThreadPoolExecutor(LINE) as clients:
        asked = [clients.submit(requests.post, detect_of(api), json=body) for _ in range(LINE)]
        while (
            len(at_work) < THREADS or sum(desk.aside._asked.values()) < LINE
        ):  # one that asked sooner would wait in it
            time.sleep(0.01)
        answer = requests.post(detect_of(api), json={}, timeout=20)
        assert answer.status_code == 429 and answer.headers["Retry-After"], answer.text
        for path in ("/healthz", "/readyz", "/v1/jobs"):
            assert requests.get(root + path, timeout=5).status_code == 200
        go.set()
        assert [each.result().status_code for each in asked] == [200] * LINE
    assert max(most) == THREADS
    assert requests.post(detect_of(api), json=body).status_code == 200


def test_health_is_told_while_all_threads_are_taken(
    api: webuiapi.WebUIApi, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, root = threading.Event(), api.baseurl.removesuffix("/sdapi/v1")
    monkeypatch.setattr(desk.queue, "page", lambda *said: go.wait(30) and [])
    with ThreadPoolExecutor(48) as clients:
        asked = [clients.submit(requests.get, f"{root}/v1/jobs") for _ in range(48)]
        try:
            with pytest.raises(requests.Timeout):  # all are taken: this one waits
                for _ in range(100):
                    requests.get(f"{root}/v1/models", timeout=0.5)
            assert requests.get(f"{root}/healthz", timeout=5).json()["ok"] is True
            assert requests.get(f"{root}/readyz", timeout=5).json()["ok"] is True
        finally:
            go.set()
        assert {each.result().status_code for each in asked} == {200}


def test_users_have_lines_of_their_own() -> None:
    async def asked() -> tuple[int, int]:
        aside, go = Aside(1), threading.Event()
        ann, bob, carl = (User(name, Limits(waiting=waiting)) for name, waiting in (("a", 99), ("b", 3), ("c", 99)))
        waiting = [asyncio.ensure_future(aside.run(ann, lambda: go.wait(30))) for _ in range(LINE)]
        waiting += [asyncio.ensure_future(aside.run(bob, lambda: go.wait(30))) for _ in range(3)]
        await asyncio.sleep(0)
        for user in (ann, bob):
            with pytest.raises(Full):
                await aside.run(user, lambda: None)
        last = asyncio.ensure_future(aside.run(carl, lambda: 7))
        waiting[-1].cancel()
        go.set()
        done = await asyncio.gather(*waiting[:-1])
        with pytest.raises(ZeroDivisionError):
            await aside.run(ann, lambda: 1 // 0)
        found = await last
        aside.close()
        return sum(done), found

    assert asyncio.run(asked()) == (LINE + 2, 7)


def test_units_of_a_full_queue_make_no_hints_and_like_ones_share_one(
    api: webuiapi.WebUIApi, desk: Desk, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def hint(service: object, pixels: np.ndarray, name: str, *said: object) -> np.ndarray:
        made.append(name)
        return pixels

    monkeypatch.setattr(a1111, "hint_of", hint)
    unit = {"image": sent(scene), "module": "canny", "model": "edges"}
    units = [unit, unit, {**unit, "module": "invert"}]
    body = {"prompt": "a", "steps": 1, **SIZE, "alwayson_scripts": {"controlnet": {"args": units}}}
    assert api.session.post(f"{api.baseurl}/txt2img", json=body).status_code == 200
    assert made == ["canny", "invert"]
    desk.queue.pause(True)
    waiting = desk.submit({"prompt": "a", "steps": 1}, User(LOCAL, Limits()))
    with limited(desk, waiting=1):
        answer = api.session.post(f"{api.baseurl}/txt2img", json=body)
    assert answer.status_code == 429 and answer.headers["Retry-After"] and len(made) == 2, answer.text
    desk.cancel(waiting.id, User(LOCAL, Limits()))
    desk.queue.pause(False)
    many = [{**unit, "processor_res": 1024 + 8 * n} for n in range(4)]  # of 40 x 24 px: 1.75 million px each
    body["alwayson_scripts"]["controlnet"]["args"] = many
    answer = api.session.post(f"{api.baseurl}/txt2img", json=body)
    assert answer.status_code == 422 and "px for its hint" in answer.json()["detail"], answer.text


def test_networks_of_annotators_need_memory(
    api: webuiapi.WebUIApi, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hed, "PACKAGE", "numpy")  # one that is installed: nothing is loaded
    monkeypatch.setattr(hints, "free_memory", lambda device: 3e7)
    body = {"controlnet_module": "softedge_hed", "controlnet_input_images": [sent(scene)]}
    answer = api.session.post(detect_of(api), json=body)
    assert answer.status_code == 422 and "needs about 0.4 GiB, 0.0 are free" in answer.json()["detail"], answer.text
    control = {"model": "edges", "image": f"base64,{sent(scene)}", "annotate": "hed"}
    order = {"prompt": "a", "controls": [control], "width": 256, "height": 256, "tile": 16}
    answer = api.session.post(f"{api.baseurl.removesuffix('/sdapi/v1')}/v1/jobs", json=order)
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["field"] == "controls[0].annotate" and "GiB" in error["message"]


CONTROLS = (
    ({"annotate": "magic"}, "controls[0].annotate"), ({"annotate": "depth"}, "controls[0].annotate"),
    ({"annotate": "canny", "options": {"lower": 1}}, "controls[0].options"),
    ({"annotate": "canny", "options": {"low": -1}}, "controls[0].options"),
    ({"options": {"low": 1}}, "controls[0].options"), ({"model": "ip-adapter"}, "controls[0].annotate"),
    ({"model": "ip-adapter", "annotate": "other"}, "controls[0].annotate"),
    ({"model": "ip-adapter", "annotate": "canny"}, "controls[0].annotate"),
)  # fmt: skip


@pytest.mark.parametrize("wrong, field", CONTROLS)
def test_our_own_controls_are_refused_when_they_are_posted(
    api: webuiapi.WebUIApi, scene: Image.Image, wrong: dict, field: str
) -> None:
    control = {"model": "edges", "image": f"base64,{sent(scene)}", **wrong}
    root = api.baseurl.removesuffix("/sdapi/v1")
    answer = api.session.post(f"{root}/v1/jobs", json={"prompt": "a", "controls": [control]})
    assert answer.status_code == 422 and answer.json()["error"]["field"] == field, answer.text


def test_numbers_out_of_range_are_the_modules_own() -> None:
    unit = {"image": "AAAA", "model": "edges", "pixel_perfect": True, "threshold_a": 64, "threshold_b": -1}

    class Known:
        def files(self, kind: str) -> dict[str, str]:
            return {"edges": ""} if kind == "control" else {}

    def never(*said: object) -> str:
        raise AssertionError("no hint is made of a pixel-perfect unit")

    for module, options in (
        ("canny", {"low": 64, "high": 200}), ("tile_resample", {"factor": 1.0}), ("invert", {}),
        ("threshold", {"level": 64}), ("Blur_Gaussian", {"sigma": 64}),
    ):  # fmt: skip
        units = units_of({"ControlNet": {"args": [None, {**unit, "module": module}]}})
        [control] = controls_of(units, Known(), None, never)
        assert control["options"] == options and control["annotate"] == MODULES[module.lower()].annotator
        assert control["image"] == "base64,AAAA" and json.dumps(control)


@pytest.mark.parametrize("said, options", [((200, 100), (100, 200)), ((256, -1), (200, 256)), ((-1, 30), (30, 100))])
def test_thresholds_of_canny_in_the_wrong_order_are_swapped(said: tuple[int, int], options: tuple[int, int]) -> None:
    unit = Unit(threshold_a=said[0], threshold_b=said[1])
    found = options_of(MODULES["canny"], unit)
    assert found == {"low": options[0], "high": options[1]}
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    assert np.array_equal(annotate(pixels, "canny", **found)[..., 0], cv2.Canny(pixels, *_sliders(said)))


def _sliders(said: tuple[int, int]) -> list[float]:
    """What the extension hands to OpenCV: its own numbers where one is out of range."""
    return [
        value if slider.low <= value <= slider.high else slider.default
        for slider, value in zip(MODULES["canny"].sliders, said, strict=True)
    ]
