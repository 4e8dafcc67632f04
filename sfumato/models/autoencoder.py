"""The KL autoencoder: pictures (B, 3, H, W) in [-1, 1] <-> latents (B, z, H/f, W/f), f = 2^(levels - 1).

Esser et al. 2021 (architecture), Rombach et al. 2022 section 3.1 (KL-regularised latents). Knows nothing of files
or of the scale of latents that diffusion uses: that belongs to the family. Names as in `first_stage_model.*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sfumato.models.layers import Conv2d, Upsample, attend, group_norm, pad

EPS = 1e-6  # of every group norm in the original autoencoder


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder. The defaults are kl-f8 of Stable Diffusion: 83,653,863 parameters."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    norm_groups: int = 32

    @property
    def factor(self) -> int:
        """Pixels a latent cell spans in each direction."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z | x): mean and log variance, each (B, z, h, w)."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with noise (B, z, h, w) ~ N(0, 1) given by the caller."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats for each picture, (B,): Kingma & Welling 2014, appendix B."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups, EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.norm1(x, silu=True))
        out = self.conv2(self.norm2(out, silu=True))
        return out + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the h * w cells, projections as 1 x 1 convolutions.

    `query_rows` bounds the scores (None: not at all): a head as wide as this may be one that a device cannot fuse.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.query_rows: int | None = None
        self.norm = group_norm(channels, groups, EPS)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        z = self.norm(x)
        q, k, v = (layer(z).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = attend(q, k, v, num_heads=1, query_rows=self.query_rows)
        return x + self.proj_out(out.transpose(1, 2).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2; the input is padded right and below only, as in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1), self.conv.wrap))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, then the change to the next; a name that is None is in no checkpoint."""

    def __init__(self, widths: list[int], groups: int, change: Downsample | Upsample | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(before, after, groups) for before, after in pairwise(widths))
        self.downsample = change if isinstance(change, Downsample) else None
        self.upsample = change if isinstance(change, Upsample) else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        change = self.downsample or self.upsample
        return change(x) if change else x


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, channels = config.norm_groups, config.channels
        self.conv_in = Conv2d(config.image_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, mult in enumerate(config.channel_mult):
            width = config.channels * mult
            change = Downsample(width) if index < len(config.channel_mult) - 1 else None
            self.down.append(Level([channels, *[width] * config.num_res_blocks], groups, change))
            channels = width
        self.mid = Middle(channels, groups)
        self.norm_out = group_norm(channels, groups, EPS)
        self.conv_out = Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x), silu=True))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, channels = config.norm_groups, config.channels * config.channel_mult[-1]
        self.conv_in = Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups)
        levels: list[nn.Module] = []
        for index in reversed(range(len(config.channel_mult))):
            width = config.channels * config.channel_mult[index]
            change = Upsample(width, width) if index > 0 else None
            levels.insert(0, Level([channels, *[width] * (config.num_res_blocks + 1)], groups, change))
            channels = width
        self.up = nn.ModuleList(levels)  # up.0 is the finest level in the checkpoints
        self.norm_out = group_norm(channels, groups, EPS)
        self.conv_out = Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
        return self.conv_out(self.norm_out(x, silu=True))


class Autoencoder(nn.Module):
    """Encoder and decoder with the 1 x 1 convolutions around the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """images (B, 3, H, W) in [-1, 1], H and W divisible by the factor -> posterior over (B, z, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))  # the bounds of the original

    def decode(self, z: Tensor) -> Tensor:
        """z (B, z, h, w), not scaled -> images (B, 3, h f, w f), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))
