"""What the tests and the benchmark of samplers share: data whose exact denoiser is known, and ways to run a sampler."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sfumato.diffusion.samplers import SAMPLERS, drive
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig, karras
from sfumato.types import Answer, Query

SD1 = NoiseSchedule(ScheduleConfig())
STD = 0.7  # s, the deviation of the Gaussian data
Denoise = Callable[[Query], Answer]


class Draws:
    """A Noise of one generator, in any precision; Brownian noise is drawn like any other."""

    def __init__(self, shape: Sequence[int], seed: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype, self.calls = tuple(shape), dtype, 0
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.randn(self.shape, generator=self.generator, dtype=self.dtype)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        assert sigma > sigma_next > 0
        return self()


class Silence:
    """A Noise that must not be asked."""

    def __call__(self) -> Tensor:
        raise AssertionError("a deterministic sampler asked for noise")

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        raise AssertionError("a deterministic sampler asked for noise")


def gaussian(query: Query) -> Answer:
    """The exact denoiser of data N(0, s^2)."""
    return Answer(query.x * STD**2 / (STD**2 + query.sigma**2))


CENTRES, SHARES, WIDTH = (-1.0, 1.5), (0.3, 0.7), 0.4  # of the mixture of two Gaussians


def two_humps(query: Query) -> Answer:
    """The exact denoiser of 0.3 N(-1, 0.4^2) + 0.7 N(1.5, 0.4^2), each number of x on its own."""
    var = WIDTH**2 + query.sigma**2
    centres = torch.tensor(CENTRES, dtype=query.x.dtype)
    offset = query.x[..., None] - centres
    logs = torch.tensor(SHARES, dtype=query.x.dtype).log() - offset**2 / (2 * var)
    posterior = centres + WIDTH**2 / var * offset
    return Answer((logs.softmax(dim=-1) * posterior).sum(dim=-1))


POINTS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def three_humps(x: Tensor, sigma: Tensor, width: float = 0.3, scale: float = 1.0) -> Tensor:
    """The exact denoiser of three Gaussians about `scale` POINTS; x (B, 2, 4, 4), sigma (B,): k-diffusion's form."""
    centres = scale * POINTS.to(x)
    var = width**2 + sigma.square()[:, None]
    distance = (x[:, None] - centres).square().sum(dim=(2, 3, 4))
    mean = torch.einsum("bk,kchw->bchw", (-distance / (2 * var)).softmax(dim=1), centres)
    return mean + (width**2 / var)[..., None, None] * (x - mean)


def alone(query: Query) -> Answer:
    """`three_humps` as an answer without guidance."""
    return Answer(three_humps(query.x, torch.full((len(query.x),), query.sigma, dtype=query.x.dtype)))


def guided(query: Query) -> Answer:
    """`three_humps` guided away from a broader mixture, 2.5 times."""
    sigma = torch.full((len(query.x),), query.sigma, dtype=query.x.dtype)
    uncond = three_humps(query.x, sigma, 0.5, 0.7)
    return Answer(uncond + 2.5 * (three_humps(query.x, sigma) - uncond), uncond)


def exact_gaussian(x: Tensor, sigma: float, sigma_end: float) -> Tensor:
    """The ODE's solution: x / sqrt(s^2 + sigma^2) stays."""
    return x * math.sqrt((STD**2 + sigma_end**2) / (STD**2 + sigma**2))


def exact_two_humps(x: Tensor, sigma: float, sigma_end: float, num_steps: int = 4000) -> Tensor:
    """The ODE's solution by the classical Runge-Kutta method of order 4 in log sigma, error below 1e-10."""

    def slope(x: Tensor, log_sigma: float) -> Tensor:
        return x - two_humps(Query(x, math.exp(log_sigma))).x0

    log_sigma, h = math.log(sigma), math.log(sigma_end / sigma) / num_steps
    for _ in range(num_steps):
        k1 = slope(x, log_sigma)
        k2 = slope(x + h / 2 * k1, log_sigma + h / 2)
        k3 = slope(x + h / 2 * k2, log_sigma + h / 2)
        k4 = slope(x + h * k3, log_sigma + h)
        x, log_sigma = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), log_sigma + h
    return x


def smooth(num_steps: int) -> list[float]:
    """Karras levels from the largest to the smallest trained sigma, without the 0 that hides the order."""
    return karras(SD1, num_steps + 1)[:-1]


def equal(num_steps: int) -> list[float]:
    """Equal steps in sigma, the case for which the weights of PLMS are made."""
    return [float(level) for level in np.linspace(3.0, 0.1, num_steps + 1)]


def run(
    name: str, x: Tensor, sigmas: Sequence[float], denoise: Denoise, noise: object = None, **options: object
) -> Tensor:
    """A sampler's final x; without a noise it must not ask for one."""
    return drive(SAMPLERS[name].run(x, sigmas, noise or Silence(), **options), denoise)


def orders(errors: Iterable[float]) -> list[float]:
    """log2 of each fall in error, for numbers of steps that double."""
    errors = list(errors)
    return [math.log2(before / after) for before, after in zip(errors, errors[1:], strict=False)]
