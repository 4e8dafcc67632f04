"""The U-Net that denoises latents: (x, t, context) -> prediction of x's shape.

Ho et al. 2020 and Dhariwal & Nichol 2021; its attentions are transformer.py's. Knows nothing of noise schedules or of
what it predicts. Names as in `model.diffusion_model.*` of the original checkpoints.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from sfumato.models.freeu import free_u
from sfumato.models.inference import Linear, Store, text_may_be_kept
from sfumato.models.layers import (
    Conv2d,
    Embedding,
    Upsample,
    group_norm,
    normal_silu_conv,
    timestep_embedding,
    wrapped,
    zero,
)
from sfumato.models.merging import Merging
from sfumato.models.residuals import Residuals
from sfumato.models.reuse import Deep
from sfumato.models.transformer import Asked, CrossAttention, SpatialTransformer, self_attentions


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net. The defaults are Stable Diffusion 1.x: 859,520,964 parameters.

    `transformer_depth` gives the transformer blocks a resolution (0: none); `head_channels`, where given, replaces
    `num_heads`. The U-Net is told one more thing where `vector_dim` (the width of SD XL's pooled vector) or
    `num_classes` (the noise levels of the SD 2.0 upscaler) is given. `cross_only` marks the resolutions whose first
    attention, too, reads the context instead of x: one entry each, or none at all.
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
    num_classes: int | None = None
    cross_only: tuple[bool, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Input blocks, and as many output blocks."""
        return len(self.channel_mult) * (self.num_res_blocks + 1)

    def heads(self, channels: int) -> int:
        """Attention heads at a width of `channels`."""
        return channels // self.head_channels if self.head_channels else self.num_heads


class State(Protocol):
    """How the U-Net is changed, or looked into, for one call. Blocks have their modules' names, e.g. `middle_block`.

    Self-attention is the identity in the blocks `perturbed` (Ahn et al. 2024), `freeu` is (b1, b2, s1, s2) of Si et
    al. 2024, and the map of the first self-attention in the block `probe` is wanted. `seamless` are the directions
    (x, y) in which opposite edges meet; with `cross` the maps of all attentions to the context are wanted.
    """

    @property
    def perturbed(self) -> tuple[str, ...]: ...
    @property
    def freeu(self) -> tuple[float, float, float, float] | None: ...
    @property
    def probe(self) -> str | None: ...
    @property
    def seamless(self) -> tuple[bool, bool]: ...
    @property
    def cross(self) -> bool: ...


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            group_norm(in_channels, groups, 1e-5), nn.SiLU(), Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups, 1e-5),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original, unused there; it holds the place that the names count
            zero(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out = normal_silu_conv(self.in_layers, x)
        out = normal_silu_conv(self.out_layers, out, shift=self.emb_layers(emb))
        return self.skip_connection(x) + out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.Sequential):
    """A sequence that hands the time embedding and the context to the parts that want them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor, asked: Asked | None = None
    ) -> Tensor:
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context, asked)
            else:
                x = part(x)
        return x


def _check(config: UNetConfig) -> None:
    """ValueError names a field that does not fit the others."""
    levels = len(config.channel_mult)
    if len(config.transformer_depth) != levels:
        raise ValueError(
            f"transformer_depth={config.transformer_depth} must have one entry a level of {config.channel_mult}"
        )
    if config.cross_only and len(config.cross_only) != levels:
        raise ValueError(
            f"cross_only={config.cross_only} must be empty or have one entry a level of {config.channel_mult}"
        )
    if config.vector_dim is not None and config.num_classes is not None:
        raise ValueError(
            f"vector_dim={config.vector_dim} and num_classes={config.num_classes}: a U-Net takes one of the two"
        )


def _level(config: UNetConfig, index: int, in_channels: int) -> list[nn.Module]:
    """A ResBlock of the level's width, and its transformer where it has one."""
    width, depth = config.channels * config.channel_mult[index], config.transformer_depth[index]
    parts: list[nn.Module] = [ResBlock(in_channels, width, 4 * config.channels, config.norm_groups)]
    if depth:
        parts.append(_transformer(config, width, depth, bool(config.cross_only) and config.cross_only[index]))
    return parts


def _transformer(config: UNetConfig, width: int, depth: int, cross_only: bool = False) -> SpatialTransformer:
    return SpatialTransformer(
        width,
        depth,
        config.context_dim,
        config.heads(width),
        config.norm_groups,
        config.linear_projection,
        cross_only,
    )


class Encoder(nn.Module):
    """The way down and the middle of a U-Net, and what it is told: `embed`. A ControlNet is trained from a copy.

    `skip_channels` are the widths of what `input_blocks` hand on.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        base, groups, emb_dim = config.channels, config.norm_groups, 4 * config.channels
        self.time_embed = nn.Sequential(nn.Linear(base, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if config.vector_dim is not None:
            self.label_emb: nn.Module = nn.Sequential(
                nn.Sequential(nn.Linear(config.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            )
        elif config.num_classes is not None:
            self.label_emb = Embedding(config.num_classes, emb_dim)

        channels = base
        self.input_blocks = nn.ModuleList([Block(Conv2d(config.in_channels, base, 3, padding=1))])
        skips = [base]
        last = len(config.channel_mult) - 1
        for index, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Block(*_level(config, index, channels)))
                channels = base * mult
                skips.append(channels)
            if index < last:
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        middle: list[nn.Module] = [ResBlock(channels, channels, emb_dim, groups)]
        if config.middle_depth:
            middle.append(_transformer(config, channels, config.middle_depth))
        self.middle_block = Block(*middle, ResBlock(channels, channels, emb_dim, groups))
        self.skip_channels = tuple(skips)

    def embed(self, t: Tensor, vector: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, 4 channels): the time and, where the config wants one, the pooled vector or the class."""
        emb = self.time_embed(timestep_embedding(t, self.config.channels).to(dtype))
        if self.config.vector_dim is not None or self.config.num_classes is not None:
            emb = emb + self._label(vector)
        return emb

    def _label(self, vector: Tensor | None) -> Tensor:
        """The embedding (B, 4 channels) of the pooled vector or of the class."""
        classes, width = self.config.num_classes, self.config.vector_dim
        needed = f"a pooled vector (B, {width})" if classes is None else f"classes (B,) from 0 to {classes - 1}"
        if vector is None:
            raise ValueError(f"vector: this U-Net needs {needed}, got None")
        if (vector.ndim, vector.is_floating_point()) != ((2, True) if classes is None else (1, False)):
            raise ValueError(f"vector: this U-Net needs {needed}, got {vector.dtype} of shape {tuple(vector.shape)}")
        return self.label_emb(vector)


class UNet(Encoder):
    """(x (B, C_in, h, w), t (B,) in [0, T), context (B, L, D), vector) -> (B, C_out, h, w).

    h and w must be divisible by 2^(levels - 1). `vector` is (B, V) float where the config has `vector_dim`, (B,) of
    integer classes where it has `num_classes`, and not looked at where it has neither. ValueError where one is needed
    and there is none.
    """

    room: Store | None = None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        base, groups, skips = config.channels, config.norm_groups, list(self.skip_channels)
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for index in reversed(range(len(config.channel_mult))):
            for number in range(config.num_res_blocks + 1):
                parts = _level(config, index, channels + skips.pop())
                channels = base * config.channel_mult[index]
                if index > 0 and number == config.num_res_blocks:
                    parts.append(Upsample(channels, channels))
                self.output_blocks.append(Block(*parts))

        self.out = nn.Sequential(
            group_norm(channels, groups, 1e-5), nn.SiLU(), zero(Conv2d(channels, config.out_channels, 3, padding=1))
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        state: State | None = None,
        maps: list[Tensor] | None = None,
        cross: list[Tensor] | None = None,
        residuals: Residuals | None = None,
        deep: Deep | None = None,
        merging: Merging | None = None,
    ) -> Tensor:
        """`state` changes this call alone; to `maps` the map that it probes is appended, (B, heads, L, L) float32.

        To `cross`, where the state wants them, go the maps of all attentions to the context, in order: the mean of
        their heads, (B, L, h_i, w_i) float32, of sum 1 over the L tokens. `residuals` are added on the way; `deep`
        says what of the deep part is kept or given (not with residuals, nor where something is looked at there), and
        `merging` how self-attentions at the highest resolution that has some are merged.
        """
        emb = self.embed(t, vector, x.dtype)
        added, deep = residuals or Residuals(), deep or Deep()
        added.check(len(self.input_blocks))
        if deep.given is not None and (len(added) or (state is not None and (state.probe or state.cross))):
            raise ValueError("reuse: not with residuals of other networks, nor where attentions are looked at")
        asked = None if state is None else self._asked(state, [] if maps is None else maps, cross)
        if merging is not None:
            asked = replace(asked or Asked(), merging=merging, cells=self._finest(x.shape[2] * x.shape[3]))
        if self.room is not None and text_may_be_kept(context):
            context = self.room.known(context)
        freeu = None if state is None else state.freeu
        with wrapped(self, state.seamless) if state is not None and any(state.seamless) else nullcontext():
            return self._walk(x, (emb, context, asked), added, deep, freeu)

    def _walk(
        self,
        x: Tensor,
        told: tuple[Tensor, Tensor, Asked | None],
        added: Residuals,
        deep: Deep,
        freeu: tuple[float, float, float, float] | None,
    ) -> Tensor:
        """Down, through the middle and up, all blocks `told` alike: time embedding, context, what is asked of them."""
        count = len(self.input_blocks)
        shallow = deep.shallow(count)
        skips: list[Tensor] = []
        for index, block in enumerate(islice(self.input_blocks, shallow)):
            x = block(x, *told)
            if index in added.inner:
                x = x + added.inner[index]
            skips.append(x)
        if deep.given is None:
            x = self.middle_block(x, *told)
        if added.middle is not None:
            x = x + added.middle
        if added.skips:
            skips = [skip + more for skip, more in zip(skips, added.skips, strict=True)]
        for index, block in islice(enumerate(self.output_blocks), count - shallow, None):
            x, skip = deep.up(count - index, x), skips.pop()
            stage = index // (self.config.num_res_blocks + 1)
            if freeu is not None and stage < 2:
                x, skip = free_u(x, skip, b=freeu[stage], s=freeu[stage + 2])
            x = block(torch.cat([x, skip], dim=1), *told)
        return normal_silu_conv(self.out, x)

    def _finest(self, cells: int) -> int:
        """The cells at the highest resolution that has self-attention, of so many latent cells."""
        only = self.config.cross_only or (False,) * len(self.config.channel_mult)
        depths = zip(self.config.transformer_depth, only, strict=True)
        return cells // 4 ** next((level for level, (depth, other) in enumerate(depths) if depth and not other), 0)

    def self_attention_blocks(self) -> tuple[str, ...]:
        """The blocks that a `State` may name: `input_blocks.1`, `middle_block`, ...; and any module within them."""
        names = ["middle_block"]
        for side in ("input_blocks", "output_blocks"):
            names += [f"{side}.{index}" for index in range(len(getattr(self, side)))]
        return tuple(name for name in names if self_attentions(self.get_submodule(name)))

    def _asked(self, state: State, maps: list[Tensor], cross: list[Tensor] | None) -> Asked | None:
        """The attentions that a state names; ValueError where there are none. None where it leaves them alone."""
        cross = cross if state.cross else None
        if not state.perturbed and state.probe is None and cross is None:
            return None

        def find(name: str) -> list[CrossAttention]:
            try:
                found = self_attentions(self.get_submodule(name))
            except AttributeError:
                found = []
            if not found:
                there = ", ".join(self.self_attention_blocks()) or "no block"
                raise ValueError(f"block={name!r}: this U-Net has no self-attention there, but in {there}")
            return found

        identity = frozenset[nn.Module](attention for name in state.perturbed for attention in find(name))
        probe = None if state.probe is None else find(state.probe)[0]
        return Asked(identity, probe, maps, cross)
