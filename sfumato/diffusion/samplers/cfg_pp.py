"""CFG++ (Chung et al. 2024): the guided x0 is kept, but noise is put back along the unconditional slope.

Where an answer has no unconditional x0, at guidance 1, these are the plain samplers. The paper's guidance lies in
[0, 1]; A1111 divides the number that people type by 12.5 to get there, ComfyUI takes it as it is. n evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.exponential import gradient_steps, res_steps
from sfumato.diffusion.samplers.formulas import ancestral_split
from sfumato.diffusion.samplers.registry import Steps, sampler
from sfumato.types import Answer, Query


def _uncond(answer: Answer) -> Tensor:
    return answer.x0 if answer.uncond is None else answer.uncond


@sampler("Euler CFG++")
def euler_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Chung et al. 2024, algorithm 2 in sigmas: x = x0 + sigma_next (x - uncond) / sigma. Order 1."""
    return (yield from euler_a_cfg_pp(x, sigmas, noise, eta=0.0))


@sampler("Euler a CFG++")
def euler_a_cfg_pp(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """`euler_cfg_pp` in ancestral steps, as ComfyUI's. Order 1 where eta is 0."""
    for sigma, sigma_next in pairwise(sigmas):
        answer = yield Query(x, sigma)
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = answer.x0 + down / sigma * (x - _uncond(answer))
        if up:
            x = x + s_noise * up * noise()
    return x


@sampler("DDIM CFG++", schedule="ddim", start="prior")
def ddim_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Steps:
    """Chung et al. 2024, algorithm 2 (DDIM with CFG++), on DDIM's levels, as A1111's. Order 1."""
    return (yield from euler_a_cfg_pp(x, sigmas, noise, eta=eta))


@sampler("DPM++ 2S a CFG++", "dpmpp_2s_a_cfg_pp", schedule="karras")
def dpmpp_2s_a_cfg_pp(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """`dpmpp_2s_a` along the unconditional x0, then what guidance added at the step's start, as ComfyUI's.

    2n - 1 evaluations where it ends at 0; the last step there gives the guided x0.
    """
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral_split(sigma, sigma_next, eta)
        answer = yield Query(x, sigma)
        uncond = _uncond(answer)
        guided = answer.x0 - uncond
        if down > 0:
            middle = math.sqrt(sigma * down)
            uncond = _uncond((yield Query(uncond + middle / sigma * (x - uncond), middle)))
        x = uncond + down / sigma * (x - uncond) + guided
        if up:
            x = x + s_noise * up * noise()
    return x


@sampler("DPM++ 2M CFG++", schedule="karras")
def dpmpp_2m_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """`dpmpp_2m` whose noise is unconditional, as ComfyUI's: its difference is guided x0 less the last unconditional.

    At guidance 1 it is `dpmpp_2m`.
    """
    last: tuple[float, Tensor] | None = None
    for sigma, sigma_next in pairwise(sigmas):
        answer = yield Query(x, sigma)
        if sigma_next == 0:
            return answer.x0
        uncond, h = _uncond(answer), math.log(sigma / sigma_next)
        x = answer.x0 + math.exp(-h) * (x - uncond)
        if last is not None:
            h_last, uncond_last = last
            x = x - math.expm1(-h) * h / (2 * h_last) * (answer.x0 - uncond_last)
        last = (h, uncond)
    return x


@sampler("RES multistep CFG++", "res_multistep_cfg_pp")
def res_multistep_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """`res_multistep` along the unconditional x0, as ComfyUI's."""
    return (yield from res_steps(x, sigmas, noise, 0.0, 1.0, cfg_pp=True))


@sampler("RES multistep a CFG++", "res_multistep_ancestral_cfg_pp")
def res_multistep_a_cfg_pp(
    x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """`res_multistep_a` along the unconditional x0, as ComfyUI's."""
    return (yield from res_steps(x, sigmas, noise, eta, s_noise, cfg_pp=True))


@sampler("Gradient estimation CFG++", "gradient_estimation_cfg_pp")
def gradient_estimation_cfg_pp(x: Tensor, sigmas: Sequence[float], noise: Noise, *, gamma: float = 2.0) -> Steps:
    """`gradient_estimation` with unconditional slopes, as ComfyUI's."""
    return (yield from gradient_steps(x, sigmas, gamma, cfg_pp=True))
