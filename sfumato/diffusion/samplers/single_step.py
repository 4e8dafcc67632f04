"""Samplers of higher order that ask several times within a step and remember nothing between steps.

Letters: d = (x - x0) / sigma is dx/dsigma (Karras et al. 2022, eq. 3); n steps; `sigmas` fall, the last often 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import ancestral_split, churn, churn_gamma, lowest
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Query


@sampler("Heun", "HeunDiscreteScheduler", "HeunEDMSampler")
def heun(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """Karras et al. 2022, algorithm 2 (Heun's method). Order 2, 2n - 1 evaluations where it ends at 0."""
    gamma = churn_gamma(s_churn, len(sigmas) - 1)
    for sigma, sigma_next in pairwise(sigmas):
        x, raised = churn(x, sigma, gamma, noise, s_tmin, s_tmax, s_noise)
        x = yield from _heun_step(x, raised, sigma_next)
    return x


def _heun_step(x: Tensor, sigma: float, sigma_next: float) -> Steps:
    d = (x - (yield Query(x, sigma)).x0) / sigma
    trial = x + (sigma_next - sigma) * d
    if sigma_next == 0:  # the slope has no value there
        return trial
    d_next = (trial - (yield Query(trial, sigma_next)).x0) / sigma_next
    return x + (sigma_next - sigma) * (d + d_next) / 2


@sampler("HeunPP2", "Heun++ 2", "heunpp")
def heunpp2(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """Heun++ of Carzit's sd-webui-samplers-scheduler, in Forge and ComfyUI: no paper. 3n - 3 evaluations.

    The slopes at this level and the two that follow are averaged with weights proportional to sigma / sigma_first,
    which is Heun's mean only at the very first step: the order is 1.
    """
    gamma = churn_gamma(s_churn, len(sigmas) - 1)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, raised = churn(x, sigma, gamma, noise, s_tmin, s_tmax, s_noise)
        ahead = list(sigmas[index + 1 : min(index + 3, len(sigmas) - 1)])  # the last level's slope is not asked for
        trial, level, slopes = x, raised, [(x - (yield Query(x, raised)).x0) / raised]
        for following in ahead:
            trial = trial + (following - level) * slopes[-1]
            slopes.append((trial - (yield Query(trial, following)).x0) / following)
            level = following
        weights = [following / (len(slopes) * sigmas[0]) for following in ahead]
        slope = (1 - sum(weights)) * slopes[0]
        for weight, ahead_slope in zip(weights, slopes[1:], strict=True):
            slope = slope + weight * ahead_slope
        x = x + (sigma_next - raised) * slope
    return x


@sampler("DPM2", "dpm_2", "KDPM2DiscreteScheduler", schedule="karras", discard=True)
def dpm2(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1) as k-diffusion has it: the slope at the geometric mean of two levels.

    The step itself is taken in sigma, not by the paper's exponential. Order 2, 2n - 1 evaluations where it ends at 0.
    """
    gamma = churn_gamma(s_churn, len(sigmas) - 1)
    for sigma, sigma_next in pairwise(sigmas):
        x, raised = churn(x, sigma, gamma, noise, s_tmin, s_tmax, s_noise)
        x = yield from _midpoint_step(x, raised, sigma_next)
    return x


def _midpoint_step(x: Tensor, sigma: float, sigma_next: float) -> Steps:
    slope = (x - (yield Query(x, sigma)).x0) / sigma
    if sigma_next > 0:
        middle = math.sqrt(sigma * sigma_next)
        trial = x + (middle - sigma) * slope
        slope = (trial - (yield Query(trial, middle)).x0) / middle
    return x + (sigma_next - sigma) * slope


@sampler("DPM2 a", "dpm_2_a", "KDPM2AncestralDiscreteScheduler", schedule="karras", discard=True)
def dpm2_a(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """`dpm2` to the lower level of an ancestral step, then fresh noise (k-diffusion). 2n - 1 evaluations."""
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = yield from _midpoint_step(x, sigma, down)
        if up:
            x = x + s_noise * up * noise()
    return x


@sampler("Restart", schedule="karras")
def restart(x: Tensor, sigmas: Sequence[float], noise: Noise, *, s_noise: float = 1.0) -> Steps:
    """Xu et al. 2023 (Restart Sampling), algorithm 2, with Heun's steps and A1111's plan. Order 2 between restarts.

    With 20 steps or more the levels are laid anew: Karras levels down to 0.1, back up to 2 by fresh noise and down
    again, once with 9 levels, or from 36 steps on twice with n // 4, so that there are about n steps as well.
    """
    level = sigmas[0]
    for sigma, sigma_next in _restart_plan(list(sigmas)):
        if sigma > level * (1 + 1e-9):  # more than rounding
            x = x + s_noise * math.sqrt(sigma**2 - level**2) * noise()
        x = yield from _heun_step(x, sigma, sigma_next)
        level = sigma_next
    return x


def _restart_plan(sigmas: list[float]) -> list[tuple[float, float]]:
    """The steps (from, to) in order; a `from` above the `to` before it is a restart."""
    num_steps = len(sigmas) - 1
    if num_steps < 20:
        return list(pairwise(sigmas))
    again, times = (num_steps // 4, 2) if num_steps >= 36 else (9, 1)
    down = _karras_between(sigmas[0], lowest(sigmas), num_steps - again * times)
    turn = min(range(len(down)), key=lambda i: abs(down[i] - 0.1))  # A1111's restart_list: {0.1: [.., .., 2]}
    top = min(range(len(down)), key=lambda i: abs(down[i] - 2.0))
    plan = list(pairwise(down[: turn + 1]))
    if top < turn:
        plan += list(pairwise(_karras_between(down[top], down[turn], again + 1))) * times
    end = [0.0] if sigmas[-1] == 0 else []
    return plan + list(pairwise([*down[turn:], *end]))


def _karras_between(high: float, low: float, n: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5: n levels from high to low, both included."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [float((first + ramp * (last - first)) ** rho) for ramp in np.linspace(0, 1, n)]
