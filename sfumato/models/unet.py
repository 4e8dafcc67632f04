"""The U-Net that denoises latents: (x, t, context) -> prediction of x's shape.

Ho et al. 2020 and Dhariwal & Nichol 2021 (blocks), Rombach et al. 2022 section 3.3 (cross-attention). Knows nothing
of noise schedules or of what it predicts. Names as in `model.diffusion_model.*` of the original checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.layers import Upsample, attend, check_heads, group_norm, timestep_embedding, zero


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net. The defaults are Stable Diffusion 1.x: 859,520,964 parameters.

    `transformer_depth` gives the transformer blocks a resolution (0: none); `head_channels`, where given, replaces
    `num_heads`. `vector_dim` is the width of the pooled vector of SD XL, None where the family has none.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    context_dim: int = 768
    num_heads: int = 8
    head_channels: int | None = None
    linear_projection: bool = False
    vector_dim: int | None = None
    norm_groups: int = 32

    def heads(self, channels: int) -> int:
        """Attention heads at a width of `channels`."""
        return channels // self.head_channels if self.head_channels else self.num_heads


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            group_norm(in_channels, groups, 1e-5), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups, 1e-5),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original, unused there; it holds the place that the names count
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(out)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = check_heads(dim, num_heads)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.num_heads))


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, num_heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.attn1(z, z)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the h * w cells, between projections (1 x 1 convolutions, or linear from 2.x on)."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.linear_projection
        self.norm = group_norm(channels, config.norm_groups, 1e-6)
        self.proj_in = self._projection(channels)
        heads = config.heads(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_dim, heads) for _ in range(depth)
        )
        self.proj_out = zero(self._projection(channels))

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        z = self.norm(x)
        if not self.linear:
            z = self.proj_in(z)
        z = z.flatten(2).transpose(1, 2)  # (B, h w, C)
        if self.linear:
            z = self.proj_in(z)
        for block in self.transformer_blocks:
            z = block(z, context)
        if self.linear:
            z = self.proj_out(z)
        z = z.transpose(1, 2).reshape(batch, channels, height, width)
        if not self.linear:
            z = self.proj_out(z)
        return x + z


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.Sequential):
    """A sequence that hands the time embedding and the context to the parts that want them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context)
            else:
                x = part(x)
        return x


class UNet(nn.Module):
    """(x (B, C_in, h, w), t (B,) in [0, T), context (B, L, D), vector (B, V) or None) -> (B, C_out, h, w).

    h and w must be divisible by 2^(levels - 1).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if len(config.transformer_depth) != len(config.channel_mult):
            raise ValueError(
                f"transformer_depth={config.transformer_depth} must have one entry a level of {config.channel_mult}"
            )
        self.config = config
        base, groups, emb_dim = config.channels, config.norm_groups, 4 * config.channels
        self.time_embed = nn.Sequential(nn.Linear(base, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if config.vector_dim is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(config.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            )

        def level(in_channels: int, out_channels: int, depth: int) -> list[nn.Module]:
            parts: list[nn.Module] = [ResBlock(in_channels, out_channels, emb_dim, groups)]
            if depth:
                parts.append(SpatialTransformer(out_channels, depth, config))
            return parts

        channels = base
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, base, 3, padding=1))])
        skips = [base]
        last = len(config.channel_mult) - 1
        for index, (mult, depth) in enumerate(zip(config.channel_mult, config.transformer_depth, strict=True)):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Block(*level(channels, base * mult, depth)))
                channels = base * mult
                skips.append(channels)
            if index < last:
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        middle: list[nn.Module] = [ResBlock(channels, channels, emb_dim, groups)]
        if config.middle_depth:
            middle.append(SpatialTransformer(channels, config.middle_depth, config))
        self.middle_block = Block(*middle, ResBlock(channels, channels, emb_dim, groups))

        self.output_blocks = nn.ModuleList()
        for index in reversed(range(len(config.channel_mult))):
            width = base * config.channel_mult[index]
            for number in range(config.num_res_blocks + 1):
                parts = level(channels + skips.pop(), width, config.transformer_depth[index])
                channels = width
                if index > 0 and number == config.num_res_blocks:
                    parts.append(Upsample(channels, channels))
                self.output_blocks.append(Block(*parts))

        self.out = nn.Sequential(
            group_norm(channels, groups, 1e-5), nn.SiLU(), zero(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.config.channels).to(x.dtype))
        if self.config.vector_dim is not None:
            if vector is None:
                raise ValueError(f"vector: this U-Net needs a pooled vector (B, {self.config.vector_dim}), got None")
            emb = emb + self.label_emb(vector)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)
