"""Guidance as a plan: which rows a query needs and how their answers combine. It never calls a network.

Letters: a row is one (cond, x) pair of a network call; B pictures and R rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sfumato.types import Answer, Cond


class Guidance(Protocol):
    """`conds`: for each row what the network is told; `combine`: the rows' x0, in that order, to one Answer."""

    @property
    def conds(self) -> Sequence[Cond]: ...

    def combine(self, x0s: Sequence[Tensor]) -> Answer: ...


@dataclass(frozen=True)
class ClassifierFree:
    """Ho & Salimans 2022: x0 = negative + scale (positive - negative). At scale 1 the negative row is not computed."""

    positive: Cond
    negative: Cond | None
    scale: float

    @property
    def conds(self) -> Sequence[Cond]:
        if self.scale == 1.0 or self.negative is None:
            return (self.positive,)
        return (self.positive, self.negative)

    def combine(self, x0s: Sequence[Tensor]) -> Answer:
        if len(x0s) == 1:
            return Answer(x0s[0])
        positive, negative = x0s
        return Answer(negative + self.scale * (positive - negative), negative)
