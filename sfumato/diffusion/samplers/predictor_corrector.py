"""Samplers that correct each step with the x0 found at its end, which the next step needs anyway: n evaluations.

Letters: lambda = -log sigma, h a step in lambda; past x0 are kept newest last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import lagrange_integrals, weighted
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Query

VARIANTS = ("bh1", "bh2")
# SD 1's levels at timesteps 200 and 800 of 1000, between which SA-Solver's authors add noise to latents.
SA_LOW, SA_HIGH = 0.5716, 5.1111


@sampler("UniPC", "uni_pc", schedule="uniform", start="prior")
def unipc(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 3, variant: str = "bh1", lower: bool = True
) -> Steps:
    """Zhao et al. 2023 (UniPC), algorithm 1 on x0 with B(h) = h ("bh1") or e^h - 1 ("bh2"). n evaluations.

    Order as given, and one more by the corrector; a first step of order 1 leaves less over all. `lower` takes lower
    orders for the last steps. A1111's defaults are bh1 and 3, diffusers' bh2 and 2.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: one of {', '.join(VARIANTS)}")
    if order < 1:
        raise ValueError(f"order={order}: 1 or more are needed")
    num_steps, used = len(sigmas) - 1, 0
    start = x
    past: list[tuple[float, Tensor]] = []  # (lambda, x0)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        now = -math.log(sigma)
        if past:
            x = _unified(start, past[-used:], now, variant, x0)
        past = [*past[-order:], (now, x0)]
        used = min(order, index + 1, num_steps - index if lower else order)
        start, x = x, _unified(x, past[-used:], -math.log(sigma_next), variant, None)
    return x


def _unified(x: Tensor, past: Sequence[tuple[float, Tensor]], end: float, variant: str, found: Tensor | None) -> Tensor:
    """UniP (found None) or UniC (found: the x0 at the end) of as many orders as `past` has entries: equations 8 and 3.

    x is at past[-1]; returns x at lambda = end.
    """
    now, x0 = past[-1]
    h = end - now
    ratios = [(then - now) / h for then, _ in reversed(past[:-1])]
    slopes = [(other - x0) / ratio for ratio, (_, other) in zip(ratios, reversed(past[:-1]), strict=True)]
    if found is not None:
        slopes.append(found - x0)
    base = math.expm1(-h)
    x = math.exp(-h) * x - base * x0
    if not slopes:
        return x
    rho = [0.5]  # the paper's choice for a single slope: any value keeps the order there
    if len(slopes) > 1:
        rho = _rho(ratios if found is None else [*ratios, 1.0], -h, variant)
    return x - (-h if variant == "bh1" else base) * weighted(rho, slopes)


def _rho(ratios: Sequence[float], z: float, variant: str) -> list[float]:
    """The a_p or c_p of the paper: R rho = b with R_ij = r_j^(i-1) and b_i = i! phi_(i+1)(z) z / B(h), z = -h."""
    big = z if variant == "bh1" else math.expm1(z)
    b, value, factorial = [], math.expm1(z) / z - 1, 1
    for i in range(1, len(ratios) + 1):
        b.append(value * factorial / big)
        factorial *= i + 1
        value = value / z - 1 / factorial
    powers = np.vander(np.asarray(ratios), len(ratios), increasing=True).T
    return [float(part) for part in np.linalg.solve(powers, np.asarray(b))]


@sampler("UniPC bh2", "uni_pc_bh2", "UniPCMultistepScheduler", schedule="uniform", start="prior")
def unipc_bh2(x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 3, lower: bool = True) -> Steps:
    """`unipc` with B(h) = e^h - 1. diffusers' scheduler has order 2 unless told otherwise."""
    return (yield from unipc(x, sigmas, noise, order=order, variant="bh2", lower=lower))


@dataclass
class _Adams:
    """The stochastic Adams step of Xue et al. 2023 with the x0 of past levels, and its noise, drawn once a step."""

    levels: list[float] = field(default_factory=list)  # lambda
    x0s: list[Tensor] = field(default_factory=list)

    def add(self, level: float, x0: Tensor) -> None:
        self.levels, self.x0s = [*self.levels[-3:], level], [*self.x0s[-3:], x0]

    def step(self, x: Tensor, start: float, end: float, tau: float, order: int, simple: bool, correct: bool) -> Tensor:
        """Equations 14 (predictor) and 17 (corrector) without noise: x from lambda = start to end."""
        span, speed = end - start, 1 + tau**2
        knots, x0s = self.levels[: -order - 1 : -1], self.x0s[: -order - 1 : -1]
        weights = lagrange_integrals(knots, start, end, lambda u: speed * np.exp(speed * (u - end)))
        if simple and order == 2:  # appendix D: another weight of the second, of the same order
            other = speed * span / 2 if correct else speed * span**2 / 2 / (knots[0] - knots[1])
            total = -math.expm1(-speed * span)
            weights = [other, total - other] if correct else [total + other, -other]
        return math.exp(-speed * span) * x + weighted(weights, x0s)


@sampler("SA-Solver", "SASolverScheduler")
def sa_solver(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_tmin: float = SA_LOW,
    s_tmax: float = SA_HIGH,
    s_noise: float = 1.0,
    order: int = 3,
    corrector: int = 4,
    simple: bool = False,
    twice: bool = False,
) -> Steps:
    """Xue et al. 2023 (SA-Solver), algorithm 1: a stochastic Adams predictor and corrector on x0. n evaluations.

    `eta` is the paper's tau, in effect for steps that begin at s_tmin <= sigma <= s_tmax; `order` and `corrector` are
    their orders, `corrector` 0 for none, lowered at both ends. `simple` is diffusers' choice (appendix D), who have 2
    and 2; ComfyUI's are 3 and 4. `twice` evaluates the corrected x as well (PECE): 2n - 1 evaluations.
    """
    if not (1 <= order <= 4 and 0 <= corrector <= 4):
        raise ValueError(f"order={order}, corrector={corrector}: 1 to 4 and 0 to 4 are allowed")
    past, start, fresh, tau, used = _Adams(), x, None, 0.0, 1
    num_steps = len(sigmas) - 1 if sigmas[-1] > 0 else len(sigmas) - 2  # that this formula takes
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = (yield Query(x, sigma)).x0
        past.add(-math.log(sigma), x0)
        if index and corrector and (sigma_next > 0 or twice):
            before = -math.log(sigmas[index - 1])
            x = past.step(start, before, -math.log(sigma), tau, min(corrector, used, 4), simple, correct=True)
            if fresh is not None:
                x = x + fresh
            if twice:
                x0 = past.x0s[-1] = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        tau = eta if s_tmin <= sigma <= s_tmax else 0.0
        left = num_steps - index
        start, now, end = x, -math.log(sigma), -math.log(sigma_next)
        x = past.step(x, now, end, tau, min(order, index + 1, left), simple, correct=False)
        used, fresh = min(index + 2, left + (sigmas[-1] > 0)), None  # of the corrector that follows
        if tau:
            fresh = s_noise * sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * (end - now))) * noise()
            x = x + fresh
    return x


@sampler("SA-Solver PECE", "sa_solver_pece")
def sa_solver_pece(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_tmin: float = SA_LOW,
    s_tmax: float = SA_HIGH,
    s_noise: float = 1.0,
) -> Steps:
    """`sa_solver` that evaluates each corrected x again: predict, evaluate, correct, evaluate. 2n - 1 evaluations."""
    options = {"eta": eta, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return (yield from sa_solver(x, sigmas, noise, **options, twice=True))
