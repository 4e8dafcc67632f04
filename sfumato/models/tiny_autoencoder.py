"""The tiny autoencoder: pictures (B, 3, H, W) in [-1, 1] <-> the latents that diffusion uses, for previews.

TAESD (Ollin Boer Bohan, 2023), distilled from the KL autoencoder. Knows nothing of files. Names as in
`taesd_encoder.pth` and `taesd_decoder.pth`, numbered layers, after the prefixes `encoder.` and `decoder.`.
The two halves work in [0, 1]; that stays inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Shape of the tiny autoencoder. The defaults are TAESD's for SD 1.x, 2.x and XL: 2,445,063 parameters.

    `blocks` counts the residual blocks of each resolution, finest first; the decoder mirrors the encoder.
    """

    latent_channels: int = 4  # 16 in the one for SD 3
    width: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)
    image_channels: int = 3

    @property
    def factor(self) -> int:
        """Pixels a latent cell spans in each direction."""
        return 2 ** (len(self.blocks) - 1)


def _conv(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """A soft limit at +-3, three deviations of the latents."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class Block(nn.Module):
    """Three convolutions beside the identity, no normalisation: (B, D, h, w) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def encoder(config: TinyAutoencoderConfig) -> nn.Sequential:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, z, H/f, W/f)."""
    width = config.width
    layers: list[nn.Module] = []
    for index, count in enumerate(config.blocks):
        layers.append(_conv(width, width, stride=2, bias=False) if index else _conv(config.image_channels, width))
        layers += [Block(width) for _ in range(count)]
    return nn.Sequential(*layers, _conv(width, config.latent_channels))


def decoder(config: TinyAutoencoderConfig) -> nn.Sequential:
    """Latents (B, z, h, w) -> images (B, 3, h f, w f), about [0, 1]."""
    width = config.width
    layers: list[nn.Module] = [Clamp(), _conv(config.latent_channels, width), nn.ReLU()]
    for index in reversed(range(len(config.blocks))):
        layers += [Block(width) for _ in range(config.blocks[index])]
        if index:
            layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
    return nn.Sequential(*layers, _conv(width, config.image_channels))


class TinyAutoencoder(nn.Module):
    """Both halves. Latents are in the scale of diffusion, deviation about 1; no `latent_scale` is applied."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], H and W divisible by the factor -> latents (B, z, H/f, W/f), no noise."""
        return self.encoder((images + 1) / 2)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, z, h, w) in the scale of diffusion -> images (B, 3, h f, w f), about [-1, 1], not clamped."""
        return 2 * self.decoder(z) - 1
