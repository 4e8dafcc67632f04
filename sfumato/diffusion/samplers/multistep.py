"""Samplers that remember slopes of past steps: Adams-Bashforth methods in sigma or a function of it. n evaluations.

Letters: d = (x - x0) / sigma, the slope dx/dsigma and the noise that the network found; n steps; newest slope first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import lagrange_integrals, weighted
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Query

# Adams-Bashforth's weights for equal steps, orders 1 to 4 (Liu et al. 2022, eq. 9 and 12).
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _check_order(order: int, highest: int) -> None:
    if not 1 <= order <= highest:
        raise ValueError(f"order={order}: 1 to {highest} are allowed")


@sampler("PLMS", "PNDMScheduler", "PNDM", schedule="ddim", start="prior")
def plms(x: Tensor, sigmas: Sequence[float], noise: Noise, *, velocity: bool = False) -> Steps:
    """Liu et al. 2022 (PNDM) with linear multi-steps of order up to 4 on the noise, as the original PLMS.

    The first step is an improved Euler pair, hence n + 1 evaluations; the weights are Adams-Bashforth's for equal
    steps (eq. 12). On smooth levels that are not equally spaced, as all schedules here, the measured order is 2; on
    equal steps in sigma it nears 4, less what the starting steps cost. With `velocity` the multi-steps are of v
    (Salimans & Ho 2022), as diffusers' PNDM has them for models that predict v.
    """

    def told(x: Tensor, x0: Tensor, sigma: float) -> Tensor:
        eps = (x - x0) / sigma
        return (eps - sigma * x0) / math.sqrt(1 + sigma**2) if velocity else eps

    def slope(told: Tensor, x: Tensor, sigma: float) -> Tensor:
        return told / math.sqrt(1 + sigma**2) + x * (sigma / (1 + sigma**2)) if velocity else told

    past: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        first = told(x, (yield Query(x, sigma)).x0, sigma)
        if not past and sigma_next > 0:
            trial = x + (sigma_next - sigma) * slope(first, x, sigma)
            both = (first + told(trial, (yield Query(trial, sigma_next)).x0, sigma_next)) / 2
        else:
            both = weighted(ADAMS[len(past)], [first, *past])
        past = [first, *past[:2]]
        x = x + (sigma_next - sigma) * slope(both, x, sigma)
    return x


@sampler("LMS", "LMSDiscreteScheduler", "LinearMultistepSampler")
def lms(x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4) -> Steps:
    """Linear multi-steps in sigma (Katherine Crowson, k-diffusion): Adams-Bashforth with the weights of these levels.

    Order as given once there are as many slopes; the Euler step at the start leaves order 2 to 3 over all.
    """
    _check_order(order, 4)
    slopes: list[Tensor] = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slopes = [(x - (yield Query(x, sigma)).x0) / sigma, *slopes[: order - 1]]
        knots = [sigmas[index - j] for j in range(len(slopes))]
        x = x + weighted(lagrange_integrals(knots, sigma, sigma_next), slopes)
    return x


@sampler("iPNDM", "IPNDMScheduler")
def ipndm(x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4) -> Steps:
    """Zhang & Chen 2023 (DEIS), improved PNDM: PLMS's weights for equal steps, started by Euler and lower orders.

    Of order 2 on levels that are not equally spaced. A last level of 0 gets x0 itself (ComfyUI, Forge).
    """
    _check_order(order, 4)
    slopes: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        x = x + (sigma_next - sigma) * weighted(ADAMS[len(slopes) - 1], slopes)
    return x


@sampler("iPNDM_v")
def ipndm_v(x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4) -> Steps:
    """`ipndm` for unequal steps, with the weights of zju-pi's diff-sampler, as ComfyUI and Forge have it.

    Those weights are Adams-Bashforth's at order 2; above, two of their factors are misplaced, which equal steps hide,
    so that unequal ones leave order 2. `lms` has the exact weights.
    """
    _check_order(order, 4)
    slopes: list[Tensor] = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        steps = [sigma_next - sigma, *(sigmas[index - j] - sigmas[index - j - 1] for j in range(len(slopes) - 1))]
        x = x + (sigma_next - sigma) * weighted(_diff_sampler_weights(steps), slopes)
    return x


def _diff_sampler_weights(steps: Sequence[float]) -> list[float]:
    """Weights of the slopes for steps (this one, the last, the one before, ...), as many as there are steps."""
    h, *before = steps
    weights = [1.0, 0.0, 0.0, 0.0][: len(steps)]
    if len(steps) >= 2:
        ratio = h / before[0] / 2
        weights[0] += ratio
        weights[1] -= ratio
    if len(steps) >= 3:
        h1, h2 = before[:2]
        # exact: (1 - h / 3 (h + h1)) h (h + h1) / (h1 (h1 + h2)) / 2
        part = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        weights = _added(weights, part, (1, -1 - h1 / h2, h1 / h2))
    if len(steps) == 4:
        h1, h2, h3 = before
        span, past = h + h1 + h2, h1 + h2 + h3
        part = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * span)
        part *= (h * (h + h1) * span) / (h1 * (h1 + h2) * past)
        q = h1 * (h1 + h2) / (h2 * (h2 + h3))
        # exact: the last is -q h2 / h3
        weights = _added(weights, part, (1, -1 - h1 / h2 - q, h1 / h2 + q * (1 + h2 / h3), -q * h1 / h2))
    return weights


def _added(weights: Sequence[float], part: float, differences: Sequence[float]) -> list[float]:
    padded = [*differences, *([0.0] * (len(weights) - len(differences)))]
    return [weight + part * difference for weight, difference in zip(weights, padded, strict=True)]


@sampler("DEIS", "DEISMultistepScheduler")
def deis(x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 3, mode: str = "tab") -> Steps:
    """Zhang & Chen 2023 (DEIS): the noise as a polynomial through past values, integrated exactly.

    `mode` "tab" (tAB-DEIS, eq. 15: a polynomial in the time of a variance-preserving diffusion, ComfyUI and Forge),
    "logrho" (in log sigma, diffusers) or "rhoab" (in sigma, the appendix's rhoAB: LMS). The Euler step at the start
    leaves order 2 to 3 over all. A last level of 0 gets x0 itself.
    """
    _check_order(order, 4)
    if mode not in DEIS_MODES:
        raise ValueError(f"mode={mode!r}: one of {', '.join(DEIS_MODES)}")
    slopes: list[Tensor] = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        known = [sigmas[index - j] for j in range(len(slopes))]
        x = x + weighted(_deis_weights(known, sigma_next, mode), slopes)
    return x


DEIS_MODES = ("tab", "logrho", "rhoab")
# The linear variance-preserving diffusion whose sigma is 0.002 at t = 0.001 and 80 at t = 1: log(1 + sigma^2) =
# VP_BEND t^2 / 2 + VP_SLOPE t. These are EDM's bounds, which diff-sampler and ComfyUI take for every model.
_LOG_LOW, _LOG_HIGH = math.log1p(0.002**2), math.log1p(80.0**2)
VP_BEND = 2 * (_LOG_LOW / 1e-3 - _LOG_HIGH) / (1e-3 - 1)
VP_SLOPE = _LOG_HIGH - VP_BEND / 2


def _deis_weights(known: Sequence[float], end: float, mode: str) -> list[float]:
    """Weights of the slopes at the levels `known` (newest first) for the step from the first of them to `end`."""
    if mode == "rhoab":
        return lagrange_integrals(known, known[0], end)
    if mode == "logrho":
        return lagrange_integrals([math.log(s) for s in known], math.log(known[0]), math.log(end), np.exp)
    times = [_vp_time(sigma) for sigma in (*known, end)]
    return lagrange_integrals(times[:-1], times[0], times[-1], _vp_speed)


def _vp_time(sigma: float) -> float:
    return (math.sqrt(VP_SLOPE**2 + 2 * VP_BEND * math.log1p(sigma**2)) - VP_SLOPE) / VP_BEND


def _vp_speed(t: np.ndarray) -> np.ndarray:
    """dsigma/dt."""
    grown = VP_BEND * t**2 / 2 + VP_SLOPE * t  # log(1 + sigma^2)
    return (VP_BEND * t + VP_SLOPE) * np.exp(grown) / (2 * np.sqrt(np.expm1(grown)))
