"""The service: jobs drawn together equal those drawn alone; users take turns; who fails, fails alone."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.pipeline import Pipeline
from sfumato.server.service import STEPS_WORN, Service
from sfumato.server.ticket import CANCELLED, DONE, FAILED, RUNNING, Cancelled, Ticket
from sfumato.types import Hires, Job
from sfumato.weights.files import save_safetensors

JOBS = (
    Job("a red apple", sampler="dpmpp_2m", steps=5, guidance=4.0, seed=1, count=2),
    Job("a blue cat", "a dog", sampler="euler_a", steps=4, guidance=2.0, seed=7),
    Job("a tree", sampler="heun", steps=3, guidance=1.0, seed=3, count=3),
    Job("", sampler="plms", steps=6, guidance=7.5, seed=11),
    Job("a house", "rain", sampler="ddim", eta=0.5, steps=2, guidance=0.0, seed=5),
    Job("a red apple", sampler="euler", schedule="karras", steps=4, guidance=3.0, seed=1, width=24, height=32),
    Job("a fish", steps=3, seed=2, hires=Hires(scale=1.5)),
)


@pytest.fixture
def pipeline(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])


def lora_for(pipeline: Pipeline, path: Path) -> None:
    """Write an adapter of random numbers for the pipeline's U-Net."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in pipeline.model.unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v")):
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = 0.3 * torch.randn(2, module.in_features, generator=generator)
            tensors[f"{stem}.lora_up.weight"] = 0.3 * torch.randn(module.out_features, 2, generator=generator)
    path.parent.mkdir()
    save_safetensors(path, tensors, {})


class Gate:
    """Holds a pipeline's network back until `open` is set; counts the rows of each call."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.open, self.rows = threading.Event(), []
        self.reached = threading.Event()
        pipeline.model.unet.register_forward_pre_hook(self.hook)

    def hook(self, module, args) -> None:
        self.reached.set()
        assert self.open.wait(30)
        self.rows.append(len(args[0]))


def test_jobs_of_all_kinds_drawn_together_equal_those_drawn_alone(pipeline: Pipeline) -> None:
    alone = [pipeline.draw(job).images for job in JOBS]
    gate = Gate(pipeline)
    service = Service(pipeline, rows=64)
    tickets = [service.submit(job, user=f"user {number % 3}") for number, job in enumerate(JOBS)]
    gate.open.set()
    for ticket, expected in zip(tickets, alone, strict=True):
        found = ticket.wait(60).images
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert ticket.state == DONE and ticket.done == ticket.total > 0
    service.close()
    assert max(gate.rows) >= 8, "different samplers share a network call"


def test_deterministic_is_equal_to_the_last_bit(pipeline: Pipeline) -> None:
    alone = [pipeline.draw(job).images for job in JOBS]
    service = Service(pipeline, deterministic=True)
    tickets = [service.submit(job, user=str(number)) for number, job in enumerate(JOBS)]
    for ticket, expected in zip(tickets, alone, strict=True):
        assert np.array_equal(ticket.wait(60).images, expected)
    service.close()


def test_a_job_joins_while_another_is_drawn_and_ends_before_it(pipeline: Pipeline) -> None:
    service = Service(pipeline)
    began = threading.Event()
    long = service.submit(Job("a tree", steps=900), "a", lambda ticket: began.set() if ticket.done else None)
    assert began.wait(30)
    short = service.submit(Job("a cat", steps=2), "b")
    short.wait(30)
    assert long.state == RUNNING
    service.close(30)
    assert long.state == CANCELLED


def test_a_user_of_many_pictures_does_not_hold_up_others(pipeline: Pipeline) -> None:
    gate = Gate(pipeline)
    service = Service(pipeline, rows=4)
    ended: list[str] = []

    def end(ticket: Ticket) -> None:
        if ticket.state == DONE:
            ended.append(ticket.user)

    service.submit(Job("a tree", steps=3, count=40), "greedy", end)
    assert gate.reached.wait(30)
    many = [service.submit(Job("a cat", steps=3, seed=seed), "greedy", end) for seed in range(5)]
    one = service.submit(Job("a dog", steps=3), "modest", end)
    gate.open.set()
    one.wait(60)
    assert ended == ["modest"]
    for ticket in many:
        ticket.wait(60)
    service.close()
    assert max(gate.rows) <= 4 + 2, "no more rows are at work than there is room for, but for one picture's"


def test_cancelling_works_within_a_step_and_before_the_beginning(pipeline: Pipeline) -> None:
    gate = Gate(pipeline)
    service = Service(pipeline, rows=2)
    first, second = (service.submit(Job("a tree", steps=500), user) for user in ("a", "b"))
    assert gate.reached.wait(30)
    service.cancel(second)
    service.cancel(first)
    gate.open.set()
    for ticket in (first, second):
        with pytest.raises(Cancelled):
            ticket.wait(30)
        assert ticket.state == CANCELLED
    assert len(gate.rows) == 1
    assert service.submit(Job("a cat", steps=2)).wait(30).images.shape == (1, 16, 16, 3)
    service.cancel(first)
    service.close()


def test_progress_and_previews_are_told(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pictures = []

    def listen(ticket: Ticket) -> None:
        seen.append((ticket.done, ticket.total))
        pictures.append(ticket.preview())

    service = Service(pipeline, preview=lambda x0: np.full((len(x0), 4, 4, 3), 7, np.uint8))
    service.submit(Job("a tree", steps=4, count=2), listener=listen).wait(30)
    service.close()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (8, 8) and (4, 8) in seen
    shown = [picture for picture in pictures if picture is not None]
    assert shown and shown[0].shape == (16, 16, 3) and (shown[0] == 7).all()


def test_a_wrong_job_is_refused_and_one_that_fails_fails_alone(pipeline: Pipeline) -> None:
    gate = Gate(pipeline)
    service = Service(pipeline)
    with pytest.raises(ValueError, match="steps=0"):
        service.submit(Job("a tree", steps=0))
    good = service.submit(Job("a tree", steps=3), "a")
    bad = service.submit(Job("a tree <lora:nowhere:1>", steps=3), "a")
    deaf = service.submit(Job("a dog", steps=3), "c", lambda ticket: 1 / 0)
    gate.open.set()
    with pytest.raises(ValueError, match="nowhere"):
        bad.wait(30)
    assert bad.state == FAILED
    assert good.wait(30).images.any() and deaf.wait(30).images.any()
    assert service.alive
    service.close()


def test_a_network_that_fails_for_one_job_spares_the_others(pipeline: Pipeline) -> None:
    def poison(module, args) -> None:
        if args[0].shape[-1] == 12:
            raise RuntimeError("no such size")

    pipeline.model.unet.register_forward_pre_hook(poison)
    service = Service(pipeline)
    bad, good = service.submit(Job("a", width=24, height=24)), service.submit(Job("a"))
    with pytest.raises(RuntimeError, match="no such size"):
        bad.wait(30)
    good.wait(30)
    service.close()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_halves_the_rows_and_goes_on(pipeline: Pipeline, error: Exception) -> None:
    expected = pipeline.draw(Job("a tree", count=6)).images

    def small(module, args) -> None:
        if len(args[0]) > 3:
            raise error

    pipeline.model.unet.register_forward_pre_hook(small)
    service = Service(pipeline, rows=32)
    found = service.submit(Job("a tree", count=6)).wait(60).images
    service.close()
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert pipeline.engine.max_rows == 3


def test_out_of_memory_while_decoding_decodes_fewer_at_once(pipeline: Pipeline) -> None:
    expected = pipeline.draw(Job("a tree", count=4)).images

    def small(module, args) -> None:
        if len(args[0]) > 1:
            raise MemoryError

    pipeline.model.autoencoder.decoder.register_forward_pre_hook(small)
    service = Service(pipeline)
    found = service.submit(Job("a tree", count=4)).wait(60).images
    service.close()
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert pipeline.max_pictures == 1


def test_jobs_with_adapters_take_turns_of_several_steps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    lora_for(plain, tmp_path / "lora" / "sweet.safetensors")
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[tmp_path])
    jobs = [Job("a tree <lora:sweet:2>", steps=20), Job("a tree", steps=20)]
    alone = [pipeline.draw(job).images for job in jobs]
    assert not np.array_equal(*alone)
    changes: list[tuple] = []
    wear = pipeline.engine.wear
    gate = Gate(pipeline)

    def counted(what) -> None:
        if not changes or changes[-1] != what:
            changes.append(what)
        wear(what)

    pipeline.engine.wear = counted
    service = Service(pipeline)
    tickets = [service.submit(job, user) for user, job in zip("ab", jobs, strict=True)]
    gate.open.set()
    for ticket, expected in zip(tickets, alone, strict=True):
        assert np.abs(ticket.wait(60).images.astype(int) - expected).max() <= 1
    service.close()
    assert 3 <= len(changes) <= 2 * 20 / STEPS_WORN + 2


def test_a_closed_service_takes_nothing_and_leaves_nobody_waiting(pipeline: Pipeline) -> None:
    service = Service(pipeline)
    ticket = service.submit(Job("a tree", steps=900))
    time.sleep(0.05)
    service.close(30)
    with pytest.raises(Cancelled):
        ticket.wait(1)
    assert not service.alive
    with pytest.raises(RuntimeError, match="has ended"):
        service.submit(Job("a"))


def test_something_is_done_between_two_steps_of_a_job(pipeline: Pipeline) -> None:
    service = Service(pipeline)
    long = service.submit(Job("a tree", steps=900))
    assert service.between(lambda: threading.current_thread().name) == "sfumato service"
    with pytest.raises(ZeroDivisionError):
        service.between(lambda: 1 / 0)
    assert long.state != DONE and service.alive
    service.close(30)
    with pytest.raises(RuntimeError, match="has ended"):
        service.between(lambda: None)
