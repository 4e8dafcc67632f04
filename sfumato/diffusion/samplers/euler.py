"""Samplers of first order: one evaluation a step, from a level to the next by a straight line.

Letters: d = (x - x0) / sigma is dx/dsigma (Karras et al. 2022, eq. 3); n steps; `sigmas` fall, the last often 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import ancestral_split, churn, churn_gamma
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig
from sfumato.types import Query


@sampler("Euler", "EulerDiscreteScheduler", "EulerEDMSampler", "EDMEulerScheduler")
def euler(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """Karras et al. 2022, algorithm 2 without its correction: Euler's method. Order 1, n evaluations."""
    gamma = churn_gamma(s_churn, len(sigmas) - 1)
    for sigma, sigma_next in pairwise(sigmas):
        x, raised = churn(x, sigma, gamma, noise, s_tmin, s_tmax, s_noise)
        x0 = (yield Query(x, raised)).x0
        x = x + (sigma_next - raised) * (x - x0) / raised
    return x


@sampler("Euler a", "EulerAncestralDiscreteScheduler", "EulerAncestralSampler")
def euler_a(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Euler's step to a lower level, then fresh noise back up to the next (Song et al. 2021, eq. 16, in sigmas).

    eta = 1 is the ancestral sampling of Ho et al. 2020, eta = 0 is Euler. Order 1, n evaluations.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = x + (down - sigma) * (x - x0) / sigma
        if up:
            x = x + s_noise * up * noise()
    return x


@sampler("DDIM", "DDIMScheduler", "DDIMParallelScheduler", schedule="ddim", start="prior")
def ddim(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Steps:
    """Song et al. 2021, equation 12; eta = 0 is deterministic, eta = 1 is DDPM's variance. Order 1, n evaluations.

    In sigmas the equation is the ancestral Euler step: only the levels visited and the start are DDIM's own.
    """
    return (yield from euler_a(x, sigmas, noise, eta=eta))


@sampler("DDPM", "DDPMScheduler", "DDPMParallelScheduler", start="prior")
def ddpm(x: Tensor, sigmas: Sequence[float], noise: Noise, *, s_noise: float = 1.0) -> Steps:
    """Ho et al. 2020, algorithm 2 with the smaller variance (eq. 7), between any two levels. Order 1, n evaluations.

    That posterior is DDIM's with eta = 1, so in sigmas it is the ancestral Euler step again.
    """
    return (yield from euler_a(x, sigmas, noise, eta=1.0, s_noise=s_noise))


@sampler("LCM", "LCMScheduler", schedule="lcm")
def lcm(x: Tensor, sigmas: Sequence[float], noise: Noise, *, s_noise: float = 1.0) -> Steps:
    """Luo et al. 2023 (Latent Consistency Models), algorithm 3: x0, then noise of the next level. n evaluations.

    Only for networks that were distilled to it; it solves no equation and has no order. diffusers also mixes x0 with x
    by weights that are 1 and 0 within 1e-5 from timestep 19 on, the lowest that is visited.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x = (yield Query(x, sigma)).x0
        if sigma_next > 0:
            x = x + s_noise * sigma_next * noise()
    return x


@sampler("TCD", "TCDScheduler", schedule="lcm", start="prior")
def tcd(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.3,
    noise_schedule: NoiseSchedule | None = None,
) -> Steps:
    """Zheng et al. 2024 (Trajectory Consistency Distillation), algorithm 4; `eta` is the paper's gamma. n evaluations.

    From t to the timestep floor((1 - gamma) t_next) along the slope, then noise up to t_next; the last step adds none.
    Timesteps are those of `noise_schedule`, SD's own where it is None. gamma = 0 is Euler, for distilled networks.
    """
    levels = noise_schedule or NoiseSchedule(ScheduleConfig())
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = (yield Query(x, sigma)).x0
        down = sigma_next
        if eta > 0 and index < len(sigmas) - 2:
            down = levels.sigma(math.floor((1 - eta) * levels.timestep(sigma_next) + 1e-6))
        x = x0 + down * (x - x0) / sigma
        if down < sigma_next:
            x = x + math.sqrt(sigma_next**2 - down**2) * noise()
    return x
