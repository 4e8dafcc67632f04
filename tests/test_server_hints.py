"""What networks beside a job's own make on a server: while jobs go on, one at a time, and within the memory."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.images import save_png
from sfumato.models.controlnet import ControlNet
from sfumato.models.hed import HED, HEDConfig
from sfumato.pipeline import Pipeline
from sfumato.server import a1111, hints
from sfumato.server import service as services
from sfumato.server.desk import LOCAL, Desk, Settings
from sfumato.server.hints import hint_bytes, hint_of
from sfumato.server.keys import Limits, User
from sfumato.server.service import SHARE, Service
from sfumato.server.ticket import CANCELLED, DONE, FAILED, RUNNING, Ticket
from sfumato.server.worker import png_of
from sfumato.types import Control, Hires, Job
from sfumato.weights.checkpoint import load_model
from sfumato.weights.controls import save_control
from sfumato.weights.upscalers import Upscaler
from tests.conftest import randomise

SIDE = 24
LONG = Job("a tree", steps=900)
PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture
def service(tiny_checkpoint: Path) -> Iterator[Service]:
    """A service whose pipeline has a small HED of random weights."""
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    torch.manual_seed(0)
    pipeline.extras._edges = randomise(HED(HEDConfig((4, 4), (1, 1)))).eval().requires_grad_(False)
    service = Service(pipeline)
    yield service
    service.close()


def steps_of(job: Ticket) -> int:
    """Wait for five more steps of a job that is at work; how many there were, fewer where it stands still."""
    first, end = job.done, time.monotonic() + 60
    while job.done < first + 5 and time.monotonic() < end:
        time.sleep(0.01)
    return job.done - first


def during_hints(service: Service, act: Callable[[], None]) -> None:
    """Do something in the middle of every hint."""
    service.pipeline.extras._edges.register_forward_pre_hook(lambda module, args: act())


def test_a_job_goes_on_stepping_while_a_hint_is_made(service: Service) -> None:
    control = Control(annotate="hed", resize="stretch")
    expected = service.pipeline.extras.hint(control, PICTURE, 32, SIDE)[0]
    job, seen = service.submit(LONG), []
    during_hints(service, lambda: seen.append(steps_of(job)))
    found = hint_of(service, PICTURE, "hed", {}, SIDE)
    assert seen[0] >= 5, "steps that were drawn in the middle of the hint"
    assert found.shape == (SIDE, 32, 3) and np.ptp(found) > 0
    assert np.array_equal(found, (expected * 255).round().byte().permute(1, 2, 0).numpy())
    service.cancel(job)


def test_a_job_goes_on_stepping_while_a_picture_is_enlarged(tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    pipeline, seen = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[]), []
    desk = Desk(pipeline, Settings(tmp_path))
    job = desk.service.submit(LONG)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        seen.append(steps_of(job))
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    pipeline._upscalers["double"] = Upscaler("double", 2, doubled, torch.device("cpu"), torch.float32, 4)
    monkeypatch.setattr(a1111, "packaged_upscalers", lambda: {"double": Path("double.param")})
    asked = a1111.Extra(image=base64.b64encode(png_of(PICTURE)).decode(), upscaler_1="double")
    answer = a1111._enlarged(asked, desk, User(LOCAL, Limits()))
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer))))
    assert np.array_equal(found, PICTURE.repeat(2, 0).repeat(2, 1))
    assert seen[0] >= 5, "steps that were drawn while it was enlarged"
    desk.service.cancel(job)
    desk.close()


def test_what_takes_the_memory_of_a_step_waits_for_its_end(service: Service, monkeypatch) -> None:
    threads: list[str] = []
    during_hints(service, lambda: threads.append(threading.current_thread().name))
    taken = hint_bytes((32, SIDE))

    def free(share: float) -> None:
        """So much memory is free that a hint takes this share of it."""
        for module in (hints, services):
            monkeypatch.setattr(module, "free_memory", lambda device: taken / share)

    for share in (0.99 * (1 - SHARE), 1.01 * (1 - SHARE)):
        free(share)
        hint_of(service, PICTURE, "hed", {}, SIDE)
    assert threads == [threading.current_thread().name, "sfumato service"]
    free(1.01)
    with pytest.raises(ValueError, match="^image: hed of 32 x 24 px needs about"):
        hint_of(service, PICTURE, "hed", {}, SIDE)
    assert len(threads) == 2


def test_hints_with_networks_are_made_one_at_a_time(service: Service) -> None:
    at_work, most = 0, 0

    def count() -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        time.sleep(0.05)
        at_work -= 1

    during_hints(service, count)
    with ThreadPoolExecutor(4) as clients:
        made = [clients.submit(hint_of, service, PICTURE, "hed", {}, SIDE) for _ in range(4)]
        assert all(np.array_equal(each.result(), made[0].result()) for each in made)
    assert most == 1


# hints of jobs


@pytest.fixture
def steered(tiny_checkpoint: Path, tmp_path: Path) -> Pipeline:
    """A pipeline with the small HED, and a control network called edges."""
    (tmp_path / "ControlNet").mkdir()
    network = randomise(ControlNet.from_unet(load_model(tiny_checkpoint).unet, factor=2), 1)
    save_control(tmp_path / "ControlNet" / "edges.safetensors", network)
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[tmp_path])
    torch.manual_seed(0)
    pipeline.extras._edges = randomise(HED(HEDConfig((4, 4), (1, 1)))).eval().requires_grad_(False)
    save_png(tmp_path / "a.png", PICTURE)
    return pipeline


@pytest.fixture
def own(tmp_path: Path) -> Job:
    """A job of two passes, whose own hints a network finds."""
    control = Control("edges", str(tmp_path / "a.png"), "hed")
    return Job("a red apple", steps=3, seed=5, controls=(control,), hires=Hires(scale=1.5))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_jobs_own_hints_are_made_beside_the_others(steered: Pipeline, own: Job, deterministic: bool) -> None:
    """Of both passes, in another thread; the pictures are those of Pipeline.draw."""
    alone = steered.draw(own).images
    assert not np.array_equal(alone, steered.draw(Job("a red apple", steps=3, seed=5, hires=own.hires)).images)
    service = Service(steered, deterministic=deterministic)
    threads: list[str] = []
    during_hints(service, lambda: threads.append(threading.current_thread().name))
    found = service.submit(own).wait(60).images
    assert threads == ["sfumato hints"] * 2
    assert abs(found.astype(int) - alone).max() <= (0 if deterministic else 1)
    service.close()


def test_others_go_on_stepping_while_a_jobs_hint_is_made(steered: Pipeline, own: Job) -> None:
    service, seen = Service(steered), []
    other = service.submit(LONG)
    during_hints(service, lambda: seen.append(steps_of(other)))
    assert service.submit(own).wait(60).images.shape == (1, 24, 24, 3)
    assert len(seen) == 2 and min(seen) >= 5, "steps that were drawn in the middle of each hint"
    service.cancel(other)
    service.close()


def test_a_service_rests_while_its_only_job_waits_for_a_hint(steered: Pipeline, own: Job, monkeypatch) -> None:
    service, steps, counted = Service(steered), [], []
    step = service._step
    monkeypatch.setattr(service, "_step", lambda: (steps.append(1), step())[1])

    def watch() -> None:
        before = len(steps)
        time.sleep(0.3)
        counted.append(len(steps) - before)

    during_hints(service, watch)
    service.submit(own).wait(60)
    assert len(counted) == 2 and max(counted) <= 1, "one ends the step that asked for it"
    service.close()


def test_a_job_that_is_submitted_meanwhile_begins_at_once(steered: Pipeline, own: Job) -> None:
    service, found = Service(steered), []
    during_hints(service, lambda: found.append(service.submit(Job("a tree", steps=2)).wait(60)))
    service.submit(own).wait(60)
    assert len(found) == 2
    service.close()


def test_a_hint_that_fails_fails_its_job_alone(steered: Pipeline, own: Job) -> None:
    service = Service(steered)
    other = service.submit(LONG)

    def fail() -> None:
        raise ValueError("edges: no")

    during_hints(service, fail)
    job = service.submit(own)
    with pytest.raises(ValueError, match="edges: no"):
        job.wait(60)
    assert job.state == FAILED and other.state == RUNNING and service.alive
    service.cancel(other)
    service.close()


def test_a_job_is_cancelled_while_its_hint_is_made(steered: Pipeline, own: Job) -> None:
    """At once, and what it had not begun to make is not made."""
    service, go, begun = Service(steered), threading.Event(), []
    second = Control("edges", own.controls[0].image, "hed", resize="stretch")

    def hold() -> None:
        begun.append(1)
        assert go.wait(60)

    during_hints(service, hold)
    job = service.submit(Job("a", steps=2, controls=(own.controls[0], second)))
    end = time.monotonic() + 60
    while not begun and time.monotonic() < end:
        time.sleep(0.01)
    service.cancel(job)
    while job.state != CANCELLED and time.monotonic() < end:
        time.sleep(0.01)
    assert job.state == CANCELLED and not go.is_set()
    go.set()
    later = service.submit(Job("a tree", steps=2))
    later.wait(60)
    assert later.state == DONE
    with service._beside:
        pass
    assert len(begun) == 1
    service.close()
