"""The diffusers folder layout: two-way key tables of its networks, older spellings of names, its weight files.

Owns the names of diffusers' UNet2DConditionModel and AutoencoderKL and of transformers' CLIPTextModel beside them. The
tables follow from the configs; the keys come from our own modules on the meta device, so that none can be forgotten.
Ours is on the left of every table, theirs on the right, without prefixes of a whole network.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sfumato.models.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.models.clip import CLIPText, CLIPTextConfig
from sfumato.models.unet import UNet, UNetConfig
from sfumato.weights.layouts.tables import Change, Place, from_layout, to_layout

log = logging.getLogger(__name__)

to_diffusers, from_diffusers = to_layout, from_layout

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",  # of classes; a pooled vector has two linear layers instead
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
POINTWISE = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")  # by our names

# diffusers before 0.15 named the autoencoder's attention so.
OLD_ATTENTION = re.compile(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
BARE_TEXT = re.compile(r"(embeddings|encoder|final_layer_norm)\.")  # as transformers 5 writes a CLIPTextModel
POSITION_IDS = "text_model.embeddings.position_ids"  # 0 to 76; older transformers stored them

STEMS = {"safetensors": "model", "bin": "pytorch_model"}  # of transformers; diffusers has one for both:
DIFFUSERS_STEM = "diffusion_pytorch_model"
SHARD = re.compile(r"-\d+-of-\d+\.")


def unet_keys(config: UNetConfig) -> dict[str, Place]:
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


def autoencoder_keys(config: AutoencoderConfig) -> dict[str, Place]:
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


def text_keys(config: CLIPTextConfig, prefix: str = "text_model.", num_layers: int | None = None) -> dict[str, Place]:
    """Ours -> theirs for every tensor of the text encoder: the same names in the published files.

    A CLIPTextModel of transformers 5 has them with the prefix "", in memory and in the files that it writes. With
    `num_layers`, only that many layers are stored, and no projection: what no later layer feeds a plain CLIPTextModel.
    """
    with torch.device("meta"):
        names = list(CLIPText(config).state_dict())
    if num_layers is not None:
        layer = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
        number = {name: int(found[1]) if (found := layer.match(name)) else 0 for name in names}
        names = [name for name in names if number[name] < num_layers and name != "text_projection.weight"]
    return {name: Place(re.sub(r"^text_model\.", prefix, name)) for name in names}


def _keys(module: nn.Module, modules: Mapping[str, str]) -> dict[str, Place]:
    """Every tensor's name with its longest leading part that is in `modules` replaced."""
    keys: dict[str, Place] = {}
    for name in module.state_dict():
        ours = name.rpartition(".")[0]
        while ours not in modules:
            if not ours:
                raise ValueError(f"the tensor {name} has no place in the diffusers layout")
            ours = ours.rpartition(".")[0]
        change = Change.POINTWISE if POINTWISE.search(name) else Change.SAME
        keys[name] = Place(modules[ours] + name.removeprefix(ours), change)
    return keys


def canonical(component: str, name: str) -> str:
    """A stored name of a component ("vae", "text_encoder", ...) as the tables spell it."""
    if component.startswith("text_encoder"):
        return f"text_model.{name}" if BARE_TEXT.match(name) else name
    old = OLD_ATTENTION.fullmatch(name)  # a U-Net has no such names
    return f"{old[1]}.{NEW_ATTENTION[old[2]]}.{old[3]}" if old else name


def rightly_unused(component: str, name: str) -> bool:
    """Whether a tensor that is in no network is known, and rightly so; any spelling of its name."""
    return component.startswith("text_encoder") and canonical(component, name) == POSITION_IDS


def component_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """The weight files of a folder's component: one, or all shards of one; `variant` is e.g. "fp16".

    Without a variant the plain files, or else the only variant there is. ValueError says what was looked for. What is
    not named text_encoder... has diffusers' file names, also an autoencoder alone in a folder of another name.
    """
    found = _weights(folder / component, component)
    chosen = variant
    if variant is None and found and None not in found:
        if len(found) > 1:
            raise ValueError(
                f"ckpt={str(folder)!r}: {component} has no plain weights; variant must be one of {_names(found)}"
            )
        (chosen,) = found
        log.info("%s: %s has only the variant %s, which is taken", folder.name, component, chosen)
    if chosen not in found:
        stem = _stem(component, "safetensors")
        wanted = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        raise ValueError(
            f"ckpt={str(folder)!r}: the {component} has no weights: looked for {component}/{wanted}, its shards and "
            f".bin; there {f'are {_names(found)}' if found else 'is none'}"
        )
    path = min(found[chosen], key=lambda path: (".safetensors" not in path.name, path.suffix == ".json"))
    return _shards(folder, path) if path.suffix == ".json" else [path]


def _stem(component: str, kind: str) -> str:
    return STEMS[kind] if component.startswith("text_encoder") else DIFFUSERS_STEM


def _weights(folder: Path, component: str) -> dict[str | None, list[Path]]:
    """Weight files and indices of shards in a component's folder by their variant (None: plain)."""
    found: dict[str | None, list[Path]] = {}
    for kind in STEMS:
        stem = _stem(component, kind)
        name = r"(?:\.(?P<{}>[\w-]+))?"
        pattern = rf"{stem}{name.format('a')}\.{kind}(?:{name.format('b')}\.index{name.format('c')}\.json)?"
        for path in sorted(folder.glob(f"{stem}*")):
            match = re.fullmatch(pattern, path.name)
            if match and not SHARD.search(path.name):  # shards count by their index alone
                found.setdefault(match["a"] or match["b"] or match["c"], []).append(path)
    return found


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index of shards names, all beside it; ValueError where one is missing."""
    where = index.relative_to(folder).as_posix()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"ckpt={str(folder)!r}: {where} is not an index of shards ({error})") from error
    if wrong or not names:
        raise ValueError(
            f"ckpt={str(folder)!r}: {where} names {wrong[0] if wrong else 'no file'}: files beside it are allowed"
        )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"ckpt={str(folder)!r}: {where} names {missing[0]}, which is missing")
    return [index.parent / name for name in names]


def _names(variants: Mapping[str | None, object]) -> str:
    return ", ".join(sorted(variant or "plain ones" for variant in variants))
