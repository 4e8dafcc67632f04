"""What the server keeps of pictures that a checker looked at: verdicts at every door, nothing hidden to be fetched."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.cli.keys import run as make_key
from sfumato.cli.protecting import redone
from sfumato.cli.serve import Guard, add_flags
from sfumato.images import load_png
from sfumato.models.clip import CLIPVisionConfig
from sfumato.pipeline import Pipeline
from sfumato.safety import dwtdct, provenance
from sfumato.safety.checking import GREY
from sfumato.safety.concepts import Concepts
from sfumato.server import a1111, openai, protecting, service
from sfumato.server.app import create_app
from sfumato.server.desk import LOCAL, Desk, Settings
from sfumato.server.keys import Limits, User
from sfumato.server.protecting import Told, told_by
from sfumato.types import Job
from sfumato.weights.files import save_safetensors

ORDER = {"prompt": "a red apple", "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def checkers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Files of a checker of random weights whose thresholds let it flag every picture, and none."""
    torch.manual_seed(3)
    state = Concepts(CLIPVisionConfig(28, 14, 32, 1, 4), 16).state_dict()
    names = {name: name.replace("vision_model.", "vision_model.vision_model.", 1) for name in state}
    files = {}
    for flags in (True, False):
        files[flags] = tmp_path_factory.mktemp("checker") / "model.safetensors"
        moved = {
            "concept_embeds_weights": torch.full((17,), -2.0 if flags else 2.0),
            "special_care_embeds_weights": torch.full((3,), 2.0),
        }
        save_safetensors(files[flags], {names[name]: tensor for name, tensor in {**state, **moved}.items()}, {})
    return files


def guard(*flags: object) -> Guard:
    """What the flags of `sfumato serve` ask for."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return Guard(parser.parse_args([str(flag) for flag in flags]))


@contextmanager
def door(checkpoint: Path, data: Path, *flags: object) -> Iterator[tuple[TestClient, Desk]]:
    """A client of all doors of a server with such flags."""
    pipeline = Pipeline.from_pretrained(checkpoint, "cpu", adapters=[])
    desk = Desk(pipeline, Settings(data / "data", deterministic=True), guard(*flags))
    app = create_app(desk, routers=[a1111.router, openai.router], grace=0.0)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client, desk


def ended(client: TestClient, **order: object) -> dict:
    """A job once it is over."""
    return over(client, client.post("/v1/jobs", json={**ORDER, **order}).json()["id"])


def over(client: TestClient, id: str) -> dict:
    """The job of an id once it is over."""
    for _ in range(600):
        job = client.get(f"/v1/jobs/{id}").json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def fetched(client: TestClient, url: str) -> tuple[np.ndarray, dict]:
    """The pixels and the recipe of a result as anybody gets it."""
    with Image.open(io.BytesIO(client.get(url).content)) as picture:
        return np.asarray(picture.convert("RGB")), json.loads(picture.info["sfumato"])


@pytest.mark.parametrize("policy", ["withhold", "blur", "report"])
def test_every_door_tells_the_verdict_and_no_file_holds_what_is_hidden(
    tiny_checkpoint: Path, tmp_path: Path, checkers: dict[bool, Path], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "linear_map", lambda family: True)  # as families have that show previews
    monkeypatch.setattr(service, "linear", lambda family: lambda x0: np.zeros((len(x0), 4, 4, 3), np.uint8))
    with door(tiny_checkpoint, tmp_path, "--safety", policy, "--safety-checker", checkers[True]) as (client, desk):
        drawn = desk.pipeline.draw(Job(**ORDER, count=2)).images
        job = ended(client, count=2)
        assert job["state"] == "done" and len(job["results"]) == 2
        for result, pixels in zip(job["results"], drawn, strict=True):
            verdict = result["safety"]
            assert verdict["policy"] == policy and verdict["flagged"] is True
            assert len(verdict["scores"]) == 20 and verdict["checker"] == "stable-diffusion-safety-checker"
            shown, recipe = fetched(client, result["url"])
            assert recipe["safety"] == verdict and np.array_equal(redone(pixels, recipe), shown)
            assert np.array_equal(shown, pixels) == (policy == "report")
            assert (shown == GREY).all() == (policy == "withhold")
        events = client.get(f"/v1/jobs/{job['id']}/events").text
        assert json.loads(events.split("data: ")[-1])["results"] == job["results"]
        assert client.get("/v1/jobs").json()["jobs"][0]["results"] == job["results"]

        asked = {"prompt": "a red apple", "steps": 2, "seed": 5, "width": 16, "height": 16, "batch_size": 2}
        answer = client.post("/sdapi/v1/txt2img", json=asked).json()
        told = json.loads(answer["info"])["safety"]
        assert [each["flagged"] for each in told] == [True, True] and told[0]["policy"] == policy
        answer = client.post("/v1/images/generations", json={"prompt": "a red apple", "seed": 5, "steps": 2}).json()
        assert answer["data"][0]["safety"]["flagged"] is True and answer["data"][0]["safety"]["policy"] == policy
        answered = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))
        assert (answered == GREY).all() == (policy == "withhold")

        kept = [load_png(path)[0] for path in (tmp_path / "data" / "results").iterdir()]
        hidden = [each for pixels in drawn for each in kept if np.array_equal(pixels, each)]
        assert bool(hidden) == (policy == "report"), "not one file holds what is hidden"
        assert (desk.service.preview is None) == (policy != "report"), "nor does a preview show it"


def test_what_is_not_flagged_is_as_it_was_drawn_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, checkers: dict[bool, Path]
) -> None:
    with door(tiny_checkpoint, tmp_path, "--safety", "withhold", "--safety-checker", checkers[False]) as (client, desk):
        [result] = ended(client)["results"]
        assert result["safety"]["flagged"] is False and max(result["safety"]["scores"].values()) < 0
        assert np.array_equal(fetched(client, result["url"])[0], desk.pipeline.draw(Job(**ORDER)).images[0])


def test_without_a_policy_nobody_looks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with door(tiny_checkpoint, tmp_path) as (client, _):
        [result] = ended(client)["results"]
        assert (result["safety"], result["watermark"], result["signed_by"]) == (None, None, None)
        assert "safety" not in fetched(client, result["url"])[1]
        answer = client.post("/v1/images/generations", json={"prompt": "a", "steps": 1}).json()
        assert answer["data"][0]["safety"] is None


def test_marks_and_signatures_are_the_command_lines(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dwtdct, "SMALLEST", 96 * 96)
    key = tmp_path / "key"
    make_key(argparse.Namespace(act="new", file=key, name=None))
    flags = ("--watermark", "mine", "--sign", key)
    with door(tiny_checkpoint, tmp_path, *flags) as (client, desk):
        order = {"width": 96, "height": 96}
        [result] = ended(client, **order)["results"]
        assert result["watermark"] == {"text": "mine", "method": "dwtdct"}
        assert result["signed_by"] == (tmp_path / "key.pub").read_text().strip()
        pixels, recipe = fetched(client, result["url"])
        assert provenance.verify(pixels, recipe).sound
        own = guard(*flags).own
        drawn = desk.pipeline.draw(Job(**ORDER, **order))
        expected, made = own.finished(own.shown(drawn), 0)
        assert np.array_equal(pixels, expected) and recipe["watermark"] == made["watermark"]
        small = client.post("/v1/jobs", json={**ORDER, "width": 32, "height": 32})
        assert small.status_code == 422 and small.json()["error"]["field"] == "watermark"


def test_words_are_refused_before_anything_is_drawn(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("thunder\n")
    with door(tiny_checkpoint, tmp_path, "--refuse-words", tmp_path / "words.txt") as (client, desk):
        for order in ({"prompt": "a Thunder storm"}, {"prompt": "a", "hires": {"scale": 2, "prompt": "thunder"}}):
            answer = client.post("/v1/jobs", json=order)
            assert answer.status_code == 422 and answer.json()["error"]["field"] == "prompt"
        assert client.post("/sdapi/v1/txt2img", json={"prompt": "thunder"}).status_code == 422
        answer = client.post("/v1/images/generations", json={"prompt": "thunder"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
        assert sum(desk.queue.counts().values()) == 0


def test_jobs_of_before_the_word_list_are_checked_when_they_are_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("thunder\n")
    orders = ({"prompt": "thunder"}, {"prompt": "a", "hires": {"scale": 2, "prompt": "Thunder!"}}, {"prompt": "a"})
    with door(tiny_checkpoint, tmp_path) as (client, desk):
        desk.queue.pause(True)
        ids = [client.post("/v1/jobs", json={**ORDER, **order}).json()["id"] for order in orders]
    with door(tiny_checkpoint, tmp_path, "--refuse-words", tmp_path / "words.txt") as (client, desk):
        desk.queue.pause(False)
        jobs = [over(client, id) for id in ids]
        assert [job["state"] for job in jobs] == ["failed", "failed", "done"]
        for job in jobs[:2]:
            assert job["error"] == {"field": "prompt", "message": "prompt: refused by word list words.txt (thunder)"}
            assert job["results"] == [] and job["progress"]["done"] == 0, "nothing was drawn"


def test_a_picture_that_cannot_be_checked_is_not_kept(
    tiny_checkpoint: Path, tmp_path: Path, checkers: dict[bool, Path]
) -> None:
    with door(tiny_checkpoint, tmp_path, "--safety", "blur", "--safety-checker", checkers[True]) as (client, desk):

        def broken(pixels: np.ndarray) -> list:
            raise ValueError("checker: broken")

        desk.protector.own._checker.check = broken
        job = ended(client)
        assert job["state"] == "failed" and job["error"]["message"] == "checker: broken"
        assert list((tmp_path / "data" / "results").iterdir()) == [] and desk.worker.alive


def test_the_page_tells_the_verdict(tiny_checkpoint: Path, tmp_path: Path, checkers: dict[bool, Path]) -> None:
    pytest.importorskip("gradio")
    from sfumato.server.page import look
    from sfumato.server.page.watching import found, watched

    with door(tiny_checkpoint, tmp_path, "--safety", "blur", "--safety-checker", checkers[True]) as (_, desk):
        user = User(LOCAL, Limits())

        async def seen() -> list:
            return [sight async for sight in watched(desk, user, {**ORDER, "count": 2})]

        last = asyncio.run(seen())[-1]
        assert [told.flagged for told in last.told] == [True, True]
        first = found(desk, user)[0]
        assert first.told.flagged and look.verdict(first.told) == " · flagged, blurred"
        assert "flagged, blurred, by stable-diffusion-safety-checker" in look.recipe(first.job, first.told)


def test_a_result_that_is_gone_says_nothing(tmp_path: Path) -> None:
    assert told_by(None) == told_by(tmp_path / "gone.png") == Told()


def damaged(how: str) -> bytes:
    """A result's file as a full disk, a cut power line or a stranger leaves it; else one with a text as its recipe."""
    info, written = PngInfo(), io.BytesIO()
    info.add_itxt("sfumato", how)
    Image.new("RGB", (4, 4)).save(written, "PNG", pnginfo=info)
    content = written.getvalue()
    others = {"empty": b"", "cut": content[:60], "head": content[:20], "noise": bytes(range(256)) * 4}
    return others.get(how, content)


HOW = ("empty", "cut", "head", "noise", "[1]", "{", '{"safety": {"flagged": true}}', '{"signature": "mine"}')


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_result_says_nothing_and_is_told_once(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"{HOW.index(how)}.png"
    path.write_bytes(damaged(how))
    assert told_by(path) == told_by(path) == Told()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and path.name in said[0] and "damaged" in said[0]


def test_one_damaged_result_leaves_the_others_their_doors(
    tiny_checkpoint: Path, tmp_path: Path, checkers: dict[bool, Path]
) -> None:
    pytest.importorskip("gradio")
    from sfumato.server.page.watching import found

    with door(tiny_checkpoint, tmp_path, "--safety", "report", "--safety-checker", checkers[True]) as (client, desk):
        broken, whole = ended(client), ended(client, seed=6)
        name = broken["results"][0]["sha256"]
        path = desk.stores.results.path(name)
        content = path.read_bytes()
        path.write_bytes(content[:60])
        protecting._read.cache_clear()  # as after a restart
        listed = client.get("/v1/jobs")
        assert listed.status_code == 200 and [job["id"] for job in listed.json()["jobs"]] == [whole["id"], broken["id"]]
        assert listed.json()["jobs"][0] == whole, "what is whole is told as before"
        [told] = client.get(f"/v1/jobs/{broken['id']}").json()["results"]
        assert (told["sha256"], told["safety"], told["signed_by"]) == (name, None, None)
        events = client.get(f"/v1/jobs/{broken['id']}/events")
        assert events.status_code == 200 and json.loads(events.text.split("data: ")[-1])["results"] == [told]
        gallery = found(desk, User(LOCAL, Limits()))
        assert [drawn.told.flagged for drawn in gallery] == [True, False] and gallery[1].sha256 == name
        desk.stores.results.put(content)
        assert told_by(path).flagged, "one that is drawn again is whole again"
