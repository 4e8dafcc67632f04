"""The noise levels that a network was trained at: how much noise a timestep holds, and adding it.

Knows no network and no file, nor which levels a sampler visits (`schedule.py`). Letters: T training timesteps, sigma
noise level of x = x0 + sigma noise (Karras et al. 2022), abar the cumulative product of 1 - beta (Ho et al. 2020);
sigma^2 = (1 - abar) / abar.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LAST_ABAR = 2.0**-24  # diffusers' stand-in for the abar of 0 at zero terminal SNR, so that sigma is 4096, not infinite


@dataclass(frozen=True)
class ScheduleConfig:
    """Betas whose square roots are linear ("scaled linear", Rombach et al. 2022); the defaults are SD 1.x's.

    `zero_terminal_snr` moves the last level to pure noise (Lin et al. 2023, algorithm 1). Its sigma would be infinite:
    it is cut at 4096, as diffusers and ComfyUI do. Only networks that predict v can be asked there.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    zero_terminal_snr: bool = False


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
        if config.zero_terminal_snr:
            self.alphas_cumprod = _to_zero_terminal_snr(self.alphas_cumprod)
        self.sigmas = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
        self.log_sigmas = np.log(self.sigmas)

    @property
    def sigma_min(self) -> float:
        """The lowest trained level, timestep 0's."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest trained level, timestep T - 1's."""
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


def _to_zero_terminal_snr(abar: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, algorithm 1: sqrt(abar) is shifted to end at 0 and stretched to begin where it began."""
    root = np.sqrt(abar)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.append(root[:-1] ** 2, LAST_ABAR)
