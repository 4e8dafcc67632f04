"""RRDBNet, the network of ESRGAN and Real-ESRGAN: pictures (B, 3, H, W) in [0, 1] -> (B, 3, H s, W s), about [0, 1].

Wang et al. 2018 (ESRGAN) and 2021 (Real-ESRGAN): dense blocks in residual blocks, then nearest enlargement by 2 with a
convolution after each. Knows nothing of files. Names as in the published Real-ESRGAN files.
Letters: B batch, H W pixels, s scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of every leaky ReLU: the published code of ESRGAN
RESIDUAL = 0.2  # what a dense block adds is multiplied by it: Wang et al. 2018, section 3.1


@dataclass(frozen=True)
class RRDBNetConfig:
    """Shape of an RRDBNet. The defaults are RealESRGAN_x4plus: 16,697,987 parameters; its anime_6B has 6 blocks.

    A picture is first folded `unshuffle` x `unshuffle` pixels into one, then enlarged by 2 as often as `scale` asks.
    Real-ESRGAN's x2 is scale 2 with unshuffle 2, its x1 is scale 1 with unshuffle 4; ESRGAN's own x1, x2 and x8 fold
    nothing.
    """

    in_channels: int = 3
    out_channels: int = 3
    features: int = 64
    blocks: int = 23
    growth: int = 32
    scale: int = 4
    unshuffle: int = 1

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "features", "blocks", "growth", "scale", "unshuffle"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: 1 or more is needed")
        enlarged = self.scale * self.unshuffle
        if enlarged & (enlarged - 1):
            raise ValueError(f"scale={self.scale}: times unshuffle={self.unshuffle} it must be a power of two")

    @property
    def upsamplings(self) -> int:
        """How often the features are enlarged by 2."""
        return (self.scale * self.unshuffle).bit_length() - 1

    @property
    def reach(self) -> int:
        """How far, in pixels of the input, a pixel of the result can see."""
        behind = sum(0.5**step for step in range(1, self.upsamplings + 1)) + 2 * 0.5**self.upsamplings
        return math.ceil((2 + 15 * self.blocks + behind) * self.unshuffle)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE, inplace=True)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all before it: (B, D, h, w) -> the same."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = _conv(features, growth)
        self.conv2 = _conv(features + growth, growth)
        self.conv3 = _conv(features + 2 * growth, growth)
        self.conv4 = _conv(features + 3 * growth, growth)
        self.conv5 = _conv(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat([seen, _leaky(conv(seen))], dim=1)
        return x + RESIDUAL * self.conv5(seen)


class ResidualBlock(nn.Module):
    """Three dense blocks beside the identity ("RRDB"): (B, D, h, w) -> the same."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(features, growth)
        self.rdb2 = DenseBlock(features, growth)
        self.rdb3 = DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """The whole network; the enlarging convolutions are `conv_up1`, `conv_up2`, as many as there are enlargements."""

    def __init__(self, config: RRDBNetConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features
        self.conv_first = _conv(config.in_channels * config.unshuffle**2, features)
        self.body = nn.Sequential(*(ResidualBlock(features, config.growth) for _ in range(config.blocks)))
        self.conv_body = _conv(features, features)
        for step in range(1, config.upsamplings + 1):
            self.add_module(f"conv_up{step}", _conv(features, features))
        self.conv_hr = _conv(features, features)
        self.conv_last = _conv(features, config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [0, 1] -> (B, 3, H s, W s), about [0, 1], not clamped. Any size."""
        height, width = x.shape[-2:]
        x = self.conv_first(F.pixel_unshuffle(_to_multiple(x, self.config.unshuffle), self.config.unshuffle))
        x = x + self.conv_body(self.body(x))
        for step in range(1, self.config.upsamplings + 1):
            conv = self.get_submodule(f"conv_up{step}")
            x = _leaky(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        x = self.conv_last(_leaky(self.conv_hr(x)))
        return x[..., : height * self.config.scale, : width * self.config.scale]


def _to_multiple(x: Tensor, multiple: int) -> Tensor:
    """x with its right and lower edges mirrored to a multiple; where it is too small for that, repeated."""
    height, width = x.shape[-2:]
    down, across = -height % multiple, -width % multiple
    if not down and not across:
        return x
    mode = "reflect" if down < height and across < width else "replicate"
    return F.pad(x, (0, across, 0, down), mode=mode)
