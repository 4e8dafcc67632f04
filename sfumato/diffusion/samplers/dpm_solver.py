"""DPM-Solver on the noise (Lu et al. 2022a): the fixed plan "fast" and the one that chooses its steps, "adaptive".

Both go from the first level to the lowest above 0 and stop there: a last level of 0 is not reached, as in k-diffusion.
Letters: lambda = -log sigma, h a step in lambda, eps the noise (x - x0) / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import ancestral_split, lowest
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Answer, Query

Eps = Generator[Query, Answer, Tensor]
Pair = Generator[Query, Answer, tuple[Tensor, Tensor]]


def _eps(x: Tensor, sigma: float) -> Eps:
    return (x - (yield Query(x, sigma)).x0) / sigma


def _first(x: Tensor, sigma: float, sigma_next: float, eps: Tensor) -> Tensor:
    """Equation 3.7 (DPM-Solver-1), which is DDIM: sigma_next (e^h - 1) = sigma - sigma_next."""
    return x - (sigma - sigma_next) * eps


def _second(x: Tensor, sigma: float, sigma_next: float, eps: Tensor, r: float) -> Pair:
    """Algorithm 1 (DPM-Solver-2): x at sigma_next, and the noise found at the part r of the step in lambda."""
    middle = sigma * (sigma_next / sigma) ** r
    eps_r = yield from _eps(_first(x, sigma, middle, eps), middle)
    return _first(x, sigma, sigma_next, eps) - (sigma - sigma_next) / (2 * r) * (eps_r - eps), eps_r


def _third(x: Tensor, sigma: float, sigma_next: float, eps: Tensor, eps_r: Tensor) -> Steps:
    """Algorithm 2 (DPM-Solver-3) with r1 = 1/3, r2 = 2/3, given eps_r, the noise at r1."""
    r1, r2, h = 1 / 3, 2 / 3, math.log(sigma / sigma_next)
    late = sigma * (sigma_next / sigma) ** r2
    trial = _first(x, sigma, late, eps) - late * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * (eps_r - eps)
    eps_late = yield from _eps(trial, late)
    return _first(x, sigma, sigma_next, eps) - sigma_next / r2 * (math.expm1(h) / h - 1) * (eps_late - eps)


def _down_and_up(sigma: float, sigma_next: float, eta: float, low: float) -> tuple[float, float]:
    """Ancestral levels as k-diffusion: never below the lowest level, and the noise that is then missing."""
    down = max(ancestral_split(sigma, sigma_next, eta)[0], low) if eta else sigma_next
    return down, math.sqrt(max(sigma_next**2 - down**2, 0.0))


@sampler("DPM fast", "dpm_fast")
def dpm_fast(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0, s_noise: float = 1.0) -> Steps:
    """DPM-Solver-fast (Lu et al. 2022a, section 3.4): n evaluations in steps of order 3, the last of order 2 or 1.

    Steps are even in lambda between the first and the lowest level, whatever levels lie between.
    """
    n, low = len(sigmas) - 1, lowest(sigmas)
    m = n // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
    levels = [sigmas[0] * (low / sigmas[0]) ** (i / m) for i in range(m)] + [low]
    for order, sigma, sigma_next in zip(orders, levels, levels[1:], strict=False):
        down, up = _down_and_up(sigma, sigma_next, eta, low)
        eps = yield from _eps(x, sigma)
        if order == 1:
            x = _first(x, sigma, down, eps)
        elif order == 2:
            x, _ = yield from _second(x, sigma, down, eps, 1 / 2)
        else:
            _, eps_r = yield from _second(x, sigma, down, eps, 1 / 3)
            x = yield from _third(x, sigma, down, eps, eps_r)
        if up:
            x = x + s_noise * up * noise()
    return x


@sampler("DPM adaptive", "dpm_adaptive", "dpm_ad", alone=True)
def dpm_adaptive(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Steps:
    """DPM-Solver-12 and 23 (Lu et al. 2022a, algorithm 5 in appendix C) with k-diffusion's control of the step.

    Only the first and the lowest level of `sigmas` count; the number of evaluations follows from rtol and atol, `order`
    (2 or 3) for each step tried. Each picture takes its own steps, one picture after another.
    """
    if order not in (2, 3):
        raise ValueError(f"order={order}: 2 or 3 are allowed")
    if rtol <= 0 or atol <= 0 or h_init <= 0:
        raise ValueError(f"rtol={rtol}, atol={atol}, h_init={h_init}: numbers above 0 are needed")
    draws: list[Tensor] = []
    rows = []
    for index in range(len(x)):
        own = _OwnRow(noise, draws, index)
        rows.append((yield from _adaptive(x[index : index + 1], sigmas, own, order, rtol, atol, h_init, eta, s_noise)))
    return torch.cat(rows)


class _OwnRow:
    """Row `index` of a shared stream of noise, read at its own pace; `draws` holds what was drawn so far."""

    def __init__(self, noise: Noise, draws: list[Tensor], index: int) -> None:
        self.noise, self.draws, self.index, self.place = noise, draws, index, 0

    def __call__(self) -> Tensor:
        if self.place == len(self.draws):
            self.draws.append(self.noise())
        self.place += 1
        return self.draws[self.place - 1][self.index : self.index + 1]


def _adaptive(
    x: Tensor,
    sigmas: Sequence[float],
    noise: _OwnRow,
    order: int,
    rtol: float,
    atol: float,
    h: float,
    eta: float,
    s_noise: float,
) -> Steps:
    """One picture x (1, C, h, w). A step is taken where h grows by 0.81 or more (k-diffusion's accept_safety)."""
    sigma, low = sigmas[0], lowest(sigmas)
    x_low_before = x
    while math.log(sigma / low) > 1e-5:
        sigma_next = max(low, sigma * math.exp(-h))
        down, up = _down_and_up(sigma, sigma_next, eta, low)
        eps = yield from _eps(x, sigma)
        if order == 2:
            x_low = _first(x, sigma, down, eps)
            x_high, _ = yield from _second(x, sigma, down, eps, 1 / 2)
        else:
            x_low, eps_r = yield from _second(x, sigma, down, eps, 1 / 3)
            x_high = yield from _third(x, sigma, down, eps, eps_r)
        allowed = (rtol * torch.maximum(x_low.abs(), x_low_before.abs())).clamp(min=atol)
        error = float(((x_low - x_high) / allowed).square().mean().sqrt())
        factor = (1 / (error + 1e-8)) ** (1 / (1.5 if eta else order))
        factor = 1 + math.atan(factor - 1)  # never more than 2.57, smooth at 1
        h *= factor
        if factor >= 0.81:
            x_low_before, sigma = x_low, sigma_next
            x = x_high + s_noise * up * noise() if up else x_high
    return x
