"""What a checkpoint holds for a family: each tensor of ours with its place on disk, and what does not fit.

Knows shapes and names, no layout: a table tells where a tensor lies. Nothing is read but what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.families import Family
from sfumato.families.detect import Detection
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText
from sfumato.models.unet import UNet
from sfumato.weights.files import TensorFile
from sfumato.weights.layouts.tables import Change, Table, ours_of, stored_shape

Pool = Mapping[str, tuple[TensorFile, str]]  # a stored name in its layout's own spelling -> where it really is


@dataclass(frozen=True)
class Source:
    """One tensor of ours on disk, read on demand: `stored` in `file`, changed to `shape`."""

    file: TensorFile
    stored: str
    change: Change
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.stored)

    def read(self) -> Tensor:
        """The tensor, a view of the file's memory map."""
        return ours_of(self.file.read(self.stored), self.change).reshape(self.shape)

    def release(self) -> None:
        """Hand the map's pages back; only when no view of the tensor is in use."""
        self.file.release(self.stored)


@dataclass
class Checkpoint:
    """What a file or folder holds for its family: `parts` by our names, and what does not fit, in the layout's names.

    `unused` are the tensors that are in no network and rightly so, by their stored names; `natural` is the family that
    it would be taken for, where a person named one. `files` are its own; `vae` is what another autoencoder was taken
    from, with its files; `ema` and `variant` are how it was read.
    """

    path: Path
    layout: str  # "single file" or "diffusers folder"
    detection: Detection
    metadata: Mapping[str, str]
    parts: dict[str, dict[str, Source]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    misshapen: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unused: dict[str, tuple[TensorFile, str]] = field(default_factory=dict)
    has_ema: bool = False
    natural: Family | None = None
    files: tuple[Path, ...] = ()
    vae: tuple[Path, tuple[Path, ...]] | None = None
    ema: bool = False
    variant: str | None = None

    @property
    def family(self) -> Family:
        return self.detection.family

    @property
    def hint(self) -> str:
        """What to think of where a family was named that does not fit."""
        if self.natural is None or self.natural.name == self.family.name:
            return ""
        return f"; by itself it would be taken for {self.natural.name}"

    def problems(self) -> list[str]:
        """What keeps it from being loaded, each in words; empty where nothing does."""
        found = []
        for part, names in self.missing.items():
            whole = not self.parts[part]
            found.append(
                f"the {_in_words(part, self.family)} is missing" if whole else f"{part}: {_first(names, 'missing')}"
            )
        found += self.misshapen
        if self.unknown:
            found.append(_first(self.unknown, "in no network of the family"))
        return found


def _in_words(part: str, family: Family) -> str:
    """What a network is called by people."""
    if part not in family.text_parts:
        return part
    number = family.text_parts.index(part) + 1
    which = f" {number} of {len(family.texts)}" if len(family.texts) > 1 else ""
    return f"text encoder{which} ({family.texts[number - 1].prefix}...)"


def _first(names: list[str], what: str) -> str:
    return (
        f"the tensor {names[0]} is {what}"
        if len(names) == 1
        else f"{len(names)} tensors are {what}, first {min(names)}"
    )


def build(family: Family) -> dict[str, nn.Module]:
    """A family's networks by the names of `family.parts`, randomly initialised (build on "meta" to fill later)."""
    texts = [CLIPText(tower.config) for tower in family.texts]
    return {
        "unet": UNet(family.unet),
        "autoencoder": Autoencoder(family.autoencoder),
        **dict(zip(family.text_parts, texts, strict=True)),
    }


@lru_cache(maxsize=32)
def shapes_of(family: Family) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each network the shapes of its tensors by our names; no memory is taken."""
    with torch.device("meta"):
        return {
            part: {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            for part, module in build(family).items()
        }


def match(
    checkpoint: Checkpoint, part: str, pool: Pool, table: Table, shapes: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Find a network's tensors in the pool; notes what is missing or misshapen, returns the stored names used."""
    sources: dict[str, Source] = {}
    used, missing = set(), []
    for ours, (name, change) in table.items():
        if name not in pool:
            missing.append(name)
            continue
        used.add(name)
        file, stored = pool[name]
        expected, shape = stored_shape(shapes[ours], change), file.shape(stored)
        if not file.dtype(stored).is_floating_point:
            checkpoint.misshapen.append(f"the tensor {name} is {file.dtype(stored)}: floating point is needed")
        elif _without_ones(shape) != _without_ones(expected):
            checkpoint.misshapen.append(f"the tensor {name} has shape {shape}, expected {expected}")
        else:
            plain = change if shape == expected else Change.SAME  # a 1 x 1 convolution stored as a linear layer
            sources[ours] = Source(file, stored, plain, shapes[ours])
    checkpoint.parts[part] = sources
    if missing:
        checkpoint.missing[part] = sorted(set(missing))
    return used


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its last dimensions of 1."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
