"""A sampler that draws only where it is free to: what passes through it is edited, so every sampler inpaints.

Letters: x (B, C, h, w) holds noise of level sigma; `clean` is the picture's latents, which what is not free keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

from torch import Tensor

from sfumato.diffusion.samplers.registry import Steps, passed_through
from sfumato.types import Answer, Query

Free = Callable[[float], Tensor]  # sigma -> (1 or B, 1, h, w) in [0, 1]: how free each cell is at that level


def masked(steps: Steps, clean: Tensor, free: Free) -> Steps:
    """`steps`, whose every answer is `clean` (1 or B, C, h, w) where it is not `free`.

    As x0 is known there, the sampler's own formulas keep x at clean + sigma noise of their right level, fresh noise
    included: what RePaint (Lugmayr et al. 2022, algorithm 1) and diffusers write into x after each step. A mask that
    frees more from step to step is differential diffusion (Levin & Fried 2023).
    """

    def ask(query: Query) -> Generator[Query, Answer, Answer]:
        answer = yield query
        share = free(query.sigma)

        def kept(x0: Tensor) -> Tensor:
            return clean + share * (x0 - clean)

        uncond = None if answer.uncond is None else kept(answer.uncond)
        cond = None if answer.cond is None else kept(answer.cond)
        return replace(answer, x0=kept(answer.x0), uncond=uncond, cond=cond)

    return passed_through(steps, ask)


def hard(mask: Tensor) -> Free:
    """The same mask (1, 1, h, w) at every level: 1 is free."""
    return lambda sigma: mask


def soft(mask: Tensor, sigmas: list[float]) -> Free:
    """A cell of mask m in [0, 1] is kept for the first 1 - m of the steps of `sigmas`, then free (Levin & Fried 2023).

    Where m is 0 it is never free.
    """
    num_steps = max(1, len(sigmas) - 1)

    def free(sigma: float) -> Tensor:
        step = max((index for index, level in enumerate(sigmas) if level >= sigma * (1 - 1e-6)), default=0)
        return ((mask > 0) & (1 - mask <= min(step, num_steps - 1) / num_steps)).to(mask.dtype)

    return free


def renoised(steps: Steps, clean: Tensor, free: Tensor, noise: Tensor) -> Steps:
    """`steps`, whose queries from the second on hold clean + sigma `noise` where nothing is free.

    diffusers' inpainting pipelines write that into x after each step, also where a sampler adds fresh noise and where
    x began from noise alone.
    """
    is_first = True

    def ask(query: Query) -> Generator[Query, Answer, Answer]:
        nonlocal is_first
        if not is_first:
            query = replace(query, x=(1 - free) * (clean + query.sigma * noise) + free * query.x)
        is_first = False
        return (yield query)

    return passed_through(steps, ask)


def ended(steps: Steps, clean: Tensor, free: Free, sigma: float) -> Steps:
    """`steps`, of whose last x, at level `sigma`, what is kept is the picture's own latents with no noise left."""
    x = yield from steps
    share = free(sigma)
    # at a last level above 0 x is decoded in variance-preserving scale
    return (1 - share) * (1 + sigma**2) ** 0.5 * clean + share * x
