"""Hypernetworks as files: A1111's .pt, read without running anything of it, and written as A1111 does.

A dict: a width -> the tensors for keys and those for values, and facts beside. Knows no U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.models.hypernetwork import Hypernetwork, HypernetworkConfig
from sfumato.weights.embeddings import save_pickle
from sfumato.weights.files import sha256
from sfumato.weights.files.mapped import StoredTensor, short
from sfumato.weights.files.pickles import open_pickle

# The first files had two linear layers and nothing between, each a field of its own.
OLD_NAMES = {
    "linear1.weight": "linear.0.weight", "linear1.bias": "linear.0.bias",
    "linear2.weight": "linear.1.weight", "linear2.bias": "linear.1.bias",
}  # fmt: skip
DROPOUT = 0.3  # where a file only says that there is some


@dataclass(frozen=True, eq=False)
class HypernetworkFile:
    """A hypernetwork, in evaluation and float32 on the CPU, and what its file says of it; fields as in `Embedding`."""

    name: str
    network: Hypernetwork
    step: int | None = None
    checkpoint: str | None = None
    checkpoint_hash: str | None = None
    hash: str = ""


def load_hypernetwork(path: str | Path, name: str | None = None) -> HypernetworkFile:
    """A hypernetwork by the name `name`, else the file's own, as prompts of A1111 call it.

    ValueError in one line with the file's name: not readable, no hypernetwork, tensors that do not fit what the file
    says of their shape, numbers that are not finite.
    """
    path = Path(path)
    try:
        root = open_pickle(path)
        widths = [key for key in root if type(key) is int] if isinstance(root, dict) else []
        if not widths:
            raise ValueError("there is no hypernetwork in it: no width has tensors")
        network = _filled(_config(root, tuple(widths)), root)
    except ValueError as error:
        why = " ".join(str(error).removeprefix(f"ckpt={str(path)!r}: ").split())
        raise ValueError(f"hypernetwork={str(path)!r}: {why}") from error
    step = root.get("step")
    return HypernetworkFile(
        name or path.stem,
        network,
        step if type(step) is int else None,
        _text(root.get("sd_checkpoint_name")),
        _text(root.get("sd_checkpoint")),
        sha256(path),
    )


def save_hypernetwork(path: str | Path, file: HypernetworkFile) -> None:
    """Write A1111's .pt whole or not at all. ValueError for another ending, OSError where it cannot be written."""
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"out={str(path)!r}: a name that ends with .pt is needed, no other program reads another")
    config = file.network.config
    dropout = list(config.dropout or [0.0] * len(config.layers))
    value: dict[Any, Any] = {
        width: tuple(
            {name: tensor.detach().float().cpu() for name, tensor in part.state_dict().items()}
            for part in file.network.pair(width)
        )
        for width in config.widths
    }
    value |= {
        "step": file.step or 0,
        "name": file.name,
        "layer_structure": list(config.layers),
        "activation_func": config.activation,
        "is_layer_norm": config.layer_norm,
        "weight_initialization": config.weight_init,
        "use_dropout": any(dropout),
        "sd_checkpoint": file.checkpoint_hash,
        "sd_checkpoint_name": file.checkpoint,
        "activate_output": config.activate_output,
        "last_layer_dropout": dropout[-2] != 0,
        "dropout_structure": dropout,
    }
    save_pickle(path, value)


def _config(root: Mapping[Any, Any], widths: tuple[int, ...]) -> HypernetworkConfig:
    """What a file says of its networks' shape; where it says nothing, what A1111 takes."""
    layers = _numbers(root, "layer_structure") or (1.0, 2.0, 1.0)
    dropout = _numbers(root, "dropout_structure")
    if not dropout and root.get("use_dropout"):
        last = DROPOUT if root.get("last_layer_dropout") else 0.0
        dropout = (0.0, *(DROPOUT,) * max(0, len(layers) - 3), last, 0.0)
    activation, init = root.get("activation_func"), root.get("weight_initialization")
    return HypernetworkConfig(
        widths=widths,
        layers=layers,
        activation=activation if isinstance(activation, str) else "linear",
        layer_norm=bool(root.get("is_layer_norm", False)),
        activate_output=bool(root.get("activate_output", True)),
        dropout=dropout,
        weight_init=init if isinstance(init, str) else "Normal",
    )


def _numbers(root: Mapping[Any, Any], name: str) -> tuple[float, ...]:
    value = root.get(name)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(type(number) in (int, float) for number in value):
        raise ValueError(f"{name}={short(value)}: a list of numbers is needed")
    return tuple(value)


def _filled(config: HypernetworkConfig, root: Mapping[Any, Any]) -> Hypernetwork:
    """The network with the file's tensors in it; nothing is made before they are known to fit."""
    with torch.device("meta"):
        network = Hypernetwork(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored: dict[str, StoredTensor] = {}
    for width in config.widths:
        pair = root[width]
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, Mapping) for part in pair):
            raise ValueError(f"width {width}: tensors for keys and for values are needed")
        for place, part in enumerate(pair):
            stored |= {f"layers.{width}.{place}.{OLD_NAMES.get(name, name)}": tensor for name, tensor in part.items()}
    if odd := sorted(expected.keys() ^ stored.keys()):
        what = "is missing" if odd[0] in expected else "has no place"
        raise ValueError(f"{len(odd)} tensors do not fit its layers {list(config.layers)}; first, {odd[0][:80]} {what}")
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not isinstance(tensor, StoredTensor) or tensor.shape != expected[name]:
            found = tensor.shape if isinstance(tensor, StoredTensor) else short(tensor)
            raise ValueError(f"{name} is {found}, its layers need {expected[name]}")
        state[name] = tensor.read().to(torch.float32).clone(memory_format=torch.contiguous_format)
        if not state[name].isfinite().all():
            raise ValueError(f"{name}: some of its numbers are not finite (NaN or infinity)")
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
