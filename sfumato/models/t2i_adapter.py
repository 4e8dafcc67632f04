"""T2I-Adapter: a small network that makes features of a hint once, which the U-Net's encoder is given at every step.

Mou et al. 2023, section 3.2; the full, the light and the XL kind. Names as in TencentARC's files. Knows nothing of what
the hint shows. Letters: B batch, H W pixels, f how many times the cells of the first feature are larger than a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.layers import Conv2d
from sfumato.models.residuals import Residuals

KINDS = ("full", "light", "xl")


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Shape of an adapter. The defaults are the full one of SD 1.x: 77,369,280 parameters.

    `channels` are the widths of the four features, which are the U-Net's; `factor` is f, of `xl` twice the
    autoencoder's. `unet_blocks` are the U-Net's res blocks a level, which tell where features go.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    factor: int = 8
    kind: str = "full"
    unet_blocks: int = 2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: one of {', '.join(KINDS)}")
        if self.kind == "xl" and len(self.channels) != 4:
            raise ValueError(f"channels={self.channels}: an adapter of the kind xl has four widths")


class AdapterBlock(nn.Module):
    """(B, C, h, w) -> (B, C', h, w), or half as large where `down`."""

    def __init__(self, in_channels: int, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.block1 = Conv2d(channels, channels, 3, padding=1)
        self.block2 = Conv2d(channels, channels, 1)
        if in_channels != channels:
            self.in_conv = Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = _halved(x)
        if hasattr(self, "in_conv"):
            x = self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class LightResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = Conv2d(channels, channels, 3, padding=1)
        self.block2 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class LightBlock(nn.Module):
    """As `AdapterBlock`, computed at a quarter of the width, and all res blocks of a feature in one."""

    def __init__(self, in_channels: int, channels: int, count: int, down: bool) -> None:
        super().__init__()
        self.down = down
        narrow = channels // 4
        self.in_conv = Conv2d(in_channels, narrow, 1)
        self.body = nn.Sequential(*(LightResBlock(narrow) for _ in range(count)))
        self.out_conv = Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.body(self.in_conv(_halved(x) if self.down else x)))


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, stride=2, ceil_mode=True)


class T2IAdapter(nn.Module):
    """hint (B, C, H, W) in [0, 1] -> Residuals, computed once for all steps.

    H and W must be multiples of f. Where the adapter reads one channel, a hint of three is averaged. ValueError where
    the hint does not fit.
    """

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        channels, count = config.channels, config.num_res_blocks
        inside = config.in_channels * config.factor**2
        blocks: list[nn.Module] = []
        if config.kind == "light":
            before = (inside, *channels)
            for index, width in enumerate(channels):
                blocks.append(LightBlock(before[index], width, count, down=index > 0))
        else:
            halving = (2,) if config.kind == "xl" else range(1, len(channels))
            self.conv_in = Conv2d(inside, channels[0], 3, padding=1)
            for index, width in enumerate(channels):
                before_width = channels[max(index - 1, 0)]
                blocks.append(AdapterBlock(before_width, width, down=index in halving))
                blocks += [AdapterBlock(width, width, down=False) for _ in range(count - 1)]
        self.body = nn.ModuleList(blocks)

    def features(self, hint: Tensor) -> list[Tensor]:
        """The features (B, C_i, h_i, w_i), finest first."""
        config = self.config
        if hint.ndim == 4 and hint.shape[1] == 3 and config.in_channels == 1:
            hint = hint.mean(dim=1, keepdim=True)
        wrong = hint.ndim != 4 or hint.shape[1] != config.in_channels or any(n % config.factor for n in hint.shape[2:])
        if wrong:
            needed = f"(B, {config.in_channels}, H, W), H and W multiples of {config.factor}"
            raise ValueError(f"hint: of shape {tuple(hint.shape)}, {needed}, is needed")
        first = next(self.parameters())
        x = F.pixel_unshuffle(hint.to(first.dtype), config.factor)
        if config.kind != "light":
            x = self.conv_in(x)
        each = 1 if config.kind == "light" else config.num_res_blocks
        found: list[Tensor] = []
        for index, block in enumerate(self.body):
            x = block(x)
            if index % each == each - 1:
                found.append(x)
        return found

    def forward(self, hint: Tensor) -> Residuals:
        """Behind the last res block of each level; of `xl` the first behind the halving, the last behind the middle."""
        found, level = self.features(hint), self.config.unet_blocks + 1
        if self.config.kind != "xl":
            return Residuals(inner={index * level + level - 1: x for index, x in enumerate(found)})
        return Residuals(middle=found[3], inner={level: found[0], 2 * level - 1: found[1], 3 * level - 1: found[2]})
