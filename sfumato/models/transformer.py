"""Attention over the cells of a feature map, to each other and to a context, and what one call asks of it.

Vaswani et al. 2017 (blocks), Rombach et al. 2022 section 3.3 (their context). Knows nothing of time or of the U-Net
around it. Names as in the original checkpoints.
Letters: B batch, C channels, h w size of a map, M cells that ask, L tokens of the context, D its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels.gated import gated
from sfumato.models.inference import Linear, Store, may_be_kept, plain, text_may_be_kept
from sfumato.models.layers import Conv2d, attend, attention_map, check_heads, group_norm, zero
from sfumato.models.merging import Merging


def self_attentions(module: nn.Module) -> list[CrossAttention]:
    """Those within a module, in order; an attention to the context alone (`cross_only`) is none."""
    return [part.attn1 for part in module.modules() if isinstance(part, TransformerBlock) and not part.cross_only]


@dataclass(frozen=True)
class Asked:
    """What one call asks of attentions: which self-attentions are the identity, and whose map goes into `maps`.

    To `cross`, unless it is None, every attention to the context adds its own. Self-attentions over `cells` or more,
    of which nothing else is asked, are merged as `merging` says, where a map has windows of 2 x 2.
    """

    identity: frozenset[nn.Module] = frozenset()
    probe: nn.Module | None = None
    maps: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] | None = None
    merging: Merging | None = None
    cells: int = 0

    def merges(self, attention: nn.Module, size: tuple[int, int]) -> Merging | None:
        """How a self-attention over a map of `size` (h, w) is merged; None: it is not."""
        asked = attention is self.probe or attention in self.identity
        return None if asked or min(size) < 2 or size[0] * size[1] < self.cells else self.merging


class CrossAttention(nn.Module):
    """Attention of x to a context, x itself in self-attention. `query_rows` bounds the scores: see `attend`.

    What is `worn` changes the contexts that keys and values are made of, one after the other: see hypernetwork.py.
    """

    room: Store | None = None

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = check_heads(dim, num_heads)
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim, dim, bias=False)
        self.to_v = Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.query_rows: int | None = None
        self.context_dim = context_dim
        self.worn: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...] = ()

    def forward(self, x: Tensor, context: Tensor, asked: Asked | None = None) -> Tensor:
        q, (k, v) = self.to_q(x), self._keys_values(context)
        if asked is not None:
            if self is asked.probe:
                asked.maps.append(attention_map(q, k, self.num_heads))
            if self in asked.identity:
                return self.to_out(v)
        quick = self.room is not None
        return self.to_out(attend(q, k, v, self.num_heads, query_rows=self.query_rows, quick=quick))

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """Where x (B, M, dim) looks in the context (B, L, D): the mean map of the heads, (B, M, L) float32."""
        return attention_map(self.to_q(x), self.to_k(self._contexts(context)[0]), self.num_heads).mean(dim=1)

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        if self.room is not None and not self.worn and text_may_be_kept(context) and plain(self.to_k, self.to_v):
            return self.room.keys_values(context, self.to_k, self.to_v)
        keys, values = self._contexts(context)
        return self.to_k(keys), self.to_v(values)

    def _contexts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What keys and values are made of."""
        keys = values = context
        for change in self.worn:
            keys, values = change(keys, values)
        return keys, values


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020)."""

    room: Store | None = None

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        both = self.proj(x)
        if self.room is not None and (found := gated(both)) is not None:
            return found
        value, gate = both.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers, four times as wide between them, over each cell (B, L, dim)."""

    room: Store | None = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.room is not None:
            first: nn.Linear = self.net[0].proj  # type: ignore[assignment]
            last: nn.Linear = self.net[2]  # type: ignore[assignment]
            if may_be_kept(x, first.weight, last.weight) and plain(first, last):
                return self.room.gated(x, first, last)
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward: each added to x (B, h w, dim).

    With `cross_only` the first attention, too, is to the context.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(dim, context_dim if cross_only else dim, num_heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, asked: Asked | None = None, size: tuple[int, int] = (0, 0)) -> Tensor:
        z = self.norm1(x)
        merging = None if asked is None or self.cross_only else asked.merges(self.attn1, size)
        if merging is None:
            x = x + self.attn1(z, context if self.cross_only else z, asked)
        else:
            matched = merging.match(z, size)
            z = matched.merge(z)
            x = x + matched.spread(self.attn1(z, z))
        z = self.norm2(x)
        if asked is not None and asked.cross is not None:
            asked.cross.append(self.attn2.weights(z, context))
        x = x + self.attn2(z, context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the h * w cells of x (B, C, h, w), between projections.

    Those are 1 x 1 convolutions, or `linear` layers, as from 2.x on.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        context_dim: int,
        num_heads: int,
        norm_groups: int,
        linear: bool = False,
        cross_only: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = group_norm(channels, norm_groups, 1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, num_heads, cross_only) for _ in range(depth)
        )
        self.proj_out = zero(self._projection(channels))

    def _projection(self, channels: int) -> nn.Module:
        return Linear(channels, channels) if self.linear else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, asked: Asked | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        z = self.norm(x)
        if not self.linear:
            z = self.proj_in(z)
        z = z.flatten(2).transpose(1, 2)  # (B, h w, C)
        if self.linear:
            z = self.proj_in(z)
        for block in self.transformer_blocks:
            z = block(z, context, asked, (height, width))
        if asked is not None and asked.cross is not None:
            own = slice(-len(self.transformer_blocks), None)
            asked.cross[own] = [look.transpose(1, 2).unflatten(2, (height, width)) for look in asked.cross[own]]
        if self.linear:
            z = self.proj_out(z)
        z = z.transpose(1, 2).reshape(batch, channels, height, width)
        if not self.linear:
            z = self.proj_out(z)
        return x + z
