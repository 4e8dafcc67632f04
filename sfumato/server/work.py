"""One job at work: its task's scenes, their runs, and how far it is. Knows no other job and no queue."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sfumato.engine import Run, is_out_of_memory
from sfumato.memory.estimate import Kernels, unet_bytes
from sfumato.pipeline import Pipeline
from sfumato.server.hints import hint_bytes
from sfumato.server.ticket import DONE, RUNNING, Ticket
from sfumato.tasks.catalogue import task_of
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.scenes import Drawn, Scene, Task, runs_of, size_of
from sfumato.tasks.telling import networks_of
from sfumato.tasks.together import Bar
from sfumato.types import Answer, Query

log = logging.getLogger(__name__)

ROWS_OF_A_PICTURE = 2  # with the prompt and without

Act = Callable[[], None]
Aside = Callable[[Sequence[tuple[Act, int]]], Future[None]]  # acts with the bytes that each takes


class Work:
    """A ticket's task between its scenes. `waiting` are the runs of its scene that have not begun.

    `group` is the same for jobs that wear the same adapters. `aside` makes what a scene needs first: hints that a
    network finds, while others are drawn.
    """

    def __init__(self, ticket: Ticket, pipeline: Pipeline, pictures: Pictures, aside: Aside) -> None:
        self.ticket, self.pipeline, self.pictures = ticket, pipeline, pictures
        self.group = networks_of(ticket.job)
        self.runs: list[Run] = []
        self.waiting: deque[Run] = deque()
        self.weight = 1.0
        self._task: Task | None = None
        self._aside = aside
        self._hints: Future[None] | None = None
        self._scene: Scene | None = None  # whose hints are made
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Prepare the first scene. Whatever is wrong with the job is raised."""
        self.ticket.become(RUNNING)
        self._began = time.perf_counter()
        self._task = task_of(self.ticket.job, self.pipeline.studio(self.pictures))
        self._bar = Bar(self.ticket.tell, self._observe)
        self._send(None)

    def start(self) -> Run:
        """Begin one more picture's run."""
        run = self.waiting.popleft()
        run.advance(None)
        return run

    @property
    def active(self) -> list[Run]:
        """The runs that ask for something now."""
        return [run for run in self.runs if run.query is not None]

    @property
    def rows(self) -> float:
        """How many rows of the model's native size its runs ask for now; larger ones count for more.

        While hints are made, a picture's, so that it has its place.
        """
        if self._scene is not None:
            return ROWS_OF_A_PICTURE * self.weight
        return self.weight * sum(len(run.asked.rows) * len(run.asked.x) for run in self.active if run.asked is not None)

    @property
    def preparing(self) -> bool:
        """Whether there is nothing to do but wait for hints."""
        return self._hints is not None and not self._hints.done()

    def settle(self) -> None:
        """Where the scene is drawn, go on to the next, or to the result. Raises the first error of a run, or a hint."""
        if self._scene is not None:
            if not self.preparing:
                self._draw_scene()
            return
        for run in self.runs:
            if run.error is not None:
                raise run.error
        if not self.waiting and not self.active:
            drawn = torch.cat([_latents(run) for run in self.runs])
            self._send(Drawn(drawn, self.runs[0].sigmas[-1]))

    def close(self) -> None:
        """End it where it stands; hints that are not begun are not made."""
        self._hints = self._scene = None
        for run in self.runs:
            run.cancel()
        self.waiting.clear()
        if self._task is not None:
            self._task.close()

    def _send(self, drawn: Drawn | None) -> None:
        """The task goes on until its next scene, or its pictures."""
        task, extras = self._task, self.pipeline.extras
        assert task is not None
        extras.pictures = self.pictures
        try:
            scene = task.send(drawn)  # type: ignore[arg-type]
            unmade = extras.unmade(scene.job)
        except StopIteration as stop:
            self._finish(stop.value)
            return
        except Exception as error:
            self._again_with_fewer(error)
            return
        self._scene, self.runs, self.weight = scene, [], self._weight_of(scene)
        if unmade:
            self._hints = self._aside(self._finding(scene, unmade))
        else:
            self._draw_scene()

    def _finding(self, scene: Scene, unmade: Mapping[Hashable, Callable[[], Tensor]]) -> list[tuple[Act, int]]:
        """What makes a scene's hints, each with the bytes that its network takes; nothing once the work is closed."""
        height, width = size_of(scene.job)

        def find(name: Hashable, make: Callable[[], Tensor]) -> None:
            if self._scene is scene:
                self.pictures.hints[name] = make()

        return [(partial(find, name, make), hint_bytes((width, height))) for name, make in unmade.items()]

    def _draw_scene(self) -> None:
        """Ready the runs of the scene, whose hints are made."""
        scene, hints, extras = self._scene, self._hints, self.pipeline.extras
        assert scene is not None
        self._scene = self._hints = None
        extras.pictures = self.pictures
        try:
            if hints is not None:
                hints.result()
            runs = runs_of(scene, self.pipeline.model, extras=extras)
        except Exception as error:
            self._again_with_fewer(error)
            return
        self.runs, self.waiting = runs, deque(runs)
        self._bar.follow([(scene, runs)])

    def _again_with_fewer(self, error: Exception) -> None:
        """Begin anew where memory was not enough for what is beside the steps; any other error is raised."""
        if not is_out_of_memory(error) or self.pipeline.max_pictures == 1:
            raise error
        self.pipeline.max_pictures = max(1, self.pipeline.max_pictures // 2)
        log.warning("out of memory beside the steps; %d pictures at once from now on", self.pipeline.max_pictures)
        self.close()
        self.begin()

    def _finish(self, images: np.ndarray) -> None:
        self.runs = []
        ticket, seconds = self.ticket, time.perf_counter() - self._began
        result = self.pipeline.result(ticket.job, images, self.pictures.hashes(ticket.job), seconds)
        ticket.become(DONE, result)

    def _observe(self, run: Run, scene: Scene, which: slice) -> None:
        def watch(query: Query, answer: Answer) -> None:
            if query.window is None:
                self.ticket.see(answer.x0[:1], scene)

        run.watch = watch

    def _weight_of(self, scene: Scene) -> float:
        """How many rows of native size take the memory of one of the scene's."""
        model, job = self.pipeline.model, scene.job
        factor, kernels = model.family.autoencoder.factor, Kernels(model.device)
        height, width = (min(side, job.tile or side) // factor for side in size_of(job))
        native = model.family.size // factor
        own = unet_bytes(model.family.unet, height, width, 1, model.dtype, kernels)
        return max(1.0, own / unet_bytes(model.family.unet, native, native, 1, model.dtype, kernels))


def _latents(run: Run) -> Tensor:
    assert run.result is not None, "a cancelled work is not settled"
    return run.result
