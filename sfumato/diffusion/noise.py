"""Randomness of pictures: one generator a seed, so that picture i does not depend on its batch.

Owns where noise is drawn (the CPU's generator, the device's, or a CUDA device's computed), and how one seed's noise is
mixed with or resized from another. Knows no sampler. Letters: B pictures, C channels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sfumato.diffusion.philox import PhiloxGenerator

MAX_SEED = 2**63 - 1
SOURCES = ("cpu", "device", "philox")
WIDEST = (1e-4, 1e4)  # levels between which Brownian noise is laid where the run's own are not given


class Noise(Protocol):
    """What a sampler draws from: calls give the next noise (B, C, h, w) ~ N(0, 1).

    `between(sigma, sigma_next)` is the noise of that stretch of one Brownian path in sigma, of unit variance whatever
    its length: the same path for every number of steps.
    """

    def __call__(self) -> Tensor: ...

    def between(self, sigma: float, sigma_next: float) -> Tensor: ...


@dataclass(frozen=True)
class NoiseSpec:
    """How the noise of a job is drawn; the defaults are the plain noise of the seeds, drawn on the CPU.

    source: "cpu" (the same on every machine), "device" (the model's own), "philox" (a CUDA device's, computed).
    variation_seed and variation_strength in [0, 1]: the first noise turns that far towards the noise of another seed;
    picture i has variation_seed + i. resize_from (height, width) of latents: the first noise is drawn at that size and
    laid in the middle of new noise. ensd: after the first noise, picture i goes on from seed + ensd (A1111's "eta
    noise seed delta").
    """

    source: str = "cpu"
    variation_seed: int | None = None
    variation_strength: float = 0.0
    resize_from: tuple[int, int] | None = None
    ensd: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r}: one of {', '.join(SOURCES)}")
        if not 0 <= self.variation_strength <= 1:
            raise ValueError(f"variation_strength={self.variation_strength}: 0 to 1 are allowed")
        if self.variation_strength > 0 and self.variation_seed is None:
            raise ValueError("variation_seed=None: variation_strength needs one")
        if self.variation_seed is not None and not 0 <= self.variation_seed <= MAX_SEED:
            raise ValueError(f"variation_seed={self.variation_seed}: 0 to {MAX_SEED} are allowed")
        if self.resize_from is not None and min(self.resize_from) < 1:
            raise ValueError(f"resize_from={self.resize_from}: a height and a width of 1 or more are needed")

    @property
    def varies(self) -> bool:
        """Whether a second seed's noise is mixed in."""
        return self.variation_strength > 0

    def seeds(self, seed: int, count: int) -> tuple[int, ...]:
        """The seed of each picture of a job: seed + i, but all the same where their variation seeds differ."""
        return (seed,) * count if self.varies else tuple(range(seed, seed + count))


class SeededNoise:
    """Calls give noise (B, C, h, w) ~ N(0, 1); row i is the next draw of the generator of seeds[i].

    `sigmas` are the levels of the whole run, whose ends are those of the Brownian path of `between`: they must be given
    for the same noise as k-diffusion's BrownianTreeNoiseSampler, which A1111 and ComfyUI use.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        spec: NoiseSpec = NoiseSpec(),
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self.seeds, self.shape, self.device, self.spec = tuple(seeds), shape, torch.device(device), spec
        self._span = WIDEST
        if sigmas is not None:
            self._span = (
                round(min(sigma for sigma in sigmas if sigma > 0), 6),
                round(max(sigmas), 6),
            )  # as the tree does
        self._generators = [_Generator(seed, spec.source, self.device) for seed in seeds]
        self._trees: list[Any] = []
        self._is_first = True

    def __call__(self) -> Tensor:
        if self._is_first:
            self._is_first = False
            rows = [self._first(index) for index in range(len(self.seeds))]
            if self.spec.ensd:
                self._generators = [self._fresh(seed + self.spec.ensd) for seed in self.seeds]
        else:
            rows = [generator.randn(self.shape) for generator in self._generators]
        return torch.stack(rows).to(self.device)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """Levi's path of each seed (torchsde's BrownianTree), from sigma to a lower sigma_next > 0, divided by
        sqrt(sigma - sigma_next)."""
        if not self._trees:
            self._trees = [self._tree(seed) for seed in self.seeds]
        low, high = sorted((sigma, sigma_next))
        low, high = max(low, self._span[0]), min(high, self._span[1])
        sign = -1 if sigma > sigma_next else 1
        rows = [tree(low, high) * (sign / math.sqrt(high - low)) for tree in self._trees]
        return torch.stack(rows).to(self.device)

    def _tree(self, seed: int) -> Any:
        from torchsde import BrownianTree  # here, because it takes long to load and few samplers need it

        home = self.device if self.spec.source == "device" else "cpu"
        return BrownianTree(t0=self._span[0], w0=torch.zeros(self.shape, device=home), t1=self._span[1], entropy=seed)

    def _fresh(self, seed: int) -> _Generator:
        return _Generator(seed, self.spec.source, self.device)

    def _first(self, index: int) -> Tensor:
        """The noise that a picture starts from."""
        spec, seed, generator = self.spec, self.seeds[index], self._generators[index]
        size = self.shape if spec.resize_from is None else (self.shape[0], *spec.resize_from)
        noise = generator.randn(self.shape) if size == self.shape else self._fresh(seed).randn(size)
        if spec.varies:
            other = self._fresh(int(spec.variation_seed or 0) + index).randn(size)
            noise = slerp(noise, other, spec.variation_strength)
        return noise if size == self.shape else _laid_in_the_middle(noise, generator.randn(self.shape))


class _Generator:
    """A seed's generator, of whichever source."""

    def __init__(self, seed: int, source: str, device: torch.device) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed={seed}: 0 to {MAX_SEED} are allowed")
        self.device = device if source == "device" else torch.device("cpu")
        self.philox = PhiloxGenerator(seed) if source == "philox" else None
        self.torch = None if source == "philox" else torch.Generator(self.device).manual_seed(seed)

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        if self.philox is not None:
            return torch.from_numpy(self.philox.randn(shape))
        return torch.randn(shape, generator=self.torch, device=self.device)


def slerp(low: Tensor, high: Tensor, strength: float) -> Tensor:
    """Turn noise `low` (C, h, w) by `strength` of the angle to `high`, each column of h numbers by its own angle.

    Shoemake 1985, with A1111's choice of dimension; columns that are almost parallel, a mean cosine above 0.9995, are
    mixed linearly. (A1111 swaps the two weights there, which only seeds that are equal can meet.)
    """
    cosine = ((low / low.norm(dim=1, keepdim=True)) * (high / high.norm(dim=1, keepdim=True))).sum(dim=1)
    if float(cosine.mean()) > 0.9995:
        return (1 - strength) * low + strength * high
    angle = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))[:, None]  # a column that is parallel would divide 0 by 0
    return (torch.sin((1 - strength) * angle) * low + torch.sin(strength * angle) * high) / torch.sin(angle)


def _laid_in_the_middle(noise: Tensor, ground: Tensor) -> Tensor:
    """`ground` (C, h, w) with the middle of `noise` (C, H, W) over its own middle, cut where it is larger.

    Offsets are half the difference of the sizes rounded down, as A1111's, so that an odd one lies to the top left.
    """
    target, source = [slice(None)], [slice(None)]
    for have, want in zip(noise.shape[1:], ground.shape[1:], strict=True):
        offset = (want - have) // 2
        length = have if offset >= 0 else have + 2 * offset
        target.append(slice(max(offset, 0), max(offset, 0) + length))
        source.append(slice(max(-offset, 0), max(-offset, 0) + length))
    ground = ground.clone()
    ground[tuple(target)] = noise[tuple(source)]
    return ground
