"""Noise from the caller's generators, drawn as diffusers draws it, and shared among the runs of one call.

Letters: B pictures of the call, C channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from sfumato.diffusion.noise import SeededNoise

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


class BatchNoise:
    """Noise (B, C, h, w) from one generator, on its device and in the model's dtype, or a row from each of several.

    None is torch's own generator. `latents`, where given, are the first noise, and nothing is drawn for it; `scale` is
    that of the first noise.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        generator: Generators,
        device: torch.device,
        dtype: torch.dtype,
        latents: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        if isinstance(generator, Sequence) and len(generator) != shape[0]:
            raise ValueError(f"generator: {len(generator)} are given, {shape[0]} are needed, one for each picture")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: the shape {tuple(latents.shape)} is given, {shape} is needed")
        self.shape, self.generator, self.device, self.dtype = shape, generator, device, dtype
        first = self._draw() if latents is None else latents.detach().to(device, torch.float32)
        self._draws = [first * scale]
        self._paths: SeededNoise | None = None

    def draw(self, place: int, rows: slice) -> Tensor:
        """Rows of the noise at a place in the order of drawing."""
        while len(self._draws) <= place:
            self._draws.append(self._draw())
        return self._draws[place][rows]

    def between(self, sigma: float, sigma_next: float, rows: slice) -> Tensor:
        """Rows of Brownian noise, of paths whose seeds the generator gives."""
        if self._paths is None:
            first = self.generator[0] if isinstance(self.generator, Sequence) else self.generator
            home = "cpu" if first is None else first.device
            seeds = torch.randint(2**62, (self.shape[0],), generator=first, device=home).tolist()
            self._paths = SeededNoise(seeds, self.shape[1:], self.device)
        return self._paths.between(sigma, sigma_next)[rows]

    def _draw(self) -> Tensor:
        if isinstance(self.generator, Sequence):
            return torch.cat([self._randn((1, *self.shape[1:]), each) for each in self.generator])
        return self._randn(self.shape, self.generator)

    def _randn(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        home = self.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=home, dtype=self.dtype).to(self.device, torch.float32)


class Share:
    """The rows of a BatchNoise that are one run's: each call gives the next noise."""

    def __init__(self, batch: BatchNoise, rows: slice) -> None:
        self.batch, self.rows, self.place = batch, rows, 0

    def __call__(self) -> Tensor:
        self.place += 1
        return self.batch.draw(self.place - 1, self.rows)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return self.batch.between(sigma, sigma_next, self.rows)
