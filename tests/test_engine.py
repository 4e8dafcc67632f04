"""The engine: runs driven together equal runs driven alone and share network calls; seeds, cancelling, guidance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.diffusion.guidance import ClassifierFree, Moment
from sfumato.diffusion.noise import SeededNoise
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.engine import Engine, Run, Watch
from sfumato.pipeline import Pipeline
from sfumato.tasks import scenes, txt2img
from sfumato.tasks.checks import complete
from sfumato.types import Answer, Cond, Job, Query
from sfumato.weights.checkpoint import Model, load_model

JOBS = (
    Job("a red apple", sampler="dpmpp_2m", steps=5, guidance=4.0, seed=1, count=2),
    Job("a blue cat", "a dog", sampler="euler_a", steps=4, guidance=2.0, seed=7),
    Job("a tree", sampler="heun", steps=3, guidance=1.0, seed=3, count=3),
    Job("", sampler="plms", steps=6, guidance=7.5, seed=11),
    Job("a house", "rain", sampler="ddim", eta=0.5, steps=2, guidance=0.0, seed=5),
    Job("a red apple", sampler="euler", schedule="karras", steps=4, guidance=3.0, seed=1, width=24, height=32),
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


@contextmanager
def network_calls(model: Model) -> Iterator[list[int]]:
    """The number of rows of each call of the U-Net."""
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


def start(job: Job, model: Model, watch: Watch | None = None) -> Run:
    return txt2img.start(complete(job, model.family), model, watch)


def plain(run: Run) -> ClassifierFree:
    """The guidance of a run whose prompts stay the same, with a Cond for each."""
    guidance = run.guidance
    assert isinstance(guidance, ClassifierFree)
    positive, *negative = guidance.rows(Moment(0, 1.0, 0.0, torch.empty(0)))
    return ClassifierFree(positive, negative[0] if negative else None, guidance.scale)


def drive(model: Model, jobs: Sequence[Job], max_rows: int = 32) -> tuple[list[Tensor], list[int]]:
    """The latents of jobs driven together, and the rows of each network call."""
    with network_calls(model) as rows:
        return Engine(model, max_rows).drive([start(job, model) for job in jobs]), rows


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).abs().max() / other.abs().max()) < 1e-4


def test_jobs_together_equal_jobs_alone_and_share_calls(model: Model) -> None:
    together, shared = drive(model, JOBS)
    alone = [drive(model, [job]) for job in JOBS]
    for one, ([other], _) in zip(together, alone, strict=True):
        assert_same(one, other)
    assert sum(shared) == sum(sum(rows) for _, rows in alone)  # no row is lost or computed twice
    of_size = [sum(len(rows) for _, rows in alone[:-1]), len(alone[-1][1])]
    longest = max(len(rows) for _, rows in alone[:-1])
    assert len(shared) == longest + of_size[1] < sum(of_size)  # one call a turn for each size of latents


def test_the_test_would_see_a_mixed_up_row(model: Model) -> None:
    """Other prompts, seeds, guidance and samplers give latents that differ far more than the tolerance above."""
    base = Job("a red apple", "a dog", sampler="ddim", steps=4, guidance=3.0, seed=1)
    [latents], _ = drive(model, [base])
    others = ({"prompt": "a tree"}, {"negative": ""}, {"seed": 2}, {"guidance": 4.0}, {"sampler": "euler"})
    for changed in others:
        [other], _ = drive(model, [replace(base, **changed)])
        assert float((latents - other).abs().max() / other.abs().max()) > 1e-3, changed


@pytest.mark.parametrize("max_rows", [1, 3, 5])
def test_max_rows_splits_calls_and_changes_nothing(model: Model, max_rows: int) -> None:
    whole, all_rows = drive(model, JOBS)
    parts, rows = drive(model, JOBS, max_rows)
    for one, other in zip(parts, whole, strict=True):
        assert_same(one, other)
    assert max(rows) == max_rows < max(all_rows)
    assert sum(rows) == sum(all_rows)


def test_max_rows_must_be_positive(model: Model) -> None:
    with pytest.raises(ValueError, match="max_rows=0"):
        Engine(model, max_rows=0)


@pytest.mark.parametrize("guidance, rows", [(1.0, [2] * 4), (1.5, [4] * 4), (0.0, [4] * 4)])
def test_guidance_of_1_needs_one_row_a_picture(model: Model, guidance: float, rows: list[int]) -> None:
    assert drive(model, [Job("a cat", sampler="euler", steps=4, guidance=guidance, count=2)])[1] == rows


def test_guidance_of_1_is_the_limit_of_guidance(model: Model) -> None:
    near, at = (
        drive(model, [Job("a cat", "a dog", sampler="euler", steps=4, guidance=scale)])[0][0]
        for scale in (1.0 + 1e-6, 1.0)
    )
    assert_same(near, at)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_picture_i_of_a_batch_is_picture_i_alone(model: Model, sampler: str) -> None:
    pipeline = Pipeline(model)
    batch = pipeline("a red apple", sampler=sampler, steps=4, seed=40, count=3)
    assert batch.seeds == (40, 41, 42)
    assert batch.images.std() > 1
    for index, seed in enumerate(batch.seeds):
        alone = pipeline("a red apple", sampler=sampler, steps=4, seed=seed)
        assert np.abs(batch.images[index].astype(int) - alone.images[0]).max() <= 1
    assert np.abs(batch.images[0].astype(int) - batch.images[1]).max() > 1


def test_noise_of_a_seed_does_not_depend_on_its_neighbours() -> None:
    shape = (2, 3, 5)
    batch, alone, other = SeededNoise([4, 5, 6], shape), SeededNoise([5], shape), SeededNoise([6, 5], shape)
    draws = [(batch(), alone(), other()) for _ in range(3)]
    for of_batch, of_alone, of_other in draws:
        assert of_batch.shape == (3, *shape)
        assert torch.equal(of_batch[1], of_alone[0])
        assert torch.equal(of_batch[1:].flip(0), of_other)
        assert not torch.equal(of_batch[0], of_batch[1])
    assert not torch.equal(draws[0][1], draws[1][1])


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    drawn = SeededNoise(range(100), (4, 16, 16))()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(float(drawn.mean())) < 5 / drawn.numel() ** 0.5
    assert abs(float(drawn.var()) - 1) < 5 * (2 / drawn.numel()) ** 0.5


def test_drawing_leaves_the_global_generator_alone(model: Model) -> None:
    state = torch.random.get_rng_state()
    drive(model, JOBS)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_closing_a_run_cancels_it_and_no_other(model: Model) -> None:
    asked: list[float] = []

    def cancel_after_two(query: Query, answer: Answer) -> None:
        asked.append(query.sigma)
        if len(asked) == 2:
            cancelled.cancel()

    cancelled = start(replace(JOBS[0], steps=9), model, cancel_after_two)
    going_on = start(JOBS[1], model)
    with network_calls(model) as rows:
        Engine(model).drive([cancelled, going_on])
    assert len(asked) == 2
    assert cancelled.query is None
    assert cancelled.result is None
    assert rows == [6, 6, 2, 2]  # two pictures and one, with their negatives, then the one
    [alone], _ = drive(model, [JOBS[1]])
    assert going_on.result is not None
    assert_same(going_on.result, alone)


def test_a_run_closed_before_it_begins_asks_nothing(model: Model) -> None:
    run = start(JOBS[0], model)
    run.steps.close()
    with network_calls(model) as rows:
        Engine(model).drive([run])
    assert rows == []
    assert run.result is None


def test_a_run_can_join_others_half_way(model: Model) -> None:
    """`turn` is all that a server needs: a late job rides along and comes out the same."""
    engine, early, late = Engine(model), start(JOBS[0], model), start(JOBS[1], model)
    with torch.inference_mode(), network_calls(model) as rows:
        early.advance(None)
        engine.turn([early])
        engine.turn([early])
        late.advance(None)
        while early.query is not None or late.query is not None:
            engine.turn([early, late])
    assert rows == [4, 4, 6, 6, 6, 2]
    for run, job in ((early, JOBS[0]), (late, JOBS[1])):
        assert run.result is not None
        assert_same(run.result, drive(model, [job])[0][0])


def test_watch_sees_every_query_with_its_answer(model: Model) -> None:
    seen: list[tuple[Query, Answer]] = []
    job = complete(JOBS[0], model.family)
    Engine(model).drive([txt2img.start(job, model, lambda query, answer: seen.append((query, answer)))])
    assert [query.sigma for query, _ in seen] == scenes.sigmas_of(job, model)[:-1]
    for query, answer in seen:
        assert answer.x0.shape == query.x.shape == (2, 4, 8, 8)
        assert answer.uncond is not None


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_cond_has_one_row_for_all_pictures_or_one_for_each(model: Model, num_rows: int) -> None:
    """The second row is another prompt's: then picture 1 is that prompt's."""
    first, second = (replace(JOBS[0], prompt=prompt) for prompt in ("a red apple", "a blue cat"))
    of_first, of_second = (drive(model, [job])[0][0] for job in (first, second))
    run, plan = start(first, model), plain(start(first, model))
    contexts = [plan.positive.context, plain(start(second, model)).positive.context]
    run.guidance = replace(plan, positive=Cond(torch.cat(contexts[:num_rows])))
    [latents] = Engine(model).drive([run])
    assert_same(latents[0], of_first[0])
    assert_same(latents[1], (of_first, of_second)[num_rows - 1][1])
    assert float((of_first - of_second).abs().max()) > 1e-2
