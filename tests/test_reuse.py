"""Feature reuse: when the deep part is computed, whose features are taken, what merges, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.engine import Engine, Run
from sfumato.models.reuse import Deep, reuse_of
from sfumato.pipeline import Pipeline, recipe
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete, job_from_dict, job_to_dict
from sfumato.types import Control, Job
from sfumato.weights.checkpoint import Model, load_model

JOB = Job("a red apple", "a dog", sampler="euler", steps=6, guidance=3.0, seed=1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


@contextmanager
def counted(model: Model) -> Iterator[list[tuple[int, bool]]]:
    """(rows, whether the deep part was computed) of each call of the U-Net."""
    calls: list[tuple[int, bool]] = []
    hooks = [
        model.unet.register_forward_pre_hook(lambda module, args: calls.append((len(args[0]), False))),
        model.unet.middle_block.register_forward_pre_hook(
            lambda module, args: calls.append((calls.pop()[0], True)) and None
        ),
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def start(model: Model, job: Job) -> Run:
    return txt2img.start(complete(job, model.family), model)


def drive(model: Model, jobs: Sequence[Job], max_rows: int = 32) -> tuple[list[Tensor], list[tuple[int, bool]]]:
    with counted(model) as calls:
        return Engine(model, max_rows).drive([start(model, job) for job in jobs]), calls


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("text, found", [("2", (2, 1)), ("3:2", (3, 2)), ("10:11", (10, 11))])
def test_what_is_asked_for(text: str, found: tuple[int, int]) -> None:
    assert reuse_of(text) == found


@pytest.mark.parametrize("text", ["", "1", "0:1", "2:0", "2:", "a", "2:1:1", "2.5"])
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(ValueError, match="reuse="):
        reuse_of(text)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_given_back_at_once_it_is_the_same_answer(model: Model, depth: int) -> None:
    """A call that is given what it would compute answers alike, and without the weights of the deep part."""
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 7, 16)
    with torch.inference_mode():
        exact = model.unet(x, t, context)
        deep = Deep(frozenset({depth}))
        assert torch.equal(model.unet(x, t, context, deep=deep), exact)
        with counted(model) as calls:
            again = model.unet(x, t, context, deep=Deep(depth=depth, given=deep.kept[depth]))
        assert calls == [(2, False)]
        assert torch.equal(again, exact)
        other = model.unet(x, t, context, deep=Deep(depth=depth, given=2 * deep.kept[depth]))
        assert distance(other, exact) > 1e-3


def test_a_depth_without_a_deep_part_is_refused(model: Model) -> None:
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 7, 16)
    with pytest.raises(ValueError, match="depth of 4; this U-Net has depths 1 to 3"):
        model.unet(x, t, context, deep=Deep(frozenset({4})))


@pytest.mark.parametrize("every", [2, 3])
def test_every_nth_call_is_whole(model: Model, every: int) -> None:
    [found], calls = drive(model, [replace(JOB, reuse=f"{every}")])
    assert calls == [(2, number % every == 0) for number in range(6)]
    [exact], _ = drive(model, [JOB])
    assert 1e-4 < distance(found, exact) < 0.5


def test_a_second_order_sampler_counts_its_calls(model: Model) -> None:
    _, calls = drive(model, [replace(JOB, sampler="heun", steps=3, reuse="2:2")])
    assert [whole for _, whole in calls] == [True, False, True, False, True]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_a", "restart", "unipc"])
def test_samplers_draw_with_it(model: Model, sampler: str) -> None:
    """Batched and alone the pictures are the same, and the picture is the exact one's neighbour."""
    job = replace(JOB, sampler=sampler, reuse="2:2", steps=8)
    together, _ = drive(model, [job, replace(job, seed=5)])
    alone = [drive(model, [each])[0][0] for each in (job, replace(job, seed=5))]
    for one, other in zip(together, alone, strict=True):
        assert distance(one, other) < 1e-5
    assert distance(alone[0], drive(model, [replace(job, reuse=None)])[0][0]) < 0.5


MIXED = (
    replace(JOB, reuse="2"),
    replace(JOB, seed=7, reuse="3:2", sampler="heun", steps=4),
    replace(JOB, seed=9, steps=5),
    replace(JOB, seed=3, reuse="2", guidance=1.0, count=2),
    replace(JOB, seed=4, reuse="2:3", pag=2.0, guidance_start=0.3),
    replace(JOB, prompt="[a cat:a dog:3]", seed=6, reuse="4"),
    replace(JOB, seed=8, reuse="2", freeu=(1.1, 1.2, 0.9, 0.2)),
    replace(JOB, seed=8, reuse="2", seamless="x"),
)


@pytest.mark.parametrize("max_rows", [32, 3])
def test_jobs_together_equal_jobs_alone(model: Model, max_rows: int) -> None:
    together, shared = drive(model, MIXED, max_rows)
    for job, one in zip(MIXED, together, strict=True):
        assert distance(one, drive(model, [job])[0][0]) < 1e-5, job
    if max_rows == 32:
        assert max(rows for rows, whole in shared if whole) >= 8  # jobs that keep share calls with exact ones
        assert max(rows for rows, whole in shared if not whole) >= 4


def test_the_test_would_see_anothers_features(model: Model) -> None:
    """Features of another prompt or seed give latents that differ far more than the tolerance above."""
    found = [drive(model, [replace(job, reuse="3")])[0][0] for job in (JOB, replace(JOB, seed=2))]
    assert distance(*found) > 1e-2


def test_a_changed_prompt_is_computed_anew(model: Model) -> None:
    """The row whose prompt changes in the third step is whole there, though its turn has not come."""
    _, calls = drive(model, [replace(JOB, prompt="[a cat:a dog:2]", reuse="6", guidance=1.0)])
    assert [whole for _, whole in calls] == [True, False, True, False, False, False]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"reuse": "2", "guidance_thin": 100.0}, ["2 whole", "1", "2 whole", "1", "2 whole", "1"]),
        ({"reuse": "3", "guidance_thin": 100.0}, ["2 whole", "1", "2", "1 whole", "2 whole", "1"]),
        ({"reuse": "2", "guidance_start": 0.15}, ["1 whole", "2 whole", "2", "2 whole", "2", "2 whole"]),
        ({"reuse": "3", "guidance_end": 0.5}, ["2 whole", "2", "2", "1 whole", "1", "1"]),
        ({"reuse": "3", "prompt": "[a cat|a dog]"}, ["2 whole"] * 6),
    ],
)
def test_guidance_compares_features_of_one_step(model: Model, fields: dict[str, object], expected: list[str]) -> None:
    """Of rows that come and go: where one must be computed whole, all of its query are, so in one call."""
    [latents], calls = drive(model, [replace(JOB, **fields)])
    assert [f"{rows}{' whole' if whole else ''}" for rows, whole in calls] == expected
    assert bool(latents.isfinite().all())


def test_tiles_keep_features_of_their_own(model: Model) -> None:
    job = replace(JOB, width=32, height=16, tile=16, reuse="2", guidance=1.0, steps=4)
    pipe = Pipeline(model)
    with counted(model) as calls:
        result = pipe.draw(job)
    tiles = len(calls) // 4
    assert tiles > 1
    assert [whole for _, whole in calls] == ([True] * tiles + [False] * tiles) * 2
    assert np.array_equal(result.images, pipe.draw(job).images)


def test_the_recipe_holds_it(model: Model) -> None:
    pipe = Pipeline(model)
    result = pipe.draw(replace(JOB, reuse="3:2"))
    told = recipe(result, 0)["job"]
    assert told["reuse"] == "3:2"
    assert np.array_equal(pipe.draw(job_from_dict(told)).images, result.images)
    assert "reuse" not in job_to_dict(JOB)


def test_what_is_kept_is_let_go(model: Model) -> None:
    run = start(model, replace(JOB, reuse="3"))
    engine = Engine(model)
    run.advance(None)
    with torch.inference_mode():
        engine.turn([run])
        assert [len(kept.deep) for kept in run.deep.values()] == [2]
        while run.query is not None:
            engine.turn([run])
    assert run.result is not None and not run.deep


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"reuse": "1"}, "reuse='1'"),
        ({"reuse": "2:9"}, "depths 1 to 3"),
        ({"reuse": 2}, "reuse=2: text"),
        ({"reuse": "2", "sag": 1.0}, "sag=1.0: it does not go with reuse='2'"),
        ({"reuse": "2", "image": "x.png", "controls": (Control("edges", "x.png"),)}, "does not go with reuse='2'"),
    ],
)
def test_what_is_refused(model: Model, fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        complete(replace(JOB, **fields), model.family, (16, 16))
