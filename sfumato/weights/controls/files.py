"""What the loaders of steering networks share: opening a file or a folder of tensors, writing one, errors of one line.

Knows no network. A pickle is read, never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sfumato.families import Model
from sfumato.families.detect import Detection
from sfumato.weights.files import TensorFile, open_tensors, save_safetensors
from sfumato.weights.layouts.diffusers_names import DIFFUSERS_STEM
from sfumato.weights.layouts.folder import open_component
from sfumato.weights.layouts.tables import Place
from sfumato.weights.parts import Checkpoint, match
from sfumato.weights.placing import fill

Pool = dict[str, tuple[TensorFile, str]]


@contextmanager
def blamed(field: str, path: str | Path) -> Iterator[None]:
    """Inside, a ValueError becomes one line that begins with the field and the path."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if text.startswith("ckpt="):
            text = text.partition(": ")[2]
        raise ValueError(f"{field}={str(path)!r}: {' '.join(text.split())[:400]}") from error


def opened(path: Path) -> tuple[Pool, dict[str, Any], dict[str, str]]:
    """A file's or a diffusers folder's tensors by their stored names, the folder's config ({} of a file), the header.

    ValueError where there is neither.
    """
    if path.is_dir():
        path = path.resolve()
        config = path / "config.json"
        if not config.is_file():
            raise ValueError("a folder without config.json: not a network in the diffusers layout")
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"config.json is not readable JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError("config.json is not an object")
        return open_component(path.parent, path.name, None), values, {}
    if not path.is_file():
        raise ValueError("no such file or folder")
    file = open_tensors(path)
    return {name: (file, name) for name in file.names()}, {}, dict(file.metadata)


def without_prefix(pool: Pool, prefix: str) -> Pool:
    """Only the tensors under the prefix, without it; all, where none has it."""
    inside = {name.removeprefix(prefix): place for name, place in pool.items() if name.startswith(prefix)}
    return inside or pool


def save_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a network in the diffusers layout; ValueError where the folder has something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out={str(path)!r}: it is there already; a new or empty folder is needed")
    save_safetensors(path / f"{DIFFUSERS_STEM}.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_target(path: Path) -> bool:
    """Whether the target is a folder's name; ValueError where it is a pickle's."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"out={str(path)!r}: .safetensors or a folder; pickles are not written")
    if path.suffix == ".safetensors" and path.is_dir():
        raise ValueError(f"out={str(path)!r}: a folder is there")
    return path.suffix != ".safetensors"


def fill_from(network: nn.Module, pool: Pool, path: Path, model: Model, what: str) -> None:
    """Weights of the same names into a network, on the model's device; ValueError: as `what`, which tensor lacks."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = Checkpoint(path, "adapter", Detection(model.family, "the model's"), {})
    used = match(found, "adapter", pool, {name: Place(name) for name in shapes}, shapes)
    found.unknown = sorted(set(pool) - used)
    if problems := found.problems():
        raise ValueError(f"as {what}, {problems[0]}")
    fill(network, found.parts["adapter"], model.device, model.dtype)
