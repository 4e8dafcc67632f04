"""The words of guidance: where a run stands, what a plan asks of the network, what it is told, and the Guidance itself.

Letters: B pictures, n heads, L cells of an attention map, M tokens; a row is one Cond for B pictures, so B
rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from sfumato.types import Answer, Cond, NetState, Query

TOLERANCE = 1e-6  # relative; a level that went through a logarithm or float32 is still the same level


@dataclass(frozen=True)
class Moment:
    """Where a run stands: x (B, C, h, w) at level sigma, in step `step` from 0, which is `fraction` of all steps.

    Where x is a tile, `window` is its (top, left, height, width) in the whole picture, in latent cells.
    """

    step: int
    sigma: float
    fraction: float
    x: Tensor
    window: tuple[int, int, int, int] | None = None


def moment(query: Query, sigmas: Sequence[float]) -> Moment:
    """The step of a query is the last level not below its sigma: all evaluations between two levels are one step."""
    num_steps = max(1, len(sigmas) - 1)
    enough = query.sigma * (1 - TOLERANCE)
    step = max((index for index, sigma in enumerate(sigmas) if sigma >= enough), default=0)
    step = min(step, num_steps - 1)
    return Moment(step, query.sigma, step / num_steps, query.x, query.window)


@dataclass(frozen=True)
class Reply:
    """What the network answers to one row: x0 (B, C, h, w), and the map (B, n, L, L) where the row's state probes.

    Where its state has `cross`, also the maps of all attentions to the context, (B, M, h_i, w_i) for M tokens.
    """

    x0: Tensor
    attention: Tensor | None = None
    cross: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Ask:
    """x (B, C, h, w) to be denoised once for each of `rows`; their replies, in that order, are what `then` is given."""

    x: Tensor
    rows: Sequence[Cond]
    then: Callable[[Sequence[Reply]], Answer | Ask]


class Guidance(Protocol):
    """A plan: the rows that a query needs, positive parts first and a negative last, and the answer from their replies.

    `combine` may ask once more, where that depends on the first replies. A plan never calls a network and keeps no
    state: the same moment always has the same rows.
    """

    def rows(self, at: Moment) -> Sequence[Cond]: ...

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask: ...


def after(result: Answer | Ask, change: Callable[[Answer], Answer | Ask]) -> Answer | Ask:
    """`change` of the answer, now or when it has come: how one plan works on the answer of another."""
    if isinstance(result, Answer):
        return change(result)
    ask = result
    return replace(ask, then=lambda replies: after(ask.then(replies), change))


def changed(cond: Cond, **state: Any) -> Cond:
    """The cond with fields of its network state replaced."""
    return replace(cond, state=replace(cond.state or NetState(), **state))


def skip(prediction: str, sigma: float) -> float:
    """c_skip of Karras et al. 2022, equation 7: what a network predicts is in proportion to c_skip x - x0.

    1 where it predicts noise, 1 / (1 + sigma^2) where it predicts v, 0 where it predicts x0; the factor is the same for
    all x0 of one query.
    """
    if prediction == "eps":
        return 1.0
    if prediction == "v":
        return 1 / (1 + sigma**2)
    if prediction == "sample":
        return 0.0
    raise ValueError(f"prediction={prediction!r}: guidance knows eps, v and sample")
