"""Classifier-free guidance, with prompts that change on the way and prompts of several weighted parts.

Also the window in which guidance is at work. Letters: n negative, p_i positive parts, w_i their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from sfumato.diffusion.guidance.protocol import Ask, Guidance, Moment, Reply
from sfumato.types import Answer, Cond

Told: TypeAlias = "Cond | Sequence[tuple[int, Cond]]"
"""One Cond, or (until_step, Cond) entries: each holds up to its step, counted from 1, and the last one to the end."""


@dataclass(frozen=True)
class Weighted:
    """One part of a prompt whose parts were joined by AND."""

    told: Told
    weight: float = 1.0


Positive: TypeAlias = "Told | Sequence[Weighted]"


def told_at(told: Told, at: Moment) -> Cond:
    """What holds at a moment ("prompt editing")."""
    if isinstance(told, Cond):
        return told
    return next((cond for until, cond in told if at.step + 1 <= until), told[-1][1])


def parts_of(positive: Positive) -> tuple[Weighted, ...]:
    """The parts; a prompt that is not of several is one of weight 1. ValueError where there is none."""
    if isinstance(positive, Cond):
        return (Weighted(positive),)
    if not positive:
        raise ValueError("positive=(): a Cond, (until_step, Cond) entries or Weighted parts are needed")
    parts = tuple(part for part in positive if isinstance(part, Weighted))
    return parts or (Weighted(tuple(entry for entry in positive if not isinstance(entry, Weighted))),)


def each_cond(positive: Positive, change: Callable[[Cond], Cond]) -> tuple[Weighted, ...]:
    """The parts with every Cond in them changed."""

    def of(told: Told) -> Told:
        return change(told) if isinstance(told, Cond) else [(until, change(cond)) for until, cond in told]

    return tuple(replace(part, told=of(part.told)) for part in parts_of(positive))


@dataclass(frozen=True)
class ClassifierFree:
    """Ho & Salimans 2022: x0 = n + scale (p - n); of several parts x0 = n + scale sum_i w_i (p_i - n).

    The second is the conjunction of Liu et al. 2022 as A1111's AND has it. Where n has no part in it
    (scale 1 and weights that sum to 1) it is not computed. Without a negative guidance is off: x0 is the mean of the
    parts by their weights, negative ones left out.
    """

    positive: Positive
    negative: Told | None
    scale: float

    def rows(self, at: Moment) -> Sequence[Cond]:
        parts = parts_of(self.positive)
        rows = [told_at(part.told, at) for part in parts]
        pointless = self.scale == 1.0 and sum(part.weight for part in parts) == 1.0
        if self.negative is None or pointless:
            return rows
        return [*rows, told_at(self.negative, at)]

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer:
        weights = [part.weight for part in parts_of(self.positive)]
        x0s = [reply.x0 for reply in replies]
        if len(x0s) == len(weights):
            x0 = blended(_shares(weights), x0s)
            return Answer(x0, None, x0)
        negative = x0s[-1]
        cond = blended([*weights, 1.0 - sum(weights)], x0s)
        return Answer(negative + self.scale * (cond - negative), negative, cond)


def blended(weights: Sequence[float], x0s: Sequence[Tensor]) -> Tensor:
    """sum_i w_i x0_i; those of no weight are left out."""
    parts = [x0 if weight == 1.0 else weight * x0 for weight, x0 in zip(weights, x0s, strict=True) if weight]
    return reduce(torch.add, parts)


def _shares(weights: Sequence[float]) -> Sequence[float]:
    """The weights, if they sum to 1; else the positive ones made to; all on the first part where there is none."""
    if sum(weights) == 1.0:
        return weights
    kept = [max(0.0, weight) for weight in weights]
    return [weight / sum(kept) for weight in kept] if any(kept) else [1.0, *[0.0] * (len(kept) - 1)]


@dataclass(frozen=True)
class Window:
    """When guidance is at work: for sigma in (lo, hi] and for the steps from fraction `start` to before `end`.

    The interval is that of Kynkäänniemi et al. 2024; a start above 0 is A1111's "ignore negative prompt
    during early sampling". Below `thin_below` only every second step, from step 0 on, has guidance (A1111's "negative
    guidance minimum sigma", NGMS).
    """

    lo: float = 0.0
    hi: float = math.inf
    start: float = 0.0
    end: float = 1.0
    thin_below: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.lo < self.hi:
            raise ValueError(f"sigma interval ({self.lo}, {self.hi}]: it must be 0 or more, and not empty")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"guidance from {self.start} to {self.end} of the steps: 0 <= start < end <= 1 is needed")
        if not self.thin_below >= 0:
            raise ValueError(f"thin_below={self.thin_below}: 0 or more is needed")

    def holds(self, at: Moment) -> bool:
        """Whether guidance is at work at a moment."""
        thinned = at.sigma < self.thin_below and at.step % 2 == 1
        return self.lo < at.sigma <= self.hi and self.start <= at.fraction < self.end and not thinned


@dataclass(frozen=True)
class During:
    """One plan within a window, another outside of it."""

    window: Window
    inside: Guidance
    outside: Guidance

    def rows(self, at: Moment) -> Sequence[Cond]:
        return self._plan(at).rows(at)

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        return self._plan(at).combine(at, replies)

    def _plan(self, at: Moment) -> Guidance:
        return self.inside if self.window.holds(at) else self.outside
