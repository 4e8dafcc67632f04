"""One job at work: its task's scenes, their runs, and how far it is. Knows no other job and no queue."""

from __future__ import annotations

import logging
import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from sfumato.engine import Run, is_out_of_memory
from sfumato.memory.estimate import Kernels, unet_bytes
from sfumato.pipeline import Pipeline
from sfumato.server.ticket import DONE, RUNNING, Ticket
from sfumato.tasks.catalogue import task_of
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.scenes import Drawn, Scene, Task, runs_of, size_of
from sfumato.tasks.telling import networks_of
from sfumato.tasks.together import Bar
from sfumato.types import Answer, Query

log = logging.getLogger(__name__)


class Work:
    """A ticket's task between its scenes. `waiting` are the runs of its scene that have not begun.

    `group` is the same for jobs that wear the same adapters.
    """

    def __init__(self, ticket: Ticket, pipeline: Pipeline, pictures: Pictures) -> None:
        self.ticket, self.pipeline, self.pictures = ticket, pipeline, pictures
        self.group = networks_of(ticket.job)
        self.runs: list[Run] = []
        self.waiting: deque[Run] = deque()
        self.weight = 1.0
        self._task: Task | None = None
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
        """How many rows of the model's native size its runs ask for now; larger ones count for more."""
        return self.weight * sum(len(run.asked.rows) * len(run.asked.x) for run in self.active if run.asked is not None)

    def settle(self) -> None:
        """Where the scene is drawn, go on to the next, or to the result. Raises the first error of a run."""
        for run in self.runs:
            if run.error is not None:
                raise run.error
        if not self.waiting and not self.active:
            drawn = torch.cat([_latents(run) for run in self.runs])
            self._send(Drawn(drawn, self.runs[0].sigmas[-1]))

    def close(self) -> None:
        """End it where it stands."""
        for run in self.runs:
            run.cancel()
        self.waiting.clear()
        if self._task is not None:
            self._task.close()

    def _send(self, drawn: Drawn | None) -> None:
        """The task goes on until its next scene, or its pictures."""
        assert self._task is not None
        self.pipeline.extras.pictures = self.pictures
        try:
            scene = self._task.send(drawn)  # type: ignore[arg-type]
            runs = runs_of(scene, self.pipeline.model, extras=self.pipeline.extras)
        except StopIteration as stop:
            self._finish(stop.value)
            return
        except Exception as error:
            if not is_out_of_memory(error) or self.pipeline.max_pictures == 1:
                raise
            self.pipeline.max_pictures = max(1, self.pipeline.max_pictures // 2)
            log.warning("out of memory beside the steps; %d pictures at once from now on", self.pipeline.max_pictures)
        else:
            self.runs, self.waiting, self.weight = runs, deque(runs), self._weight_of(scene)
            self._bar.follow([(scene, runs)])
            return
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
