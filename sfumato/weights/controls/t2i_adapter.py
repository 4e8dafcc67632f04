"""T2I-Adapters as files: TencentARC's names or diffusers', one file or a folder. Strict."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sfumato.families import Family, Model
from sfumato.families.detect import other_kind
from sfumato.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.weights.controls.files import Pool, blamed, check_target, fill_from, opened, save_folder, without_prefix
from sfumato.weights.controls.names import kin_of, layout_of
from sfumato.weights.files import save_safetensors

CLASS = "T2IAdapter"
KINDS = {"full": "full_adapter", "light": "light_adapter", "xl": "full_adapter_xl"}  # diffusers' words
DIFFUSERS = re.compile(r"body\.(\d+)\.(?:resnets\.(\d+)\.(.+)|(in_conv|out_conv)\.(.+))")


def load_t2i_adapter(path: str | Path, model: Model) -> T2IAdapter:
    """The adapter of a file (.safetensors, .pth) or a diffusers folder, ready to use beside the model.

    On the model's device, in its precision. ValueError of one line: what it is instead, or which tensor or width does
    not fit the model.
    """
    path = Path(path).expanduser()
    with blamed("adapter", path):
        pool, values, _ = opened(path)
        if values and values.get("_class_name") != CLASS:
            raise ValueError(f"config.json: _class_name={values.get('_class_name')!r}: {CLASS!r} is needed")
        pool = _ours(without_prefix(pool, "adapter."))
        if not any(name.startswith("body.0.") for name in pool):
            what = "a ControlNet" if layout_of(pool) else kin_of(pool) or other_kind(list(pool))
            raise ValueError(f"it is {what}, no T2I-Adapter")
        with torch.device("meta"):
            network = T2IAdapter(_config(pool, model.family))
        fill_from(network, pool, path, model, f"a T2I-Adapter of the kind {network.config.kind}")
    return network


def save_t2i_adapter(path: str | Path, network: T2IAdapter, dtype: torch.dtype | None = None) -> None:
    """Write a .safetensors file in TencentARC's names, or a folder in diffusers' where the path has no such ending."""
    path = Path(path).expanduser()
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in network.state_dict().items()}
    if check_target(path):
        theirs = {_theirs(name, network.config): tensor for name, tensor in state.items()}
        save_folder(path, theirs, _described(network.config))
        return
    save_safetensors(path, state, {"format": "pt"})


def _ours(pool: Pool) -> Pool:
    """The pool in TencentARC's names."""
    numbers = [int(found[2]) for name in pool if (found := DIFFUSERS.fullmatch(name)) and found[2]]
    if not numbers:
        return pool
    count, light = max(numbers) + 1, "conv_in.weight" not in pool
    renamed: Pool = {}
    for name, place in pool.items():
        found = DIFFUSERS.fullmatch(name)
        if found and found[2]:
            index, number = int(found[1]), int(found[2])
            inner = f"body.{index}.body.{number}" if light else f"body.{index * count + number}"
            renamed[f"{inner}.{found[3]}"] = place
        elif found and not light:
            renamed[f"body.{int(found[1]) * count}.{found[4]}.{found[5]}"] = place
        else:
            renamed[name] = place
    return renamed


def _theirs(name: str, config: T2IAdapterConfig) -> str:
    """diffusers' name of a tensor of ours."""
    if config.kind == "light":
        return "adapter." + re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name)
    found = re.fullmatch(r"body\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None:
        return f"adapter.{name}"
    feature, number = divmod(int(found[1]), config.num_res_blocks)
    inner = found[2] if found[2] == "in_conv" else f"resnets.{number}.{found[2]}"
    return f"adapter.body.{feature}.{inner}.{found[3]}"


def _described(config: T2IAdapterConfig) -> dict[str, Any]:
    """diffusers' config.json; of its light adapters the last width stands for two features."""
    light = config.kind == "light"
    if light and config.channels[-2:] != config.channels[-1:] * 2:
        raise ValueError(f"channels={config.channels}: diffusers wants a light adapter's last two alike")
    return {
        "_class_name": CLASS,
        "adapter_type": KINDS[config.kind],
        "channels": list(config.channels[:-1] if light else config.channels),
        "downscale_factor": config.factor,
        "in_channels": config.in_channels,
        "num_res_blocks": config.num_res_blocks,
    }


def _config(pool: Pool, family: Family) -> T2IAdapterConfig:
    """The config of a file's shapes, in our names; ValueError where it is not for the family's U-Net."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in pool:
            raise ValueError(f"the tensor {name} is missing: it is no T2I-Adapter known here")
        file, stored = pool[name]
        if len(found := file.shape(stored)) != 4:
            raise ValueError(f"the tensor {name} has shape {found}, that of a convolution is needed")
        return found

    unet, own = family.unet, family.autoencoder.factor
    widths = tuple(unet.channels * mult for mult in unet.channel_mult)
    light = "conv_in.weight" not in pool
    inside = shape("body.0.in_conv.weight" if light else "conv_in.weight")[1]
    kinds = [("light", own)] if light else [("full", own), ("xl", 2 * own)]
    fits = [(kind, factor, c) for kind, factor in kinds for c in (1, 3) if inside == c * factor**2]
    if not fits:
        raise ValueError(f"its first convolution reads {inside} channels: no hint of 1 or 3 channels gives as many")
    kind, factor, channels = fits[0]
    blocks = 1 + max(int(name.split(".")[1]) for name in pool if name.startswith("body."))
    if kind == "light":
        found = tuple(shape(f"body.{index}.out_conv.weight")[0] for index in range(blocks))
        count = _count(pool)
    else:
        count = max(1, blocks // (4 if kind == "xl" else len(widths)))
        found = tuple(shape(f"body.{index}.block1.weight")[0] for index in range(0, blocks, count))
    expected = (*widths, widths[-1]) if kind == "xl" else widths
    if found != expected or (kind == "xl" and len(widths) != 3):
        raise ValueError(
            f"an adapter of the kind {kind} for a U-Net of widths {found}; the model is of {family.name}, with {widths}"
        )
    return T2IAdapterConfig(channels, found, count, factor, kind, unet.num_res_blocks)


def _count(names: Collection[str]) -> int:
    """Res blocks of a light adapter's first feature."""
    return len({name.split(".")[3] for name in names if name.startswith("body.0.body.")})
