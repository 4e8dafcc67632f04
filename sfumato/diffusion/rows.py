"""Rows of network calls: what a query asks, picture by picture and cond by cond, and replies taken apart and joined.

Rows of equal keys may share a call, whoever asked them. Knows no run, no call and no network: those that rows name are
ids. Letters: B pictures, C channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sfumato.diffusion.guidance import Ask, Moment, Reply
from sfumato.diffusion.samplers.tiled import crop
from sfumato.types import Cond, NetState, Query, Steer

Tile = tuple[int, int, int, int]  # top, left, height, width of a part of the latents


@dataclass
class Kept:
    """What a U-Net's deep part made of the rows of one query, by their slots, `age` queries ago: see `Row.slot`.

    `owners` are the contexts of these rows, held so that their ids stay their own.
    """

    age: int = 0
    deep: dict[Hashable, Tensor] = field(default_factory=dict)
    owners: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One row of a network call: the run that asks, the place of its cond in what was asked, and one picture's x.

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
    kept: Kept | None = None

    @property
    def key(self) -> Hashable:
        """Equal for rows that one call can answer: the same clothes, state and shapes."""
        parts = (self.x, self.context, self.vector, self.concat, self.given)
        steered = tuple((id(steer.network), steer.weight, steer.hint.shape) for steer in self.steered)
        depth = None if self.given is None or self.reuse is None else self.reuse[1]
        return self.worn, steered, self.state, depth, *(None if part is None else part.shape for part in parts)


def rows_of(
    run: int,
    query: Query,
    at: Moment,
    asked: Ask,
    seeds: Sequence[int],
    kept: dict[Tile | None, Kept],
    factor: int,
) -> Sequence[Row]:
    """All rows of what a run asks of its `query`: `asked.rows` x B, the pictures of one cond beside each other.

    Each picture has one of the `seeds`, or its number. `kept` is what the run's earlier queries keep of the deep part,
    by their windows, and is brought up to date. A latent cell has `factor` pixels a side.
    """
    rows = list(_rows(run, query, at, asked, seeds, factor))
    return _reusing(rows, query, kept) if any(row.reuse for row in rows) else rows


def _rows(run: int, query: Query, at: Moment, asked: Ask, seeds: Sequence[int], factor: int) -> Iterator[Row]:
    for place, cond in enumerate(asked.rows):
        worn = tuple(worn.what for worn in cond.worn if worn.start <= at.fraction < worn.end)
        steered = tuple(_part(steer, query, factor) for steer in cond.steered if steer.start <= at.fraction < steer.end)
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
            yield Row(
                run, place, x, query.sigma, context, vector, concat, state, worn, steered,
                reuse, slot, cond.context, _seed(seeds, picture, at.step),
            )  # fmt: skip


def _reusing(rows: Sequence[Row], query: Query, kept: dict[Tile | None, Kept]) -> Sequence[Row]:
    """The rows of a query, given what an earlier one of the same tile kept, where that is young and holds them all.

    Where it is not, it is dropped, and what is made of these rows is kept.
    """
    old, every = kept.get(query.window), min(row.reuse[0] for row in rows if row.reuse is not None)
    if old is not None and old.age + 1 < every and all(row.slot in old.deep for row in rows):
        old.age += 1
        return [replace(row, given=old.deep[row.slot]) for row in rows]
    fresh = kept[query.window] = Kept(owners=[row.owner for row in rows])
    return [replace(row, kept=fresh) for row in rows]


def _seed(seeds: Sequence[int], picture: int, step: int) -> int:
    """What a picture's merged cells are chosen by in this step: alike in all rows of the step, another in the next."""
    own = seeds[picture] if picture < len(seeds) else picture
    return (1_000_003 * own + step) % 2**63


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


def cond_of(rows: Sequence[Row]) -> Cond:
    """What rows of equal keys tell the network together, a row of it each; adapters are worn, not told."""
    alike = zip(*(row.steered for row in rows), strict=True)
    return Cond(
        torch.stack([row.context for row in rows]),
        stacked([row.vector for row in rows]),
        stacked([row.concat for row in rows]),
        rows[0].state,
        steered=tuple(replace(each[0], hint=torch.cat([steer.hint for steer in each])) for each in alike),
    )


def stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Rows alike -> one tensor, a row of it each; None where they are None."""
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there else None


def picture_of(reply: Reply, row: int) -> Reply:
    """One row of a call's reply, still with a batch, of 1."""
    one = slice(row, row + 1)
    cross = None if reply.cross is None else tuple(look[one] for look in reply.cross)
    return Reply(reply.x0[one], None if reply.attention is None else reply.attention[one], cross)


def joined(pictures: Sequence[Reply]) -> Reply:
    """The replies to each picture of one cond, as one."""
    attention = [reply.attention for reply in pictures if reply.attention is not None]
    cross = [reply.cross for reply in pictures if reply.cross is not None]
    return Reply(
        torch.cat([reply.x0 for reply in pictures]),
        torch.cat(attention) if attention else None,
        tuple(torch.cat(looks) for looks in zip(*cross, strict=True)) if cross else None,
    )
