"""DPM-Solver++: exponential integrators on x0, without noise (ODE) and with it (SDE). Lu et al. 2022b.

Letters: lambda = -log sigma, h a step in lambda. Between levels x0 is taken as a polynomial in lambda, so that a step
is x sigma_next / sigma + (1 - e^-h) x0 and corrections; the SDE has h (1 + eta) in place of h and adds noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import ancestral_split, phi
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Query

SOLVERS = ("midpoint", "heun")


@sampler("DPM++ 2S a", "dpmpp_2s_a", "DPMPP2SAncestralSampler", schedule="karras")
def dpmpp_2s_a(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """DPM-Solver++(2S), Lu et al. 2022b, algorithm 1 with r = 1/2, in ancestral steps (k-diffusion).

    Order 2 where eta is 0, 2n - 1 evaluations where it ends at 0.
    """
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x0 = (yield Query(x, sigma)).x0
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0 = (yield Query(x0 + middle / sigma * (x - x0), middle)).x0
        x = x0 + down / sigma * (x - x0)
        if up:
            x = x + s_noise * up * noise()
    return x


@sampler("DPM++ 2S", "DPMSolverSinglestepScheduler", schedule="karras")
def dpmpp_2s(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2S), Lu et al. 2022b, algorithm 1 with r = 1/2: `dpmpp_2s_a` without noise.

    Order 2, 2n - 1 evaluations. diffusers' scheduler takes every second level as the middle of a step instead, so that
    its n counts evaluations.
    """
    return (yield from dpmpp_2s_a(x, sigmas, noise, eta=0.0))


@sampler("DPM++ SDE", "DPMSolverSDEScheduler", schedule="karras")
def dpmpp_sde(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5
) -> Steps:
    """Katherine Crowson's stochastic DPM-Solver++(S) in k-diffusion: algorithm 1 of Lu et al. 2022b, each of whose two
    stages is an ancestral step, with Brownian noise. Order 2 where eta is 0, 2n - 1 evaluations where it ends at 0."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        middle = sigma * (sigma_next / sigma) ** r
        down, up = ancestral_split(sigma, middle, eta)
        trial = x0 + down / sigma * (x - x0)
        if up:
            trial = trial + s_noise * up * noise.between(sigma, middle)
        x0_middle = (yield Query(trial, middle)).x0
        down, up = ancestral_split(sigma, sigma_next, eta)
        estimate = x0 + (x0_middle - x0) / (2 * r)
        x = estimate + down / sigma * (x - estimate)
        if up:
            x = x + s_noise * up * noise.between(sigma, sigma_next)
    return x


@sampler("DPM++ 2M", "DPMSolverMultistepScheduler", "DPMPP2MSampler", "DPM-Solver", "DPM-Solver++", schedule="karras")
def dpmpp_2m(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2. Order 2, n evaluations."""
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


@sampler("DPM++ 2M SDE", schedule="exponential")
def dpmpp_2m_sde(
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
) -> Steps:
    """SDE-DPM-Solver++(2M), Lu et al. 2022b, appendix (multistep, second order), with Brownian noise (k-diffusion).

    `solver` "midpoint" or "heun" weighs the difference of the last two x0. Order 2 where eta is 0, n evaluations.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: one of {', '.join(SOLVERS)}")
    last: tuple[float, Tensor] | None = None
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        span = h * (1 + eta)
        x = math.exp(-span) * x - math.expm1(-span) * x0
        if last is not None:
            h_last, x0_last = last
            weight = -math.expm1(-span) / 2 if solver == "midpoint" else 1 - phi(1, -span)
            x = x + weight * h / h_last * (x0 - x0_last)
        if eta:
            x = x + _brownian(noise, sigma, sigma_next, eta, s_noise)
        last = (h, x0)
    return x


def _brownian(noise: Noise, sigma: float, sigma_next: float, eta: float, s_noise: float) -> Tensor:
    """The noise that the SDE gathers on its way to sigma_next: variance sigma_next^2 (1 - e^(-2 eta h))."""
    gathered = -math.expm1(-2 * eta * math.log(sigma / sigma_next))
    return s_noise * sigma_next * math.sqrt(gathered) * noise.between(sigma, sigma_next)


@sampler("DPM++ 2M SDE Heun", schedule="exponential")
def dpmpp_2m_sde_heun(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """`dpmpp_2m_sde` with the weights of Heun's method. Order 2 where eta is 0, n evaluations."""
    return (yield from dpmpp_2m_sde(x, sigmas, noise, eta=eta, s_noise=s_noise, solver="heun"))


@sampler("DPM++ 3M SDE", schedule="exponential", discard=True)
def dpmpp_3m_sde(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Katherine Crowson's third order of SDE-DPM-Solver++ in k-diffusion: Newton's parabola through three x0.

    Order 3 where eta is 0, n evaluations.
    """
    past: list[tuple[float, Tensor]] = []  # (step in lambda after it, x0), the newest last
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        span = h * (1 + eta)
        x = math.exp(-span) * x - math.expm1(-span) * x0
        phi_2 = 1 - phi(1, -span)  # k-diffusion's name; in units of the step h
        if len(past) == 2:
            (h_2, x0_2), (h_1, x0_1) = past
            r0, r1 = h_1 / h, h_2 / h
            d0, d1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            bend = (d0 - d1) / (r0 + r1)
            x = x + phi_2 * (d0 + r0 * bend) - (phi_2 / span - 0.5) * bend
        elif past:
            h_1, x0_1 = past[-1]
            x = x + phi_2 * h / h_1 * (x0 - x0_1)
        if eta:
            x = x + _brownian(noise, sigma, sigma_next, eta, s_noise)
        past = [*past[-1:], (h, x0)]
    return x


@sampler("DPM++ 3M", schedule="karras")
def dpmpp_3m(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(3M): `dpmpp_3m_sde` without noise. Order 3, n evaluations."""
    return (yield from dpmpp_3m_sde(x, sigmas, noise, eta=0.0))
