"""Samplers: coroutines that yield a Query, are sent its Answer, and return the final x. They never call a network.

To add one, write a function `(x, sigmas, noise)` under `@sampler(...)`; its keyword arguments become options.
Letters: sigmas fall and end at the last level (often 0); d = (x - x0) / sigma is dx/dsigma (Karras et al. 2022, eq. 3).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from sfumato.types import Answer, Query

Steps = Generator[Query, Answer, Tensor]
Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A registered sampler: its function, the schedule it is used with unless another is asked for, and how x starts.

    `start` is "sigma" for x = sigma noise (k-diffusion) or "prior" for sqrt(1 + sigma^2) noise, the unit variance in
    variance-preserving scale that the original DDIM and PLMS start from. `takes_eta` tells whether it has that option.
    """

    name: str
    run: Callable[..., Steps]
    schedule: str
    start: str
    takes_eta: bool

    def start_scale(self, sigma: float) -> float:
        return math.sqrt(1 + sigma**2) if self.start == "prior" else sigma


SAMPLERS: dict[str, Sampler] = {}
_ALIASES: dict[str, str] = {}


def sampler(
    *aliases: str, schedule: str = "uniform", start: str = "sigma"
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register the decorated function under its own name and the aliases that other programs use."""

    def register(function: Callable[..., Steps]) -> Callable[..., Steps]:
        name: str = getattr(function, "__name__")  # noqa: B009 - a Callable need not have one, a function has
        takes_eta = "eta" in inspect.signature(function).parameters
        SAMPLERS[name] = Sampler(name, function, schedule, start, takes_eta)
        _ALIASES.update({_plain(alias): name for alias in (name, *aliases)})
        return function

    return register


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == "+").replace("++", "pp")


def find_sampler(name: str) -> Sampler:
    """The sampler of a name or alias in any spelling ("DPM++ 2M", "dpmpp_2m"); ValueError lists the names."""
    if _plain(name) not in _ALIASES:
        raise ValueError(f"sampler={name!r}: one of {', '.join(SAMPLERS)}")
    return SAMPLERS[_ALIASES[_plain(name)]]


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step to noise `down`, then add noise of level `up`, and x has level sigma_next.

    With eta = 1 the posterior of the forward process (Ho et al. 2020), eta = 0 adds nothing; between, the interpolation
    of Song et al. 2021 (DDIM), equation 16, written in sigmas.
    """
    if sigma_next == 0:
        return 0.0, 0.0
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


@sampler("k_euler", "EulerDiscreteScheduler")
def euler(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn). Order 1."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        x = x + (sigma_next - sigma) * (x - x0) / sigma
    return x


@sampler("Euler a", "k_euler_a", "euler_ancestral", "EulerAncestralDiscreteScheduler")
def euler_a(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Steps:
    """Euler's step to a lower level, then fresh noise back up to the next (ancestral; Song et al. 2021, eq. 16)."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = x + (down - sigma) * (x - x0) / sigma
        if up:
            x = x + up * noise()
    return x


@sampler("DDIMScheduler", schedule="ddim", start="prior")
def ddim(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Steps:
    """Song et al. 2021, equation 12; eta = 0 is deterministic, eta = 1 is DDPM's variance. Order 1.

    In sigmas the equation is the ancestral Euler step: only the levels visited and the start are DDIM's own.
    """
    return (yield from euler_a(x, sigmas, noise, eta=eta))


@sampler("PNDMScheduler", "k_plms", schedule="ddim", start="prior")
def plms(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Liu et al. 2022 (PNDM) with linear multi-steps of order up to 4 on the noise, as the original PLMS.

    The first step is an improved Euler pair, hence n + 1 evaluations; the weights are Adams-Bashforth's for equal
    steps (eq. 12). On smooth levels that are not equally spaced, as all schedules here, the measured order is 2; on
    equal steps in sigma it nears 4, less what the starting steps cost.
    """
    past: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        eps = (x - (yield Query(x, sigma)).x0) / sigma
        if not past and sigma_next > 0:
            trial = x + (sigma_next - sigma) * eps
            slope = (eps + (trial - (yield Query(trial, sigma_next)).x0) / sigma_next) / 2
        elif len(past) == 0:
            slope = eps
        elif len(past) == 1:
            slope = (3 * eps - past[-1]) / 2
        elif len(past) == 2:
            slope = (23 * eps - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            slope = (55 * eps - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        past = [*past[-2:], eps]
        x = x + (sigma_next - sigma) * slope
    return x


@sampler("k_heun", "HeunDiscreteScheduler")
def heun(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Karras et al. 2022, algorithm 1 (Heun's method, no churn). Order 2, 2n - 1 evaluations where it ends at 0."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - (yield Query(x, sigma)).x0) / sigma
        trial = x + (sigma_next - sigma) * d
        if sigma_next == 0:
            x = trial  # the slope has no value at sigma = 0
        else:
            d_next = (trial - (yield Query(trial, sigma_next)).x0) / sigma_next
            x = x + (sigma_next - sigma) * (d + d_next) / 2
    return x


@sampler("DPM++ 2M", "k_dpmpp_2m", "dpmpp_2m", "DPMSolverMultistepScheduler", schedule="karras")
def dpmpp_2m(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2, in lambda = -log sigma. Order 2, n evaluations."""
    last: tuple[float, Tensor] | None = None  # (step in lambda that led here, x0 found there)
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        estimate = x0
        if last is not None:
            h_last, x0_last = last
            r = h_last / h
            estimate = x0 + (x0 - x0_last) / (2 * r)  # the paper's D_i
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        last = (h, x0)
    return x


def drive(steps: Steps, denoise: Callable[[Query], Answer]) -> Tensor:
    """Run one sampler to its end with a function that answers its queries; returns the final x."""
    reply: Any = None
    while True:
        try:
            query = steps.send(reply)
        except StopIteration as stop:
            return stop.value
        reply = denoise(query)
