"""The engine drives samplers: it collects the pending queries of many runs and answers them in shared network calls.

A run is one job's coroutine with its guidance. Runs may differ in sampler, step, guidance and prompt; rows that need
the same model at the same latent size go into one call. Owns batching; knows no tasks, prompts or files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import Guidance
from sfumato.diffusion.samplers import Steps
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Model
from sfumato.types import Answer, Cond, Query

Watch = Callable[[Query, Answer], None]


@dataclass
class Run:
    """A sampler at work. `watch` sees each query with its answer, and may cancel the run: its result stays None."""

    steps: Steps
    guidance: Guidance
    watch: Watch | None = None
    query: Query | None = None
    result: Tensor | None = None

    def cancel(self) -> None:
        """End the run where it stands; the engine asks nothing more for it."""
        self.steps.close()
        self.query = None

    def advance(self, answer: Answer | None) -> None:
        """Send an answer (None to start) and keep the next query, or the final x."""
        try:
            self.query = self.steps.send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.query, self.result = None, stop.value


@dataclass(frozen=True)
class _Row:
    """One row of a network call: its run, the place of its cond in the run's guidance, and the picture's index."""

    run: int
    cond: int
    x: Tensor
    sigma: float
    context: Tensor
    vector: Tensor | None

    @property
    def key(self) -> Hashable:
        return self.x.shape, self.context.shape, None if self.vector is None else self.vector.shape


class Engine:
    """Answers queries with one model. `max_rows` bounds the rows of a network call, to bound its memory."""

    def __init__(self, model: Model, max_rows: int = 32) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: 1 or more are needed")
        self.model = model
        self.max_rows = max_rows
        self.denoiser: Denoiser[Cond] = Denoiser(
            self._network, NoiseSchedule(model.family.schedule), model.family.prediction
        )

    def _network(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x = x.to(self.model.dtype, memory_format=torch.channels_last)
        return self.model.unet(x, t, cond.context, cond.vector)

    @torch.inference_mode()
    def drive(self, runs: Sequence[Run]) -> list[Tensor | None]:
        """Advance all runs together to their ends; returns each one's final x, None where it was cancelled."""
        for run in runs:
            run.advance(None)
        while any(run.query is not None for run in runs):
            self.turn(runs)
        return [run.result for run in runs]

    def turn(self, runs: Sequence[Run]) -> None:
        """Answer the pending query of every run once."""
        x0s = self._answer_rows(_rows(runs))
        for index, run in enumerate(runs):
            if run.query is None:
                continue
            parts = [torch.stack(x0s[index, place]) for place in range(len(run.guidance.conds))]
            answer = run.guidance.combine(parts)
            if run.watch:
                run.watch(run.query, answer)
            if run.query is not None:
                run.advance(answer)

    def _answer_rows(self, rows: Iterable[_Row]) -> dict[tuple[int, int], list[Tensor]]:
        """x0 of every row, by (run, cond), pictures in order."""
        alike: dict[Hashable, list[_Row]] = defaultdict(list)
        for row in rows:
            alike[row.key].append(row)
        answers: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for group in alike.values():
            for start in range(0, len(group), self.max_rows):
                part = group[start : start + self.max_rows]
                vectors = [row.vector for row in part if row.vector is not None]
                cond = Cond(torch.stack([row.context for row in part]), torch.stack(vectors) if vectors else None)
                x0 = self.denoiser(torch.stack([row.x for row in part]), [row.sigma for row in part], cond)
                for row, answer in zip(part, x0, strict=True):
                    answers[row.run, row.cond].append(answer)
        return answers


def _rows(runs: Sequence[Run]) -> Iterable[_Row]:
    for index, run in enumerate(runs):
        if run.query is None:
            continue
        for place, cond in enumerate(run.guidance.conds):
            for picture, x in enumerate(run.query.x):
                one = 0 if len(cond.context) == 1 else picture  # a single row of cond serves every picture
                vector = None if cond.vector is None else cond.vector[one]
                yield _Row(index, place, x, run.query.sigma, cond.context[one], vector)
