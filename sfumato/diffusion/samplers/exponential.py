"""More exponential integrators on x0, with and without noise: RES, ER-SDE, SEEDS, and gradient estimation.

Letters: lambda = -log sigma, h a step in lambda; phi_k the functions of Hochbruck & Ostermann 2010, equation 2.10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import ancestral_split, phi
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Query


@sampler("RES multistep", "res_multistep")
def res_multistep(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Zhang et al. 2023 (RES, improved order conditions), its second-order multistep. Order 2, n evaluations."""
    return (yield from res_multistep_a(x, sigmas, noise, eta=0.0))


@sampler("RES multistep a", "res_multistep_ancestral")
def res_multistep_a(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """`res_multistep` in ancestral steps, as ComfyUI's. Order 2 where eta is 0, n evaluations."""
    return (yield from res_steps(x, sigmas, noise, eta, s_noise, cfg_pp=False))


def res_steps(x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float, s_noise: float, cfg_pp: bool) -> Steps:
    """The steps of all four; `cfg_pp` moves along the unconditional x0 and shifts x by what guidance adds."""
    last: tuple[float, float, Tensor] | None = None  # (level before, level that its step went down to, x0)
    for sigma, sigma_next in pairwise(sigmas):
        answer = yield Query(x, sigma)
        x0 = answer.uncond if cfg_pp and answer.uncond is not None else answer.x0
        down, up = ancestral_split(sigma, sigma_next, eta)
        if down == 0 or last is None:
            x = answer.x0 + down / sigma * (x - x0)
        else:
            before, went_down_to, x0_last = last
            h = math.log(sigma / down)
            c2 = math.log(went_down_to / before) / h  # where the last x0 lies, in steps: below 0
            b2 = phi(2, -h) / c2
            x = math.exp(-h) * (x + answer.x0 - x0) + h * ((phi(1, -h) - b2) * x0 + b2 * x0_last)
        if up:
            x = x + s_noise * up * noise()
        last = (sigma, down, x0)
    return x


@sampler("Gradient estimation", "gradient_estimation", "euler_ge")
def gradient_estimation(x: Tensor, sigmas: Sequence[float], noise: Noise, *, gamma: float = 2.0) -> Steps:
    """Permenter & Yuan 2024, algorithm 2: Euler's step with the slope gamma d - (gamma - 1) d_last. n evaluations.

    gamma = 1 is Euler, 3/2 the second-order Adams-Bashforth; the authors' 2 is of order 1. A last 0 gets x0 itself.
    """
    return (yield from gradient_steps(x, sigmas, gamma, cfg_pp=False))


def gradient_steps(x: Tensor, sigmas: Sequence[float], gamma: float, cfg_pp: bool) -> Steps:
    """The steps of both; `cfg_pp` takes the slope from the unconditional x0."""
    d_last: Tensor | None = None
    for sigma, sigma_next in pairwise(sigmas):
        answer = yield Query(x, sigma)
        if sigma_next == 0:
            return answer.x0
        uncond = answer.uncond if cfg_pp and answer.uncond is not None else answer.x0
        d = (x - uncond) / sigma
        x = answer.x0 + sigma_next * d
        if d_last is not None:
            x = x + (gamma - 1) * (sigma_next - sigma) * (d - d_last)
        d_last = d
    return x


@sampler("ER-SDE", "er_sde", "ERSDEScheduler")
def er_sde(x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 3, s_noise: float = 1.0) -> Steps:
    """Cui et al. 2023 (Elucidating the solution space), VE ER-SDE-Solver of order 1 to 3, equations 20 to 22.

    The noise function is the authors' fifth, x (e^(x^0.3) + 10); its two integrals are sums of 200 terms, as in their
    code and ComfyUI's. n evaluations.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order={order}: 1, 2 or 3 are allowed")
    past: list[tuple[float, Tensor]] = []  # (level, x0), then (level, first difference), newest last
    slope_last: Tensor | None = None
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        ratio = _er_noise(sigma_next) / _er_noise(sigma)
        x = ratio * x + (1 - ratio) * x0
        if order > 1 and past:
            step = sigma_next - sigma
            places = sigma_next - step / 200 * np.arange(200)
            parts = -step / 200 / np.array([_er_noise(float(place)) for place in places])
            slope = (x0 - past[-1][1]) / (sigma - past[-1][0])
            x = x + (step + float(parts.sum()) * _er_noise(sigma_next)) * slope
            if order > 2 and slope_last is not None:
                bend = (slope - slope_last) / ((sigma - past[-2][0]) / 2)
                x = x + (step**2 / 2 + float((parts * (places - sigma)).sum()) * _er_noise(sigma_next)) * bend
            slope_last = slope
        past = [*past[-1:], (sigma, x0)]
        x = x + s_noise * math.sqrt(max(sigma_next**2 - (sigma * ratio) ** 2, 0.0)) * noise()
    return x


def _er_noise(level: float) -> float:
    return level * (math.exp(level**0.3) + 10)


@sampler("SEEDS 2", "seeds_2")
def seeds_2(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Steps:
    """Gonzalez et al. 2023 (SEEDS-2), on x0 as ComfyUI's. Order 2 where eta is 0, 2n - 1 evaluations."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        middle = sigma * (sigma_next / sigma) ** r
        wind = _Wind(noise, sigma, eta, s_noise)
        trial = _decayed(x, sigma, middle, eta, x0) + wind.blow(middle)
        x0_middle = (yield Query(trial, middle)).x0
        estimate = x0 + (x0_middle - x0) / (2 * r)
        x = _decayed(x, sigma, sigma_next, eta, estimate) + wind.blow(sigma_next)
    return x


@sampler("SEEDS 3", "seeds_3")
def seeds_3(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Steps:
    """Gonzalez et al. 2023 (SEEDS-3) with r1 = 1/3, r2 = 2/3, as ComfyUI's. Order 3 where eta is 0, 3n - 2
    evaluations."""
    r1, r2 = 1 / 3, 2 / 3
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        early, late = (sigma * (sigma_next / sigma) ** r for r in (r1, r2))
        span = math.log(sigma / sigma_next) * (1 + eta)
        wind = _Wind(noise, sigma, eta, s_noise)
        trial = _decayed(x, sigma, early, eta, x0) + wind.blow(early)
        slope = ((yield Query(trial, early)).x0 - x0) / r1
        trial = _decayed(x, sigma, late, eta, x0) + r2**2 * span * phi(2, -r2 * span) * slope + wind.blow(late)
        slope = ((yield Query(trial, late)).x0 - x0) / r2
        x = _decayed(x, sigma, sigma_next, eta, x0) + span * phi(2, -span) * slope + wind.blow(sigma_next)
    return x


def _decayed(x: Tensor, sigma: float, sigma_next: float, eta: float, x0: Tensor) -> Tensor:
    """The exact step of the SDE towards a constant x0, without its noise."""
    left = (sigma_next / sigma) ** (1 + eta)
    return left * x + (1 - left) * x0


class _Wind:
    """The SDE's noise from a level down, gathered over its stages so that they share one path."""

    def __init__(self, noise: Noise, sigma: float, eta: float, s_noise: float) -> None:
        self.noise, self.level, self.eta, self.s_noise = noise, sigma, eta, s_noise
        self.gathered: Tensor | float = 0.0  # in units of the level

    def blow(self, sigma_next: float) -> Tensor | float:
        """What there is at sigma_next: the last decays, and new noise of variance 1 - e^(-2 eta h) comes."""
        if self.eta == 0 or self.s_noise == 0:
            return 0.0
        decay = (sigma_next / self.level) ** self.eta
        self.gathered = decay * self.gathered + math.sqrt(1 - decay**2) * self.noise()
        self.level = sigma_next
        return self.s_noise * sigma_next * self.gathered


@sampler("Exponential Heun x0", "exp_heun_2_x0")
def exp_heun_2_x0(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Hochbruck & Ostermann 2010, equation 5.1 (exponential Heun) on x0 in lambda, as ComfyUI's. Order 2, 2n - 1
    evaluations."""
    return (yield from exp_heun_2_x0_sde(x, sigmas, noise, eta=0.0))


@sampler("Exponential Heun x0 SDE", "exp_heun_2_x0_sde")
def exp_heun_2_x0_sde(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """`exp_heun_2_x0` for the SDE of SEEDS. Order 2 where eta is 0, 2n - 1 evaluations."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        span = math.log(sigma / sigma_next) * (1 + eta)
        blown = _Wind(noise, sigma, eta, s_noise).blow(sigma_next)
        x = _decayed(x, sigma, sigma_next, eta, x0) + blown
        x = x + span * phi(2, -span) * ((yield Query(x, sigma_next)).x0 - x0)
    return x
