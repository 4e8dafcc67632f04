"""ControlNets as files: whole or as differences from a U-Net, in the original layout or diffusers'. Strict."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.families.detect import Detection, other_kind
from sfumato.models.controlnet import ControlNet
from sfumato.weights.controls.files import Pool, blamed, check_target, opened, save_folder, without_prefix
from sfumato.weights.controls.names import (
    DIFFERENCE,
    DIFFUSERS,
    PREFIX,
    Layout,
    config_for,
    config_of,
    control_keys,
    hint_of,
    kin_of,
    layout_of,
    read_config,
)
from sfumato.weights.files import save_safetensors
from sfumato.weights.layouts.tables import Place, to_layout
from sfumato.weights.lazy import Lazy, from_source
from sfumato.weights.parts import Checkpoint, match
from sfumato.weights.placing import fill

POOLED = "sfumato.pooled"  # in a file's header: "true" where the residuals are means over h and w
HINT_CONV = "input_hint_block.0.weight"


def load_control(path: str | Path, model: Model, hint_channels: int = 3, pooled: bool | None = None) -> ControlNet:
    """The ControlNet of a file (.safetensors, .pth, ...) or a diffusers folder, ready to use beside the model.

    On the model's device, in its precision, in evaluation mode. Tensors of a difference file are added to the model's
    U-Net, which must be in memory. `pooled` None: as the folder's config or the header says, else as the word "shuffle"
    in the file's name does. ValueError of one line: what it is instead, which family it is of, or which tensor does
    not fit.
    """
    path = Path(path).expanduser()
    with blamed("control", path):
        pool, values, header = opened(path)
        marked = DIFFERENCE in pool  # outside of the prefix
        pool = without_prefix(pool, PREFIX)
        layout = layout_of(pool)
        if layout is None:
            raise ValueError(f"it is {kin_of(pool) or other_kind(list(pool))}, no ControlNet")
        network = _built(layout, pool, model, hint_channels)
        reversed_hint = False
        if values:
            network.pooled, reversed_hint = read_config(values, network.config)
        else:
            network.pooled = header.get(POOLED) == "true" or "shuffle" in path.stem.lower()
        if pooled is not None:
            network.pooled = pooled
        sources = _sources(path, layout, pool, network, model)
        if marked or DIFFERENCE in pool:
            base = model.unet.state_dict()
            sources = {name: _added(lazy, base[name]) if name in base else lazy for name, lazy in sources.items()}
        if reversed_hint:
            sources[HINT_CONV] = _flipped(sources[HINT_CONV])
        fill(network, sources, model.device, model.dtype)
    return network


def _built(layout: Layout, pool: Pool, model: Model, hint_channels: int) -> ControlNet:
    """The network of a file's shapes, on "meta"; ValueError where it is not for the model."""

    def shape(name: str) -> tuple[int, ...]:
        file, stored = pool[name]
        return file.shape(stored)

    config = config_of(layout, pool, shape, model.family)
    channels, widths = hint_of(layout, pool, shape)
    if channels != hint_channels:
        raise ValueError(f"its hint has {channels} channels, {hint_channels} are needed")
    factor, own = 2 ** (len(widths) - 1), model.family.autoencoder.factor
    if factor != own:
        raise ValueError(f"its hint is {factor} times as large as the latents, {own} times is {model.family.name}'s")
    with torch.device("meta"):
        return ControlNet(config, channels, widths)


def _sources(path: Path, layout: Layout, pool: Pool, network: ControlNet, model: Model) -> dict[str, Lazy]:
    """A source for each of the network's tensors; ValueError names the first that is missing, misshapen or unknown."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    table = control_keys(network) if layout is DIFFUSERS else {name: Place(name) for name in shapes}
    found = Checkpoint(path, layout.name, Detection(model.family, "the model's"), {})
    used = match(found, "control", pool, table, shapes)
    found.unknown = sorted(set(pool) - used - {DIFFERENCE})
    if problems := found.problems():
        raise ValueError(f"as a ControlNet of {model.family.name}, {problems[0]}")
    return {name: from_source(source) for name, source in found.parts["control"].items()}


def _added(lazy: Lazy, base: Tensor) -> Lazy:
    """A difference on top of the U-Net's own tensor, of whose first convolution it may have fewer channels."""

    def read() -> Tensor:
        own = base[:, : lazy.shape[1]] if base.ndim == 4 else base
        return lazy.read().float() + own.detach().to("cpu", torch.float32)

    return Lazy(lazy.shape, torch.float32, read)


def _flipped(lazy: Lazy) -> Lazy:
    """The first convolution of a network that reads blue first, for hints that are red first."""
    return Lazy(lazy.shape, lazy.dtype, lambda: lazy.read().flip(1))


def save_control(path: str | Path, network: ControlNet, dtype: torch.dtype | None = None) -> None:
    """Write a .safetensors file in the original's names, or a folder in diffusers' where the path has no such ending.

    `dtype` None keeps the network's. ValueError where the place is taken or the ending a pickle's.
    """
    path = Path(path).expanduser()
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in network.state_dict().items()}
    if check_target(path):
        save_folder(path, to_layout(state, control_keys(network)), config_for(network))
        return
    header = {"format": "pt"} | ({POOLED: "true"} if network.pooled else {})
    save_safetensors(path, {PREFIX + name: tensor for name, tensor in state.items()}, header)
