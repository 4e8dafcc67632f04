"""What other networks add inside the U-Net for one call: the answers of ControlNets and T2I-Adapters.

Letters: B batch (1 stands for all), C_i and h_i x w_i the channels and the size where a residual is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """Tensors (B, C_i, h_i, w_i) to add. Nothing in it: the U-Net's answer is as without it, to the bit.

    `skips`, one for each of the U-Net's `input_blocks` or none at all, are added to what these hand to the up path,
    `middle` to what the middle block makes (ControlNet, Zhang et al. 2023). `inner` is added behind the input block of
    that index, so that both its skip and the next block see it (T2I-Adapter, Mou et al. 2023).
    """

    skips: tuple[Tensor, ...] = ()
    middle: Tensor | None = None
    inner: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inner) + len(self.skips) + (self.middle is not None)

    def __add__(self, other: Residuals) -> Residuals:
        """Both; ValueError where both have skips, but not as many."""
        if self.skips and other.skips and len(self.skips) != len(other.skips):
            raise ValueError(f"skips: {len(self.skips)} and {len(other.skips)} residuals are of different U-Nets")
        skips = tuple(a + b for a, b in zip(self.skips, other.skips, strict=True)) if self.skips and other.skips else ()
        middle = self.middle if other.middle is None else other.middle
        if self.middle is not None and other.middle is not None:
            middle = self.middle + other.middle
        inner = dict(self.inner)
        for index, residual in other.inner.items():
            inner[index] = inner[index] + residual if index in inner else residual
        return Residuals(skips or self.skips or other.skips, middle, inner)

    def scaled(self, weights: float | Sequence[float]) -> Residuals:
        """Each times the weight, or times its own: `inner` by index, then `skips`, then `middle`.

        ValueError where there are not as many weights as residuals.
        """
        if isinstance(weights, (int, float)):
            weights = [weights] * len(self)
        if len(weights) != len(self):
            raise ValueError(f"weights: {len(weights)} given, one number or {len(self)} are needed")
        own: Iterator[float] = iter(weights)
        inner = {index: self.inner[index] * next(own) for index in sorted(self.inner)}
        skips = tuple(skip * next(own) for skip in self.skips)
        return Residuals(skips, None if self.middle is None else self.middle * next(own), inner)

    def check(self, num_blocks: int) -> None:
        """ValueError where it is not for a U-Net of so many input blocks."""
        if self.skips and len(self.skips) != num_blocks:
            raise ValueError(f"skips: {len(self.skips)} residuals, this U-Net has {num_blocks} input blocks")
        if wrong := [index for index in self.inner if not 0 <= index < num_blocks]:
            raise ValueError(f"inner: block {wrong[0]}, this U-Net has input blocks 0 to {num_blocks - 1}")
