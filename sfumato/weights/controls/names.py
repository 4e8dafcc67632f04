"""The two layouts of ControlNet files: key table, what tells a network's shape, diffusers' config. Knows no file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from sfumato.families import FAMILIES, Family
from sfumato.models.controlnet import ControlNet
from sfumato.models.unet import UNetConfig
from sfumato.weights.layouts.diffusers_fields import UNET_ONLY, Fields
from sfumato.weights.layouts.diffusers_names import unet_keys
from sfumato.weights.layouts.tables import Place

PREFIX = "control_model."
DIFFERENCE = "difference"  # a mark: the other tensors are to be added to the U-Net's own
CLASS = "ControlNetModel"
KIN = (  # of what steers, but is not this network
    ("a Control-LoRA", ("lora_controlnet",)),
    ("a ControlNet-LLLite", ("lllite_",)),
    ("a T2I-Adapter", ("adapter.body.", "body.0.", "conv_in.weight")),
    ("an IP-Adapter", ("image_proj.", "ip_adapter.")),
)

Shape = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Where the tensors that tell a network's shape lie. `hint` is a format of the k-th width, `level` of a level."""

    name: str
    first: str
    vector: str
    hint: Callable[[int], str]
    level: Callable[[int, int], str]  # (index of the level, res blocks a level)
    middle: str


ORIGINAL = Layout(
    "original",
    "input_blocks.0.0.weight",
    "label_emb.0.0.weight",
    lambda k: f"input_hint_block.{4 * k}.weight",
    lambda index, blocks: f"input_blocks.{1 + index * (blocks + 1)}.1.transformer_blocks.",
    "middle_block.1.transformer_blocks.",
)
DIFFUSERS = Layout(
    "diffusers",
    "conv_in.weight",
    "add_embedding.linear_1.weight",
    lambda k: f"controlnet_cond_embedding.{f'blocks.{2 * k - 1}' if k else 'conv_in'}.weight",
    lambda index, blocks: f"down_blocks.{index}.attentions.0.transformer_blocks.",
    "mid_block.attentions.0.transformer_blocks.",
)


def layout_of(names: Collection[str]) -> Layout | None:
    """Which layout tensors are in, by their names without `PREFIX`; None: no ControlNet."""
    return next((layout for layout in (ORIGINAL, DIFFUSERS) if layout.hint(0) in names), None)


def kin_of(names: Collection[str]) -> str | None:
    """In words, what steers and is no ControlNet."""
    return next((what for what, starts in KIN if any(name.startswith(starts) for name in names)), None)


def control_keys(network: ControlNet) -> dict[str, Place]:
    """Ours -> diffusers' for every tensor of a ControlNet."""
    shared = unet_keys(network.config)
    count = 2 * (len(network.hint_widths) - 1)
    modules = {"input_hint_block.0": "conv_in", f"input_hint_block.{2 * count + 2}": "conv_out"}
    modules |= {f"input_hint_block.{2 * index + 2}": f"blocks.{index}" for index in range(count)}
    modules = {ours: f"controlnet_cond_embedding.{theirs}" for ours, theirs in modules.items()}
    modules |= {f"zero_convs.{index}.0": f"controlnet_down_blocks.{index}" for index in range(len(network.zero_convs))}
    modules["middle_block_out.0"] = "controlnet_mid_block"
    keys = {}
    for name in network.state_dict():
        module, _, end = name.rpartition(".")
        keys[name] = Place(f"{modules[module]}.{end}") if module in modules else shared[name]
    return keys


# -- what a file holds ------------------------------------------------------------------------------------------------


def hint_of(layout: Layout, names: Collection[str], shape: Shape) -> tuple[int, tuple[int, ...]]:
    """(channels of the hint, widths of what reads it), from the shapes of convolutions."""
    widths: list[int] = []
    while layout.hint(len(widths)) in names:
        widths.append(_sized(layout.hint(len(widths)), shape, 4)[0])
    return _sized(layout.hint(0), shape, 4)[1], tuple(widths)


def config_of(layout: Layout, names: Collection[str], shape: Shape, family: Family) -> UNetConfig:
    """The encoder's config: the family's, but for input channels and transformer depths, which a smaller one may have.

    ValueError in words where it is of another family.
    """
    base = family.unet
    keys = sorted(name for name in names if name.endswith(".attn2.to_k.weight"))
    if layout.first not in names:
        raise ValueError(f"the tensor {layout.first} is missing")
    first = _sized(layout.first, shape, 4)
    vector = _sized(layout.vector, shape, 2)[1] if layout.vector in names else None
    context = _sized(keys[0], shape, 2)[1] if keys else base.context_dim
    if (first[0], context, vector) != (base.channels, base.context_dim, base.vector_dim):
        alike = [
            one.name
            for one in FAMILIES.values()
            if (one.unet.channels, one.unet.context_dim, one.unet.vector_dim) == (first[0], context, vector)
        ]
        what = f"one of {alike[0]}" if alike else "of no known family"
        raise ValueError(
            f"a ControlNet for a U-Net of width {first[0]}, context {context} and vector {vector} ({what}); the model "
            f"is of {family.name}, with {base.channels}, {base.context_dim} and {base.vector_dim}"
        )
    if first[1] not in (base.in_channels, family.autoencoder.latent_channels):
        allowed = sorted({base.in_channels, family.autoencoder.latent_channels})
        raise ValueError(f"it reads {first[1]} input channels, {family.name} has {' or '.join(map(str, allowed))}")
    levels = range(len(base.channel_mult))
    depths = tuple(_depth(layout.level(index, base.num_res_blocks), names) for index in levels)
    return replace(
        base, in_channels=first[1], transformer_depth=depths, middle_depth=_depth(layout.middle, names), cross_only=()
    )


def _sized(name: str, shape: Shape, dimensions: int) -> tuple[int, ...]:
    found = shape(name)
    if len(found) != dimensions or 0 in found:
        raise ValueError(f"the tensor {name} has shape {found}, {dimensions} dimensions are needed")
    return found


def _depth(start: str, names: Collection[str]) -> int:
    """How many transformer blocks there are behind a leading part of names."""
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


# -- diffusers' config ------------------------------------------------------------------------------------------------


def read_config(values: dict[str, Any], config: UNetConfig) -> tuple[bool, bool]:
    """(pooled, whether the hint is read as BGR) of a config.json; ValueError where it computes something else."""
    fields = Fields({"config.json": values}, "config.json")
    fields.only("_class_name", (CLASS,))
    fields.all_only(UNET_ONLY)
    widths = tuple(config.channels * mult for mult in config.channel_mult)
    heads = tuple(config.heads(width) for width in widths)
    if (found := fields.each("attention_head_dim", 8, len(widths))) != heads:
        raise ValueError(f"config.json: attention_head_dim={found}: the family has {heads}")
    if (groups := fields.whole("norm_num_groups", 32)) != config.norm_groups:
        raise ValueError(f"config.json: norm_num_groups={groups}: the family has {config.norm_groups}")
    order = fields.only("controlnet_conditioning_channel_order", ("rgb", "bgr"))
    pooled = fields.get("global_pool_conditions", False)
    return bool(pooled), order == "bgr"


def config_for(network: ControlNet) -> dict[str, Any]:
    """diffusers' config.json; ValueError where its ControlNetModel cannot be of that shape."""
    config = network.config
    depths, middle = config.transformer_depth, config.middle_depth
    if not middle or depths[-1] not in (0, middle):
        raise ValueError(f"middle_depth={middle}: diffusers wants one above 0, as the last level's, if that has one")
    widths = [config.channels * mult for mult in config.channel_mult]
    added: dict[str, Any] = {}
    if config.vector_dim is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,  # of XL (Podell et al. 2023)
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    return added | {
        "_class_name": CLASS,
        "act_fn": "silu",
        "attention_head_dim": [config.heads(width) for width in widths],
        "block_out_channels": widths,
        "conditioning_channels": network.hint_channels,
        "conditioning_embedding_out_channels": list(network.hint_widths),
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": config.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "global_pool_conditions": network.pooled,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": config.num_classes,
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [middle],
        "use_linear_projection": config.linear_projection,
    }
