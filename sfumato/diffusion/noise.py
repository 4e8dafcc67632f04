"""Randomness of pictures: one generator a seed, so that picture i does not depend on its batch.

Drawn on the CPU in float32, then moved, so that a seed means the same noise on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1


class SeededNoise:
    """Calls give noise (B, C, h, w) ~ N(0, 1); row i is the next draw of the generator of seeds[i]."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.device = device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        rows = [torch.randn(self.shape, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self.device)
