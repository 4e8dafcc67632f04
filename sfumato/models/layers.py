"""Building blocks that several networks share: attention, normalisation, convolution, the sinusoidal embedding of time.

Knows nothing of files, devices or prompts. Module and parameter names are those of the original checkpoints.
Letters: B batch, L tokens, D width, n heads, C channels, h w size of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.kernels import norm as compiled
from sfumato.kernels import winograd as kernels
from sfumato.kernels.attention import attention
from sfumato.kernels.build import library
from sfumato.models.inference import Store, linear, may_be_kept
from sfumato.models.winograd import Columns, Winograd, fastest

HALVES = (torch.bfloat16, torch.float16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    causal: bool = False,
    query_rows: int | None = None,
    quick: bool = False,
) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    q (B, L, D), k and v (B, M, D), D divisible by num_heads; causal hides later tokens. Returns (B, L, D). With
    `query_rows` the scores, where a device holds them, are never more than (B, heads, query_rows, M) at a time.
    `quick` allows compiled code where it is faster, which rounds otherwise.
    """
    if quick and not causal and (found := attention(q, k, v, num_heads)) is not None:
        return found
    batch, length, width = q.shape

    def split(z: Tensor) -> Tensor:
        return z.view(batch, -1, num_heads, width // num_heads).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    if _is_slow_in_half(q, k, v):
        with torch.autocast("cpu", enabled=False):
            whole = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
        return whole.transpose(1, 2).reshape(batch, length, width).to(q.dtype)
    if query_rows is None or length <= query_rows:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    else:
        out = _attend_in_parts(q, k, v, causal, query_rows)
    return out.reshape(batch, length, width)


def _is_slow_in_half(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's backward pass takes longer in this precision than in float32: 16 bits on a CPU."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad):
        return False
    return q.dtype in HALVES


def attention_map(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """The weights of `attend`, softmax(q k^T / sqrt(d)): q (B, L, D) and k (B, M, D) -> (B, heads, L, M) float32."""
    batch, _, width = q.shape
    size = width // num_heads
    q, k = (z.float().view(batch, -1, num_heads, size).transpose(1, 2) for z in (q, k))
    return (q @ k.transpose(2, 3) * size**-0.5).softmax(dim=-1)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor, causal: bool, query_rows: int) -> Tensor:
    """Attention of q (B, n, L, d), some rows after others: (B, L, n, d)."""
    parts, start = [], 0
    for part in q.split(query_rows, dim=2):
        rows = part.shape[2]
        mask = q.new_ones(rows, k.shape[2], dtype=torch.bool).tril(start) if causal else None
        parts.append(F.scaled_dot_product_attention(part, k, v, attn_mask=mask).transpose(1, 2))
        start += rows
    return torch.cat(parts, dim=1)


def slice_attention(network: nn.Module, query_rows: int | None) -> None:
    """Bound the scores of a network's attentions over picture cells to so many query rows at a time; None: no bound.

    Reaches every module that has an attribute `query_rows`. ValueError below 1.
    """
    if query_rows is not None and query_rows < 1:
        raise ValueError(f"query_rows={query_rows}: 1 or more are needed, or None")
    for module in network.modules():
        if hasattr(module, "query_rows"):
            module.query_rows = query_rows  # type: ignore[assignment]


def pad(x: Tensor, sides: tuple[int, int, int, int], wrap: tuple[bool, bool]) -> Tensor:
    """x (B, C, h, w) with `sides` (left, right, top, bottom) more cells: of the other edge where `wrap` (x, y), else 0.

    Where an edge wraps, no more cells than the map has there may be asked for.
    """
    across = (*sides[:2], 0, 0) if wrap[0] else (0, 0, 0, 0)
    down = (0, 0, *sides[2:]) if wrap[1] else (0, 0, 0, 0)
    circular = tuple(map(sum, zip(across, down, strict=True)))
    if any(circular):
        x = F.pad(x, circular, mode="circular")
    zeros = tuple(side - done for side, done in zip(sides, circular, strict=True))
    return F.pad(x, zeros) if any(zeros) else x


@contextmanager
def wrapped(network: nn.Module, wrap: tuple[bool, bool]) -> Iterator[None]:
    """Inside, every `Conv2d` of the network sees the opposite edge beyond one: left and right (x), top and bottom (y).

    After it, also after an error, they are as they were. It holds for one thread's calls at a time.
    """
    kept = [(module, module.wrap) for module in network.modules() if isinstance(module, Conv2d)]
    try:
        for module, _ in kept:
            module.wrap = wrap
        yield
    finally:
        for module, before in kept:
            module.wrap = before


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the (possibly fractional) timestep: t (B,) -> (B, dim), cosines first as in the original U-Net.

    Ho et al. 2020, after Vaswani et al. 2017 section 3.5; `dim` must be even.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def check_heads(width: int, num_heads: int) -> int:
    """The number of heads, if it divides the width; ValueError if not."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads={num_heads}: it must divide the width {width}")
    return num_heads


def group_norm(channels: int, groups: int, eps: float) -> GroupNorm:
    """Group normalisation (Wu & He 2018); ValueError where the groups do not divide the channels."""
    if groups < 1 or channels % groups:
        raise ValueError(f"norm_groups={groups} must divide the channel count {channels}")
    return GroupNorm(groups, channels, eps=eps, affine=True)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, to the bit unless it has `room` to be faster: see `hasten`.

    In 16 bits on a CPU PyTorch takes 4 to 6 times as long for small maps of few channels a group that lie channels last
    as in 32 (benchmarks/quick.py): those go through float32.
    """

    room: Store | None = None

    def forward(self, input: Tensor, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        """Of input (B, C, ...) and a `shift` (B, C) of all its cells together; then SiLU where asked."""
        if self.room is not None:
            quick = compiled.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, silu, shift)
            if quick is not None:
                return quick
        if shift is not None:
            input = input + shift[:, :, None, None]
        normal = self._through_float32(input) if self._is_slow_in_half(input) else super().forward(input)
        return F.silu(normal) if silu else normal

    def _through_float32(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)

    def _is_slow_in_half(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or x.dtype not in HALVES or x.dim() != 4 or x.is_contiguous():
            return False
        return self.num_channels // self.num_groups < 16 and x.shape[2] * x.shape[3] < 1024


def normal_silu_conv(layers: nn.Sequential, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """A sequence that begins with a group norm and SiLU, of x (B, C, h, w) + shift (B, C): of both at once if hastened.

    Not hastened it is the plain sequence, to the bit.
    """
    norm, _, *rest = layers
    if norm.room is None:
        return layers(x if shift is None else x + shift[:, :, None, None])
    x = norm(x, silu=True, shift=shift)
    for layer in rest:
        x = layer(x)
    return x


class Embedding(nn.Embedding):
    """A table of vectors that leaves the meta device alone: normal_ there loads torch's compiler, two seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def hasten(network: nn.Module, on: bool = True, keep: int = 0) -> None:
    """Let the layers of a network compute in the way that is the fastest for them: float32 on a CPU only.

    Results differ by rounding, at most about 1e-4 of their range; gradients of gradients are lost. Without gradients,
    up to `keep` bytes are kept from call to call: weights as convolutions want them, 1 to 4 times what they take, and
    texts with their keys and values; made anew once PyTorch counts a change (see `Store`). It reaches every module
    that has an attribute `room`.
    """
    room = Store(keep) if on else None
    for module in network.modules():
        if hasattr(module, "room"):
            module.room = room  # type: ignore[assignment]


class Conv2d(nn.Conv2d):
    """A convolution padded with zeros, or round the edges where `wrap` (x, y) says so: see `wrapped`.

    `padding` is a number of cells, not a word. Without `wrap` it is PyTorch's own, to the bit, unless it has `room` to
    be faster: see `hasten`.
    """

    wrap: tuple[bool, bool] = (False, False)
    room: Store | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not any(self.wrap):
            if self.room is not None and self._may_be_quick(input):
                return self._quickly(input, self.room)
            return super().forward(input)
        down, across = (int(size) for size in self.padding)
        x = pad(input, (across, across, down, down), self.wrap)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _may_be_quick(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not x.dtype == self.weight.dtype == torch.float32:
            return False
        if torch.is_autocast_enabled("cpu") or self.groups != 1 or self.dilation != (1, 1):
            return False
        plain = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return plain or (self.kernel_size == (3, 3) and self.stride in ((1, 1), (2, 2)) and self.padding == (1, 1))

    def _quickly(self, x: Tensor, room: Store) -> Tensor:
        if self.kernel_size == (1, 1):
            flat = self.weight.permute(0, 2, 3, 1).flatten(1)  # so that its gradient, too, lies channels last
            return linear(x.permute(0, 2, 3, 1), flat, self.bias, room).permute(0, 3, 1, 2)
        if may_be_kept(x):
            quick = room.convolution(x, self.weight, self.bias, self.stride[0])
            return super().forward(x) if quick is None else quick
        by_kernels = library() is not None
        way = fastest(tuple(x.shape), self.out_channels, self.stride[0], by_kernels)
        if way == "direct":
            return super().forward(x)
        if way == "columns":
            out: Tensor = Columns.apply(x, self.weight, self.bias, self.stride[0], room)
        else:
            function = kernels.Winograd if by_kernels else Winograd
            out = function.apply(x, self.weight, self.bias, int(way[-1]), room)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3 x 3 convolution: (B, C, h, w) -> (B, C', 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def zero(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual branch starts as the identity. Returns the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
