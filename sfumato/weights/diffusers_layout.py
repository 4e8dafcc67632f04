"""Two-way key tables: the original layout, which our modules are named by, <-> the diffusers folder layout.

Owns the names of diffusers' UNet2DConditionModel and AutoencoderKL and of the CLIPTextModel beside them. The tables
follow from the configs; the keys come from our own modules on the meta device, so that none can be forgotten.
Knows no file. Ours is on the left of every table, theirs on the right, without prefixes of a whole network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sfumato.models.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.models.clip import CLIPText, CLIPTextConfig
from sfumato.models.unet import UNet, UNetConfig

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# Both halves of the autoencoder; the blocks of its levels keep their inner names but for the shortcut.
AUTOENCODER_HALF = {
    "conv_in": "conv_in",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
# 1 x 1 convolutions (C, C, 1, 1) here, linear layers (C, C) there.
CONV_HERE = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


def unet_keys(config: UNetConfig) -> dict[str, str]:
    """Ours -> theirs for every tensor of the U-Net."""
    modules = dict(UNET_ENDS)

    def add(block: str, side: str, number: int, depth: int) -> None:
        """A ResBlock with its transformer: `block` holds them as parts 0 and 1, `side` in two lists."""
        for ours, theirs in UNET_RES_BLOCK.items():
            modules[f"{block}.0.{ours}"] = f"{side}.resnets.{number}.{theirs}"
        if depth:
            modules[f"{block}.1"] = f"{side}.attentions.{number}"  # inner names are the same

    levels = len(config.channel_mult)
    place = 1
    for index, depth in enumerate(config.transformer_depth):
        for number in range(config.num_res_blocks):
            add(f"input_blocks.{place}", f"down_blocks.{index}", number, depth)
            place += 1
        if index < levels - 1:
            modules[f"input_blocks.{place}.0.op"] = f"down_blocks.{index}.downsamplers.0.conv"
            place += 1

    add("middle_block", "mid_block", 0, config.middle_depth)
    last = 2 if config.middle_depth else 1
    for ours, theirs in UNET_RES_BLOCK.items():
        modules[f"middle_block.{last}.{ours}"] = f"mid_block.resnets.1.{theirs}"

    place = 0
    for index, depth in enumerate(reversed(config.transformer_depth)):
        for number in range(config.num_res_blocks + 1):
            add(f"output_blocks.{place}", f"up_blocks.{index}", number, depth)
            if index < levels - 1 and number == config.num_res_blocks:
                part = 2 if depth else 1
                modules[f"output_blocks.{place}.{part}.conv"] = f"up_blocks.{index}.upsamplers.0.conv"
            place += 1

    with torch.device("meta"):
        return _keys(UNet(config), modules)


def autoencoder_keys(config: AutoencoderConfig) -> dict[str, str]:
    """Ours -> theirs for every tensor of the autoencoder. Our decoder counts levels from the finest, theirs from
    the coarsest."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(config.channel_mult)
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in AUTOENCODER_HALF.items()}
    for index in range(levels):
        down, up = f"encoder.down_blocks.{index}", f"decoder.up_blocks.{levels - 1 - index}"
        for ours, theirs in ((f"encoder.down.{index}", down), (f"decoder.up.{index}", up)):
            for number in range(config.num_res_blocks + 1):  # the encoder has one block less
                block, resnet = f"{ours}.block.{number}", f"{theirs}.resnets.{number}"
                modules |= {block: resnet, f"{block}.nin_shortcut": f"{resnet}.conv_shortcut"}
        modules[f"encoder.down.{index}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        modules[f"decoder.up.{index}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    with torch.device("meta"):
        return _keys(Autoencoder(config), modules)


def text_keys(config: CLIPTextConfig, prefix: str = "text_model.") -> dict[str, str]:
    """Ours -> theirs for every tensor of the text encoder: the same names in the published files.

    A CLIPTextModel of transformers 5 has them with the prefix "", in memory and in the files that it writes.
    """
    with torch.device("meta"):
        names = CLIPText(config).state_dict()
    return {name: prefix + name.removeprefix("text_model.") for name in names}


def _keys(module: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    """Every tensor's name with its longest leading part that is in `modules` replaced."""
    keys: dict[str, str] = {}
    for name in module.state_dict():
        ours = name.rpartition(".")[0]
        while ours not in modules:
            if not ours:
                raise ValueError(f"the tensor {name} has no place in the diffusers layout")
            ours = ours.rpartition(".")[0]
        keys[name] = modules[ours] + name.removeprefix(ours)
    return keys


def to_diffusers(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """A network's tensors by our names -> the same by theirs; ValueError names the first missing or unknown one."""
    _check(state, keys)
    return {theirs: state[ours].flatten(1) if CONV_HERE.search(ours) else state[ours] for ours, theirs in keys.items()}


def from_diffusers(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`, with the same strictness."""
    _check(state, keys.values())
    return {
        ours: state[theirs][:, :, None, None] if CONV_HERE.search(ours) else state[theirs]
        for ours, theirs in keys.items()
    }


def _check(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    expected = set(names)
    if missing := expected - set(state):
        raise ValueError(f"the tensor {min(missing)} is missing")
    if unknown := set(state) - expected:
        raise ValueError(f"{len(unknown)} tensors are unknown in this layout, first {min(unknown)}")
