"""The compact upscaler of Real-ESRGAN ("SRVGG"): pictures (B, 3, H, W) in [0, 1] -> (B, 3, H s, W s), about [0, 1].

A row of convolutions at the small size, a pixel shuffle, and the picture itself, enlarged plainly, added to it.
Real-ESRGAN's animevideov3 (16 convolutions) and general-x4v3 (32). Knows nothing of files. Names as in those files.
Letters: B batch, H W pixels, s scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SRVGGConfig:
    """Shape of a compact network. The defaults are realesr-animevideov3: 621,424 parameters.

    `shuffle` is what the network itself enlarges by; None is `scale`. Where it is larger than `scale`, the result is
    made smaller with a bicubic filter, as in the x2 and x3 that Real-ESRGAN publishes beside animevideov3.
    """

    in_channels: int = 3
    out_channels: int = 3
    features: int = 64
    convs: int = 16
    scale: int = 4
    shuffle: int | None = None

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "features", "scale"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: 1 or more is needed")
        if self.convs < 0:
            raise ValueError(f"convs={self.convs}: 0 or more is needed")
        if self.in_channels != self.out_channels:
            raise ValueError(f"out_channels={self.out_channels}: as many as in_channels={self.in_channels} are needed")
        if self.inner < self.scale:
            raise ValueError(f"shuffle={self.shuffle}: scale={self.scale} or more is needed")

    @property
    def inner(self) -> int:
        """What the network itself enlarges by."""
        return self.scale if self.shuffle is None else self.shuffle

    @property
    def reach(self) -> int:
        """How far, in pixels of the input, a pixel of the result can see; one more where the result is made smaller."""
        return self.convs + 2 + (self.inner != self.scale)


class SRVGG(nn.Module):
    """The network; `body` holds convolutions at even places and PReLUs at odd ones."""

    def __init__(self, config: SRVGGConfig) -> None:
        super().__init__()
        self.config = config
        width = config.features
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, width, 3, padding=1), nn.PReLU(width)]
        for _ in range(config.convs):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)]
        layers.append(nn.Conv2d(width, config.out_channels * config.inner**2, 3, padding=1))
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [0, 1] -> (B, 3, H s, W s), about [0, 1], not clamped. Any size."""
        inner, scale = self.config.inner, self.config.scale
        out = F.pixel_shuffle(self.body(x), inner) + F.interpolate(x, scale_factor=float(inner), mode="nearest")
        if inner != scale:
            size = (x.shape[-2] * scale, x.shape[-1] * scale)
            out = F.interpolate(out, size=size, mode="bicubic", align_corners=False)
        return out
