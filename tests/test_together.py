"""Many jobs drawn by one call: who fails, fails alone, at whatever point; or the first error ends all, at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfumato.engine import Run
from sfumato.pipeline import Pipeline
from sfumato.tasks.scenes import Scene
from sfumato.types import Hires, Job, Result
from tests.test_engine import network_calls

GOOD = (
    Job("a red apple", steps=4, seed=1, count=2),
    Job("a fish", steps=3, seed=2, hires=Hires(scale=1.5)),
    Job("a cat", "a dog", sampler="euler_a", steps=5, seed=3),
)
FALLING = Job("it falls", steps=4, seed=4, hires=Hires(scale=1.5))


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])


def trip(scene_number: int):
    """An observer in whose sight FALLING fails in the second step of its scene of that number, from 0."""
    seen: list[Run] = []

    def observe(run: Run, scene: Scene, which: slice) -> None:
        if scene.job.prompt != FALLING.prompt:
            return
        seen.append(run)
        if len(seen) == scene_number + 1:
            left = iter([None])

            def watch(query, answer) -> None:
                if next(left, run) is run:
                    raise ArithmeticError(f"scene {scene_number}")

            run.watch = watch

    return observe


def near(found: Result | Exception, alone: Result) -> bool:
    assert isinstance(found, Result), found
    return found.images.shape == alone.images.shape and (
        int(np.abs(found.images.astype(int) - alone.images).max()) <= 1 and found.seeds == alone.seeds
    )


@pytest.mark.parametrize("scene", [0, 1])
def test_jobs_that_fail_leave_the_others_as_they_are_alone(pipe: Pipeline, scene: int) -> None:
    alone = [pipe.draw(job) for job in GOOD]
    jobs = [
        GOOD[0], Job("a", steps=0), FALLING, GOOD[1], Job("a <lora:nothing:1>"), Job("a", image="none.png"), GOOD[2]
    ]  # fmt: skip
    told: list[tuple[int, int]] = []
    found = pipe.draw_each(jobs, lambda done, total: told.append((done, total)), observe=trip(scene))
    assert [near(found[at], each) for at, each in zip((0, 3, 6), alone, strict=True)] == [True] * 3
    errors = {at: str(found[at]) for at in (1, 2, 4, 5)}
    assert errors[1].startswith("steps=0: ") and errors[2] == f"scene {scene}"
    assert "nothing" in errors[4] and "none.png" in errors[5]
    assert isinstance(found[2], ArithmeticError)
    assert all(0 < done <= total for done, total in told)
    assert not pipe.draw_each([])
    assert near(pipe.draw_many([GOOD[0]])[0], alone[0]), "nothing is left of those that failed"


def test_the_first_error_ends_all_where_nobody_asked_for_each(pipe: Pipeline) -> None:
    with network_calls(pipe.model) as calls:
        with pytest.raises(ValueError, match="^steps=0: "):
            pipe.draw_many([GOOD[0], Job("a", steps=0)])
        assert not calls, "what is wrong in itself is told before anything is drawn"
        with pytest.raises(ArithmeticError, match="scene 0"):
            pipe.draw_many([GOOD[1], FALLING], observe=trip(0))
        assert len(calls) == GOOD[1].steps, "no second pass is begun"
