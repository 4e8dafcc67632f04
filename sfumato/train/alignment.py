"""Representation alignment: what a diffusion model sees in a noisy latent is drawn to what a frozen network sees.

Yu et al. 2024 (REPA): features of a middle block, through a small projector, against the patch features of the clean
picture. Knows nothing of noise. Letters: B pictures, D width of the frozen features, C of the block, h w its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.train.data import LatentBatch
from sfumato.train.perceptual import Features

Teacher = Callable[[Any], Tensor]


def projector(in_channels: int, out_channels: int, hidden: int = 2048) -> nn.Sequential:
    """The trained map between the two: three layers with SiLU between them, at every cell (Yu et al. 2024, app. D)."""
    sizes = [(in_channels, hidden), (hidden, hidden), (hidden, out_channels)]
    first, second, third = (nn.Conv2d(before, after, 1) for before, after in sizes)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)


def teacher_of(features: Features, decode: Callable[[LatentBatch], Tensor] | None = None) -> Teacher:
    """Batch -> the last map (B, D, h, w) that frozen features see in its pictures.

    Pictures are the batch's `pixels`; where it has latents alone, `decode` makes pictures (B, 3, H, W) of it.
    """

    def teacher(batch: Any) -> Tensor:
        with torch.no_grad():
            return features(batch.pixels if decode is None else decode(batch))[-1]

    return teacher


class Alignment:
    """The term weight * -mean cos(projector(block's features), teacher(batch)), mean over cells and pictures.

    `block` names a module of `unet` whose answer is a map (B, C, h, w); the teacher's map is brought to its size.
    Yu et al. 2024 take the weight 0.5 and a block in the first half.
    """

    def __init__(
        self, unet: nn.Module, teacher: Teacher, projector: nn.Module, block: str = "middle_block", weight: float = 0.5
    ) -> None:
        if block not in dict(unet.named_modules()) or not block:
            raise ValueError(f"block={block!r}: the network has no module of that name")
        if not weight >= 0:
            raise ValueError(f"weight={weight}: 0 or more is needed")
        self.unet, self.teacher, self.projector = unet, teacher, projector
        self.block, self.weight = block, weight
        self._heard: Tensor | None = None

    def check(self, network: nn.Module) -> None:
        """ValueError where the projector is not among what is trained: it would stay as it began."""
        trained = {id(parameter) for parameter in network.parameters()}
        if any(id(parameter) not in trained for parameter in self.projector.parameters()):
            raise ValueError("network: the alignment's projector is not part of it")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the block's answer is kept for `loss`."""

        def keep(_module: nn.Module, _given: object, answer: Tensor) -> None:
            self._heard = answer

        hook = self.unet.get_submodule(self.block).register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()
            self._heard = None

    def loss(self, batch: Any) -> Tensor:
        """-1 where the two agree at every cell, 0 where they have nothing in common; () float32."""
        if self._heard is None:
            raise ValueError(f"block={self.block!r}: it was not asked while the alignment was listening")
        ours = self.projector(self._heard).float()
        theirs = F.interpolate(self.teacher(batch).float(), size=ours.shape[-2:], mode="bilinear", antialias=True)
        return -F.cosine_similarity(ours, theirs, dim=1).mean()
