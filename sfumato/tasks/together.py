"""Tasks performed together: the scenes that they ask for at the same time are drawn in shared network calls.

Counts their steps, and holds the errors of those that fail apart. Knows no job's fields, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from sfumato.engine import Engine, Run, Watch
from sfumato.tasks.extras import Extras
from sfumato.tasks.scenes import Drawn, Scene, Task, runs_of
from sfumato.tasks.telling import networks_of
from sfumato.types import Answer, Query

Progress = Callable[[int, int], None]
Observe = Callable[[Run, Scene, slice], None]
Failed = dict[int, Exception]


@contextmanager
def apart(number: int, failed: Failed | None) -> Iterator[None]:
    """Put the error of a job among those that `failed`, so that others go on; where there is no such place, raise."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[number] = error


def perform(
    tasks: Mapping[int, Task], bar: Bar, engine: Engine, extras: Extras, failed: Failed | None = None
) -> dict[int, np.ndarray]:
    """The pictures (B, H, W, 3) uint8 of tasks that have not begun, by their numbers.

    The errors of tasks that fail go to `failed`, and the others go on; where that is None the first is raised.
    """
    images: dict[int, np.ndarray] = {}
    asked: dict[int, Scene] = {}
    drive = engine.drive if failed is None else engine.finish

    def advance(number: int, drawn: Drawn | None) -> None:
        try:
            asked[number] = tasks[number].send(drawn)  # type: ignore[arg-type]
        except StopIteration as stop:
            images[number] = stop.value

    for number in tasks:
        with apart(number, failed):
            advance(number, None)
    while asked:
        scenes, asked = asked, {}
        groups: dict[int, list[Run]] = {}
        for number, scene in scenes.items():
            with apart(number, failed):
                groups[number] = runs_of(scene, engine.model, extras=extras)
        bar.follow([(scenes[number], runs) for number, runs in groups.items()])
        alike: dict[Hashable, list[Run]] = {}
        for number, runs in groups.items():
            alike.setdefault(networks_of(scenes[number].job), []).extend(runs)
        for runs in alike.values():  # so that adapters change between these and not at every step
            drive(runs)
        for number, runs in groups.items():
            with apart(number, failed):
                advance(number, Drawn(torch.cat([_result_of(run) for run in runs]), runs[0].sigmas[-1]))
    return images


def _result_of(run: Run) -> Tensor:
    if run.error is not None:
        raise run.error
    assert run.result is not None, "nobody cancels these runs"
    return run.result


class Bar:
    """Counts the steps that runs have left behind, each for as many pictures as the run has."""

    def __init__(self, progress: Progress | None, observe: Observe | None = None) -> None:
        self.progress, self.observe = progress, observe
        self.done = self.total = 0

    def follow(self, scenes: Sequence[tuple[Scene, Sequence[Run]]]) -> None:
        """Watch the runs of scenes that are about to begin."""
        self.total = self.done + sum(scene.steps for scene, _ in scenes)
        for scene, runs in scenes:
            for index, run in enumerate(runs):
                if self.observe is not None:
                    self.observe(run, scene, slice(index, index + 1) if len(runs) > 1 else slice(0, scene.job.count))
                run.watch = self._watch_of(run)

    def _watch_of(self, run: Run) -> Watch:
        seen, inner = 0, run.watch

        def watch(query: Query, answer: Answer) -> None:
            nonlocal seen
            assert run.at is not None
            step = run.at.step + 1
            self.done += max(0, step - seen) * len(query.x)
            seen = max(seen, step)
            if self.progress is not None:
                self.progress(min(self.done, self.total), self.total)
            if inner is not None:
                inner(query, answer)

        return watch
