"""The engine drives samplers: it collects what many runs ask and answers it in shared network calls.

A run is one job's coroutine with its guidance. Runs may differ in sampler, step, guidance and prompt; rows that need
the same model in the same state at the same latent size go into one call. A run that fails ends alone. Owns calls; what
a row is, `diffusion/rows.py` says. Knows no tasks, prompts or files.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import Ask, Guidance, Moment, Reply, moment
from sfumato.diffusion.rows import Kept, Row, Tile, cond_of, joined, picture_of, rows_of, stacked
from sfumato.diffusion.samplers import Steps
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Model
from sfumato.models.merging import Merging
from sfumato.models.residuals import Residuals
from sfumato.models.reuse import Deep
from sfumato.types import Answer, Cond, Query

log = logging.getLogger(__name__)

Watch = Callable[[Query, Answer], None]
Wear = Callable[[tuple[Hashable, ...]], None]


@dataclass
class Run:
    """A sampler at work on `sigmas`. `watch` sees each query with its answer, and may cancel the run.

    What is pending is `query`, at the moment `at`, for which its guidance has `asked`. In the end there is a `result`,
    or the `error` that it failed with, or neither where it was cancelled. Each picture has one of the `seeds`, where
    merged cells are chosen by them; `deep` is what its queries keep of the U-Net's deep part, by their windows.
    """

    steps: Steps
    guidance: Guidance
    sigmas: Sequence[float]
    watch: Watch | None = None
    query: Query | None = None
    at: Moment | None = None
    asked: Ask | None = None
    result: Tensor | None = None
    error: Exception | None = None
    seeds: Sequence[int] = ()
    deep: dict[Tile | None, Kept] = field(default_factory=dict)

    def cancel(self) -> None:
        """End the run where it stands; the engine asks nothing more for it."""
        self.steps.close()
        self.query = self.asked = None

    def fail(self, error: Exception) -> None:
        """End the run with an error; of several the first is kept."""
        self.error = self.error or error
        self.cancel()

    def advance(self, answer: Answer | None) -> None:
        """Send an answer (None to start) and keep the next query, or the final x. An error ends the run."""
        self.query = self.asked = None
        try:
            self.query = self.steps.send(answer)  # type: ignore[arg-type]
            self.at = moment(self.query, self.sigmas)
            self.asked = Ask(self.query.x, self.guidance.rows(self.at), partial(self.guidance.combine, self.at))
        except StopIteration as stop:
            self.result = stop.value
            self.deep.clear()
        except Exception as error:  # whatever it is, other runs go on
            self.fail(error)

    def settle(self, replies: Sequence[Reply]) -> None:
        """Take the replies to what was asked: ask once more, or go on with the answer. An error ends the run."""
        assert self.query is not None and self.asked is not None
        try:
            found = self.asked.then(replies)
            if isinstance(found, Ask):
                self.asked = found
                return
            if self.watch:
                self.watch(self.query, found)
        except Exception as error:
            self.fail(error)
            return
        if self.query is not None:  # not cancelled
            self.advance(found)


@dataclass(frozen=True)
class _Told:
    """What one network call is told, and where it leaves the attention maps that its state asks for."""

    cond: Cond
    maps: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    deep: Deep | None = None
    merging: Merging | None = None


class Engine:
    """Answers queries with one model. `max_rows` bounds the rows of a network call, to bound its memory.

    Where memory is not enough all the same, `max_rows` becomes half of what was asked, and the call is made again.

    `wear` puts exactly these adapters on the model's networks; without it rows must want none.
    """

    def __init__(self, model: Model, max_rows: int = 32, wear: Wear | None = None) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: 1 or more are needed")
        self.model = model
        self.max_rows = max_rows
        self.wear = wear
        self.denoiser: Denoiser[_Told] = Denoiser(
            self._network, NoiseSchedule(model.family.schedule), model.family.prediction
        )

    def _network(self, x: Tensor, t: Tensor, told: _Told) -> Tensor:
        cond = told.cond
        if cond.concat is not None:
            x = torch.cat([x, cond.concat.to(x)], dim=1)
        x = x.to(self.model.dtype, memory_format=torch.channels_last)
        unet, arguments = self.model.unet, (x, t, cond.context, cond.vector, cond.state, told.maps, told.cross)
        if not cond.steered:
            return unet(*arguments, deep=told.deep, merging=told.merging)
        with ExitStack() as around:
            for steer in cond.steered:
                around.enter_context(steer.network.around(unet, steer.hint.to(x.dtype), steer.weight))
            return unet(*arguments, self._residuals(x, t, cond), told.deep, told.merging)

    def _residuals(self, x: Tensor, t: Tensor, cond: Cond) -> Residuals:
        """What all that steers adds, together."""
        x = x[:, : self.model.family.autoencoder.latent_channels]
        total = Residuals()
        for steer in cond.steered:
            found = steer.network.residuals(x, t, cond.context, cond.vector, steer.hint.to(x.dtype))
            total = total if found is None else total + found.scaled(steer.weight)
        return total

    @torch.inference_mode()
    def drive(self, runs: Sequence[Run]) -> list[Tensor | None]:
        """Advance all runs together to their ends; returns each one's final x, None where it was cancelled.

        Raises the first run's error of those that failed, once the others have ended; their results stand in them.
        """
        self.finish(runs)
        for run in runs:
            if run.error is not None:
                raise run.error
        return [run.result for run in runs]

    @torch.inference_mode()
    def finish(self, runs: Sequence[Run]) -> None:
        """Advance all runs together to their ends; what has become of each, a result or an error, stands in it."""
        for run in runs:
            run.advance(None)
        while any(run.query is not None for run in runs):
            self.turn(runs)

    def turn(self, runs: Sequence[Run]) -> None:
        """Answer what every run asks, once. A run that fails has its `error` and ends; the others go on.

        Once none of these runs asks more, the U-Net keeps no texts of theirs.
        """
        replies = self._replies(runs)
        for index, run in enumerate(runs):
            if run.asked is not None:
                run.settle([replies[index, place] for place in range(len(run.asked.rows))])
        if self.model.unet.room is not None and all(run.query is None for run in runs):
            self.model.unet.room.forget_texts()

    def _replies(self, runs: Sequence[Run]) -> dict[tuple[int, int], Reply]:
        """The reply to every row asked, by (run, place); runs whose call failed or was not finite have ended."""
        alike: dict[Hashable, list[Row]] = defaultdict(list)
        for row in _rows(runs, self.model.family.autoencoder.factor):
            alike[row.key].append(row)
        found: dict[tuple[int, int], list[Reply]] = defaultdict(list)
        answered: list[Row] = []
        finite: list[Tensor] = []
        for group in alike.values():
            start = 0
            while start < len(group):
                part = group[start : start + self.max_rows]
                try:
                    reply, deep = self._call(part)
                except Exception as error:
                    if is_out_of_memory(error) and len(part) > 1:
                        self._halve(len(part))
                        continue
                    start += len(part)
                    for index in {row.run for row in part}:
                        runs[index].fail(error)
                    continue
                start += len(part)
                answered += part
                finite.append(reply.x0.isfinite().flatten(1).all(dim=1))
                for place, row in enumerate(part):
                    found[row.run, row.place].append(picture_of(reply, place))
                    _keep(row, deep, place)
        for row, good in zip(answered, torch.cat(finite).tolist() if finite else [], strict=True):
            if not good:
                runs[row.run].fail(self._not_finite(runs[row.run]))
        return {key: joined(pictures) for key, pictures in found.items() if runs[key[0]].asked is not None}

    def _halve(self, rows: int) -> None:
        """Ask for half of `rows` at once from now on, which were too many for the memory."""
        self.max_rows = max(1, rows // 2)
        log.warning("out of memory with %d rows in a network call; %d at most from now on", rows, self.max_rows)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _call(self, rows: Sequence[Row]) -> tuple[Reply, Deep | None]:
        """What the network answers to rows alike, each a row of the reply, and what was kept of its deep part."""
        cond = cond_of(rows)
        if self.wear is not None:
            self.wear(rows[0].worn)
        elif rows[0].worn:
            raise ValueError("adapters: this engine has nothing to put them on with")
        told = _Told(cond, deep=_deep(rows), merging=_merging(rows))
        x0 = self.denoiser(torch.stack([row.x for row in rows]), [row.sigma for row in rows], told)
        looked = cond.state is not None and cond.state.cross
        return Reply(x0, told.maps[0] if told.maps else None, tuple(told.cross) if looked else None), told.deep

    def _not_finite(self, run: Run) -> ValueError:
        assert run.at is not None
        where = f"step {run.at.step + 1} of {max(1, len(run.sigmas) - 1)} (sigma {run.at.sigma:.3g})"
        full = self.model.dtype == torch.float32
        mend = "x or the weights are not, or are too large" if full else "'full' may mend it"
        return ValueError(f"precision={self.model.precision!r}: the network's answer is not finite at {where}; {mend}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough; on a CPU it is a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _rows(runs: Sequence[Run], factor: int) -> Iterator[Row]:
    """What every run asks, row by row."""
    for index, run in enumerate(runs):
        if run.query is not None and run.asked is not None:
            assert run.at is not None
            yield from rows_of(index, run.query, run.at, run.asked, run.seeds, run.deep, factor)


def _deep(rows: Sequence[Row]) -> Deep | None:
    """What a call of rows alike does with the deep part."""
    given = stacked([row.given for row in rows])
    if given is not None:
        assert rows[0].reuse is not None
        return Deep(depth=rows[0].reuse[1], given=given.contiguous(memory_format=torch.channels_last))
    wanted = frozenset(row.reuse[1] for row in rows if row.reuse is not None)
    return Deep(wanted) if wanted else None


def _merging(rows: Sequence[Row]) -> Merging | None:
    """How a call of rows alike merges cells."""
    ratio = 0.0 if rows[0].state is None else rows[0].state.tome
    return Merging(ratio, [torch.Generator().manual_seed(row.seed) for row in rows]) if ratio else None


def _keep(row: Row, deep: Deep | None, place: int) -> None:
    """Keep what the deep part made of a row, the call's `place`-th, where it is to be kept."""
    if row.kept is not None and row.reuse is not None and deep is not None:
        row.kept.deep[row.slot] = deep.kept[row.reuse[1]][place].clone()
