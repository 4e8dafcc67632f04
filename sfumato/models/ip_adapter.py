"""IP-Adapter: a picture as a prompt. Tokens made of its CLIP embedding, and keys and values of their own for them.

Ye et al. 2023, section 3.2; the plain kind, and "plus" with a resampler. Names as in the published files. Knows nothing
of CLIP's networks, nor of files. Letters: B batch, N tokens of the picture, D width of the context, M tokens of CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.models.layers import attend, check_heads
from sfumato.models.transformer import CrossAttention, TransformerBlock
from sfumato.models.unet import UNet


@dataclass(frozen=True)
class IPAdapterConfig:
    """Shape of what makes a picture's tokens. The defaults are those of the plain one for SD 1.x.

    `image_dim` is the width of what CLIP gives: its embedding, or in "plus" (`depth` above 0) its last tokens but one
    layer. `width` is the resampler's own, of heads of `head_channels`.
    """

    image_dim: int = 1024
    context_dim: int = 768
    num_tokens: int = 4
    depth: int = 0
    width: int = 768
    head_channels: int = 64
    num_heads: int = 12


class ImageTokens(nn.Module):
    """CLIP's embedding (B, image_dim) -> tokens (B, N, D)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.image_dim, config.num_tokens * config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)

    def forward(self, seen: Tensor) -> Tensor:
        return self.norm(self.proj(seen).unflatten(1, (-1, self.norm.normalized_shape[0])))


class PerceiverAttention(nn.Module):
    """Attention of the latents (B, N, W) to CLIP's tokens (B, M, W) and to themselves (Jaegle et al. 2021)."""

    def __init__(self, width: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = check_heads(inner, num_heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), k.contiguous(), v.contiguous(), self.num_heads))


class Resampler(nn.Module):
    """CLIP's tokens (B, M, image_dim) -> tokens (B, N, D): learned latents that look at them, layer after layer."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width, inner = config.width, config.num_heads * config.head_channels
        self.latents = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.proj_in = nn.Linear(config.image_dim, width)
        self.proj_out = nn.Linear(width, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, inner, config.num_heads),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(config.depth)
        )

    def forward(self, seen: Tensor) -> Tensor:
        latents, x = self.latents.expand(seen.shape[0], -1, -1), self.proj_in(seen)
        for layer in self.layers:
            parts = layer.children()
            latents = latents + next(parts)(latents, x)
            latents = latents + next(parts)(latents)
        return self.norm_out(self.proj_out(latents))


class KeysValues(nn.Module):
    """What one cross-attention of the U-Net, `dim` wide, reads the picture's tokens with."""

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


def cross_attentions(unet: UNet) -> list[CrossAttention]:
    """The U-Net's attentions to the context in the order of the published files: down, up, middle."""
    sides: tuple[nn.Module, ...] = (unet.input_blocks, unet.output_blocks, unet.middle_block)
    return [part.attn2 for side in sides for part in side.modules() if isinstance(part, TransformerBlock)]


class IPAdapter(nn.Module):
    """What CLIP sees of pictures, (B, image_dim) or in "plus" (B, M, image_dim), -> tokens (B, N, D).

    `steering` lets a U-Net read them. `ip_adapter` holds a `KeysValues` for each of its attentions to the context, by
    the odd numbers that the files have.
    """

    def __init__(self, config: IPAdapterConfig, dims: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.image_proj: nn.Module = Resampler(config) if config.depth else ImageTokens(config)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * index + 1): KeysValues(dim, config.context_dim) for index, dim in enumerate(dims)}
        )

    @property
    def plus(self) -> bool:
        """Whether it wants CLIP's last tokens but one layer instead of its embedding."""
        return self.config.depth > 0

    def forward(self, seen: Tensor) -> Tensor:
        dimensions = 3 if self.plus else 2
        if seen.ndim != dimensions or seen.shape[-1] != self.config.image_dim:
            needed = f"(B, M, {self.config.image_dim})" if self.plus else f"(B, {self.config.image_dim})"
            raise ValueError(f"seen: of shape {tuple(seen.shape)}, {needed} is needed")
        return self.image_proj(seen)

    @contextmanager
    def steering(self, unet: UNet, tokens: Tensor, scale: float | Sequence[float] = 1.0) -> Iterator[None]:
        """Inside, the U-Net's attentions to the context also read `tokens` (its batch or 1, N, D), Ye et al., eq. 5.

        `scale` weighs what they read: one number, or one for each attention in the order of `cross_attentions`; 0
        leaves that attention as it is, to the bit. For one thread's calls at a time; several adapters add up.
        ValueError where the U-Net is another kind's.
        """
        attentions = cross_attentions(unet)
        scales = [scale] * len(attentions) if isinstance(scale, (int, float)) else list(scale)
        parts: list[Any] = list(self.ip_adapter.values())
        widths = [attention.to_q.out_features for attention in attentions]
        if widths != [part.to_k_ip.out_features for part in parts]:
            raise ValueError(f"unet: {len(widths)} attentions to the context, the adapter is for {len(parts)} others")
        if len(scales) != len(attentions):
            raise ValueError(f"scale: {len(scales)} given, one number or {len(attentions)} are needed")
        handles: list[RemovableHandle] = []
        try:
            for attention, part, weight in zip(attentions, parts, scales, strict=True):
                if weight:
                    handles += _reading(attention, part, tokens, float(weight))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _reading(attention: CrossAttention, part: KeysValues, tokens: Tensor, weight: float) -> list[RemovableHandle]:
    """Hooks that add what the queries find in the tokens to what `to_out` is given."""
    queries: list[Tensor] = []
    k, v = part.to_k_ip(tokens), part.to_v_ip(tokens)

    def keep(_: nn.Module, __: Any, q: Tensor) -> None:
        queries[:] = [q]

    def add(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q = queries.pop()
        batch = q.shape[0]
        own = (k.expand(batch, -1, -1), v.expand(batch, -1, -1)) if k.shape[0] == 1 else (k, v)
        found = attend(
            q, own[0].contiguous(), own[1].contiguous(), attention.num_heads, query_rows=attention.query_rows
        )
        return (given[0] + weight * found, *given[1:])

    before: Callable[..., Any] = add
    return [attention.to_q.register_forward_hook(keep), attention.to_out.register_forward_pre_hook(before)]
