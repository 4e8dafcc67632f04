"""HED: a VGG16 with a way out at each of its five scales, that finds soft edges (Xie and Tu 2015).

Names as in ControlNet's own file of it, and `fuse`, which that file does without. Letters: B batch, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.layers import Conv2d


@dataclass(frozen=True)
class HEDConfig:
    """Widths and numbers of the convolutions at each scale: VGG16's (Simonyan and Zisserman 2015)."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs: tuple[int, ...] = (2, 2, 3, 3, 3)


class Scale(nn.Module):
    """Convolutions at one scale, (B, C, h, w) -> the same of another width; `projection` is its way out."""

    def __init__(self, in_channels: int, channels: int, count: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (count - 1)
        self.convs = nn.ModuleList(Conv2d(width, channels, 3, padding=1) for width in widths)
        self.projection = Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


class HED(nn.Module):
    """(B, 3, H, W) in [0, 255], RGB -> (B, 1, H, W) in [0, 1], 1 an edge. Any size.

    As it is made, `fuse` is the mean of the five ways out.
    """

    def __init__(self, config: HEDConfig | None = None) -> None:
        super().__init__()
        config = config or HEDConfig()
        self.config = config
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        before = (3, *config.widths)
        for index, (width, count) in enumerate(zip(config.widths, config.convs, strict=True)):
            self.add_module(f"block{index + 1}", Scale(before[index], width, count))
        scales = len(config.widths)
        self.fuse = Conv2d(scales, 1, 1)
        nn.init.constant_(self.fuse.weight, 1 / scales)
        nn.init.zeros_(self.fuse.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = x - self.norm
        found = []
        for index in range(len(self.config.widths)):
            if index:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            scale = self.get_submodule(f"block{index + 1}")
            x = scale(x)
            side = scale.get_submodule("projection")(x)
            found.append(F.interpolate(side, size=size, mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(found, dim=1)))
