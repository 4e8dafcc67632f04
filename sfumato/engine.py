"""The engine drives samplers: it collects what many runs ask and answers it in shared network calls.

A run is one job's coroutine with its guidance. Runs may differ in sampler, step, guidance and prompt; rows that need
the same model in the same state at the same latent size go into one call. A run that fails ends alone. Owns batching;
knows no tasks, prompts or files.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import Ask, Guidance, Moment, Reply, moment
from sfumato.diffusion.samplers import Steps
from sfumato.diffusion.samplers.tiled import crop
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Model
from sfumato.models.merging import Merging
from sfumato.models.residuals import Residuals
from sfumato.models.reuse import Deep
from sfumato.types import Answer, Cond, NetState, Query, Steer

log = logging.getLogger(__name__)

Watch = Callable[[Query, Answer], None]
Wear = Callable[[tuple[Hashable, ...]], None]


@dataclass
class _Kept:
    """What a U-Net's deep part made of the rows of one query, by their slots, `age` queries ago: see `_Row.slot`.

    `owners` are the contexts of these rows, held so that their ids stay their own.
    """

    age: int = 0
    deep: dict[Hashable, Tensor] = field(default_factory=dict)
    owners: list[Tensor] = field(default_factory=list)


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
    deep: dict[Hashable, _Kept] = field(default_factory=dict)

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
class _Row:
    """One row of a network call: its run, the place of its cond in what was asked, and one picture's x.

    Where it reuses, `slot` is what its query keeps its deep part by: equal for rows that one prompt, told in one way,
    has for one picture (`owner` is the prompt's context whole, whose id is in it). Either all rows of a query are
    `given` what was kept of one earlier query, or none is, as guidance compares them; then it goes into `kept`. `state`
    says nothing of reuse.
    """

    run: int
    place: int
    x: Tensor
    sigma: float
    context: Tensor
    vector: Tensor | None
    concat: Tensor | None
    state: NetState | None
    worn: tuple[Hashable, ...]
    steered: tuple[Steer, ...]
    reuse: tuple[int, int] | None
    slot: Hashable
    owner: Tensor
    seed: int
    given: Tensor | None = None
    kept: _Kept | None = None

    @property
    def key(self) -> Hashable:
        parts = (self.x, self.context, self.vector, self.concat, self.given)
        steered = tuple((id(steer.network), steer.weight, steer.hint.shape) for steer in self.steered)
        depth = None if self.given is None or self.reuse is None else self.reuse[1]
        return self.worn, steered, self.state, depth, *(None if part is None else part.shape for part in parts)


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
        for run in runs:
            run.advance(None)
        while any(run.query is not None for run in runs):
            self.turn(runs)
        for run in runs:
            if run.error is not None:
                raise run.error
        return [run.result for run in runs]

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
        alike: dict[Hashable, list[_Row]] = defaultdict(list)
        for row in _rows(runs, self.model.family.autoencoder.factor):
            alike[row.key].append(row)
        found: dict[tuple[int, int], list[Reply]] = defaultdict(list)
        answered: list[_Row] = []
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
                    found[row.run, row.place].append(_picture(reply, place))
                    _keep(row, deep, place)
        for row, good in zip(answered, torch.cat(finite).tolist() if finite else [], strict=True):
            if not good:
                runs[row.run].fail(self._not_finite(runs[row.run]))
        return {key: _joined(pictures) for key, pictures in found.items() if runs[key[0]].asked is not None}

    def _halve(self, rows: int) -> None:
        """Ask for half of `rows` at once from now on, which were too many for the memory."""
        self.max_rows = max(1, rows // 2)
        log.warning("out of memory with %d rows in a network call; %d at most from now on", rows, self.max_rows)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _call(self, rows: Sequence[_Row]) -> tuple[Reply, Deep | None]:
        """What the network answers to rows alike, each a row of the reply, and what was kept of its deep part."""
        alike = zip(*(row.steered for row in rows), strict=True)
        cond = Cond(
            torch.stack([row.context for row in rows]),
            _stack([row.vector for row in rows]),
            _stack([row.concat for row in rows]),
            rows[0].state,
            steered=tuple(replace(each[0], hint=torch.cat([steer.hint for steer in each])) for each in alike),
        )
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


def _rows(runs: Sequence[Run], factor: int) -> Iterator[_Row]:
    """What every run asks, row by row."""
    for index, run in enumerate(runs):
        if run.query is not None and run.asked is not None:
            rows = list(_rows_of(index, run, run.query, run.asked, factor))
            yield from _reusing(run, run.query, rows) if any(row.reuse for row in rows) else rows


def _reusing(run: Run, query: Query, rows: Sequence[_Row]) -> Sequence[_Row]:
    """The rows of a query, given what an earlier one of the same tile kept, where that is young and holds them all.

    Where it is not, it is dropped, and what is made of these rows is kept.
    """
    kept, every = run.deep.get(query.window), min(row.reuse[0] for row in rows if row.reuse is not None)
    if kept is not None and kept.age + 1 < every and all(row.slot in kept.deep for row in rows):
        kept.age += 1
        return [replace(row, given=kept.deep[row.slot]) for row in rows]
    fresh = run.deep[query.window] = _Kept(owners=[row.owner for row in rows])
    return [replace(row, kept=fresh) for row in rows]


def _rows_of(index: int, run: Run, query: Query, asked: Ask, factor: int) -> Iterator[_Row]:
    at = 0.0 if run.at is None else run.at.fraction
    for place, cond in enumerate(asked.rows):
        worn = tuple(worn.what for worn in cond.worn if worn.start <= at < worn.end)
        steered = tuple(_part(steer, query, factor) for steer in cond.steered if steer.start <= at < steer.end)
        for picture, x in enumerate(asked.x):
            context = cond.context[0 if len(cond.context) == 1 else picture]
            vector, concat = (_row_of(part, picture) for part in (cond.vector, cond.concat))
            if concat is not None and query.window is not None:
                concat = crop(concat, query.window)
            state = _state(cond.state, query)
            reuse = None if state is None else state.reuse
            if state is not None and reuse is not None:
                plain = replace(state, reuse=None)
                state = None if plain == NetState() else plain  # as of rows that reuse nothing: they share calls
            slot = (place, picture, id(cond.context), state, worn, steered)
            yield _Row(
                index, place, x, query.sigma, context, vector, concat, state, worn, steered,
                reuse, slot, cond.context, _seed(run, picture),
            )  # fmt: skip


def _seed(run: Run, picture: int) -> int:
    """What a picture's merged cells are chosen by in this step: alike in all rows of the step, another in the next."""
    own = run.seeds[picture] if picture < len(run.seeds) else picture
    return (1_000_003 * own + (0 if run.at is None else run.at.step)) % 2**63


def _deep(rows: Sequence[_Row]) -> Deep | None:
    """What a call of rows alike does with the deep part."""
    given = _stack([row.given for row in rows])
    if given is not None:
        assert rows[0].reuse is not None
        return Deep(depth=rows[0].reuse[1], given=given.contiguous(memory_format=torch.channels_last))
    wanted = frozenset(row.reuse[1] for row in rows if row.reuse is not None)
    return Deep(wanted) if wanted else None


def _merging(rows: Sequence[_Row]) -> Merging | None:
    """How a call of rows alike merges cells."""
    ratio = 0.0 if rows[0].state is None else rows[0].state.tome
    return Merging(ratio, [torch.Generator().manual_seed(row.seed) for row in rows]) if ratio else None


def _keep(row: _Row, deep: Deep | None, place: int) -> None:
    """Keep what the deep part made of a row, the call's `place`-th, where it is to be kept."""
    if row.kept is not None and row.reuse is not None and deep is not None:
        row.kept.deep[row.slot] = deep.kept[row.reuse[1]][place].clone()


def _part(steer: Steer, query: Query, factor: int) -> Steer:
    """What steers a tile: its own part of the hint, which has `factor` pixels to a cell."""
    if query.window is None or steer.hint.ndim != 4:
        return steer
    top, left, height, width = (factor * cells for cells in query.window)
    return replace(steer, hint=crop(steer.hint, (top, left, height, width)))


def _state(state: NetState | None, query: Query) -> NetState | None:
    """The state of a row, but that a tile's own edges do not meet where it is less than the picture."""
    if state is None or not any(query.cut):
        return state
    x, y = (meet and not cut for meet, cut in zip(state.seamless, query.cut, strict=True))
    return replace(state, seamless=(x, y))


def _row_of(part: Tensor | None, picture: int) -> Tensor | None:
    """A picture's own row; a single row serves every picture."""
    return None if part is None else part[0 if len(part) == 1 else picture]


def _stack(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Rows alike -> one tensor; None where they are None."""
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there else None


def _picture(reply: Reply, row: int) -> Reply:
    """One row of a call's reply, still with a batch, of 1."""
    one = slice(row, row + 1)
    cross = None if reply.cross is None else tuple(look[one] for look in reply.cross)
    return Reply(reply.x0[one], None if reply.attention is None else reply.attention[one], cross)


def _joined(pictures: Sequence[Reply]) -> Reply:
    """The replies to each picture of one row of a plan, as one."""
    attention = [reply.attention for reply in pictures if reply.attention is not None]
    cross = [reply.cross for reply in pictures if reply.cross is not None]
    return Reply(
        torch.cat([reply.x0 for reply in pictures]),
        torch.cat(attention) if attention else None,
        tuple(torch.cat(looks) for looks in zip(*cross, strict=True)) if cross else None,
    )
