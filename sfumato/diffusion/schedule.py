"""Noise schedules: how much noise a timestep holds, and which noise levels a sampler visits.

Knows no network and no file. Letters: T training timesteps, n sampling steps, sigma noise level of x = x0 + sigma noise
(Karras et al. 2022), abar the cumulative product of 1 - beta (Ho et al. 2020); sigma^2 = (1 - abar) / abar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ScheduleConfig:
    """Betas whose square roots are linear ("scaled linear", Rombach et al. 2022); the defaults are SD 1.x's."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000


class NoiseSchedule:
    """The T noise levels that a network was trained at, in double precision: `sigmas` (T,), rising.

    A sigma is a Python float and a timestep a float in [0, T - 1]; the two map onto one another linearly in
    log sigma between the trained levels, and exactly at them.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        if not 0 < config.beta_start <= config.beta_end < 1 or config.num_timesteps < 2:
            raise ValueError(f"schedule: {config} needs 0 < beta_start <= beta_end < 1 and two timesteps or more")
        self.config = config
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps) ** 2
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.sigmas = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
        self.log_sigmas = np.log(self.sigmas)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def sigma(self, t: float) -> float:
        """Noise level of the timestep t, clamped to [0, T - 1]."""
        return float(np.exp(np.interp(t, np.arange(len(self.sigmas)), self.log_sigmas)))

    def timestep(self, sigma: float) -> float:
        """Timestep of the noise level sigma > 0; levels outside the trained range give its ends."""
        return float(np.interp(np.log(sigma), self.log_sigmas, np.arange(len(self.sigmas))))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x = x0 + sigma noise at integer timesteps t (B,). Returns x (B, C, h, w) and sigma (B,) in float32."""
        sigma = torch.as_tensor(self.sigmas, dtype=torch.float32, device=x0.device)[t]
        return x0 + sigma[:, None, None, None] * noise, sigma


def uniform(schedule: NoiseSchedule, n: int) -> list[float]:
    """n timesteps evenly from T - 1 to 0, both included, then 0: k-diffusion's and A1111's default."""
    timesteps = np.linspace(len(schedule.sigmas) - 1, 0, n)
    return [schedule.sigma(float(t)) for t in timesteps] + [0.0]


def ddim(schedule: NoiseSchedule, n: int) -> list[float]:
    """Timesteps 1, 1 + c, 1 + 2c, ... with c = T // n, as the original DDIM and PLMS samplers: it ends at the
    smallest trained sigma, not at 0. Where n does not divide T there are more than n steps, as there."""
    total = len(schedule.sigmas)
    if n > total - 1:
        raise ValueError(f"steps={n}: the ddim schedule allows 1 to {total - 1}")
    timesteps = {min(t + 1, total - 1) for t in range(0, total, total // n)}
    return [float(schedule.sigmas[t]) for t in sorted(timesteps, reverse=True)] + [schedule.sigma_min]


def karras(schedule: NoiseSchedule, n: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5, between the smallest and the largest trained sigma, then 0."""
    low, high = schedule.sigma_min ** (1 / rho), schedule.sigma_max ** (1 / rho)
    return [float((high + ramp * (low - high)) ** rho) for ramp in np.linspace(0, 1, n)] + [0.0]


SCHEDULES: dict[str, Callable[[NoiseSchedule, int], list[float]]] = {"uniform": uniform, "ddim": ddim, "karras": karras}


def sampling_sigmas(name: str, schedule: NoiseSchedule, n: int) -> list[float]:
    """The noise levels that the named schedule visits in n >= 1 steps, falling; ValueError for an unknown name."""
    if n < 1:
        raise ValueError(f"steps={n}: 1 or more are needed")
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r}: one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](schedule, n)
