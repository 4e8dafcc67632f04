"""A sampler of one's own: one coroutine under a decorator, and it draws, inpaints, tiles and films like all others.

python examples/own_sampler.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato import Pipeline
from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.registry import SAMPLERS, Steps, sampler
from sfumato.types import Query

NAME = "midpoint"


def midpoint(x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """The slope in the middle of a step, in log sigma, for the whole of it (Runge's method). Order 2, 2n - 1 calls."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = (yield Query(x, sigma)).x0
        slope = (x - x0) / sigma
        if sigma_next > 0:
            middle = (sigma * sigma_next) ** 0.5
            there = x + (middle - sigma) * slope
            slope = (there - (yield Query(there, middle)).x0) / middle
        x = x + (sigma_next - sigma) * slope
    return x


def main(steps: int = 10) -> np.ndarray:
    """Register the sampler, draw with it, and take it out again; returns the picture (H, W, 3) uint8."""
    sampler("Midpoint", schedule="karras")(midpoint)
    try:
        result = Pipeline.from_pretrained()("a red apple on a blue background", seed=2, steps=steps, sampler=NAME)
    finally:
        del SAMPLERS[NAME]
    print(f"{result.job.sampler}, {result.job.schedule}: {result.seconds:.1f} s")
    return result.images[0]


if __name__ == "__main__":
    main()
