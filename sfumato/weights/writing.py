"""A checkpoint's tensors -> a file in the original layout or a diffusers folder, whichever the target's name asks for.

What one layout has no place for is kept beside in the other, so that there and back is the identity, bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sfumato.families import Family
from sfumato.families.detect import Clues, detect
from sfumato.weights.files import TensorFile, open_tensors
from sfumato.weights.layouts import original_names
from sfumato.weights.layouts.diffusers_configs import components, folder_files
from sfumato.weights.layouts.folder import SURPLUS, table_of
from sfumato.weights.lazy import Lazy, from_source, stored
from sfumato.weights.parts import Checkpoint
from sfumato.weights.stream import write_safetensors

log = logging.getLogger(__name__)

Parts = Mapping[str, Mapping[str, Lazy]]
Progress = Callable[[int], None]
AVERAGES = "model_ema."  # names of the original layout's averaged weights
HEADER = "sfumato.header"  # the single file's own metadata, as JSON, in the surplus file's


def parts_of(checkpoint: Checkpoint) -> dict[str, dict[str, Lazy]]:
    """All tensors of a checkpoint's networks by our names."""
    return {
        part: {name: from_source(source) for name, source in sources.items()}
        for part, sources in checkpoint.parts.items()
    }


def surplus_of(checkpoint: Checkpoint) -> tuple[dict[str, Lazy], dict[str, str]]:
    """Tensors of the original layout that are in no network, and the single file's metadata."""
    if checkpoint.layout == "single file":
        kept = {stored_name: _plain(file, stored_name) for file, stored_name in checkpoint.unused.values()}
        return kept, dict(checkpoint.metadata)
    path = checkpoint.path / SURPLUS
    if not path.is_file():
        return {}, {}
    file = open_tensors(path)
    return {name: _plain(file, name) for name in file.names()}, _header_in(file)


def _header_in(file: TensorFile) -> dict[str, str]:
    """The single file's metadata that a surplus file keeps; ValueError, naming the file, where it is damaged."""
    text = file.metadata.get(HEADER, "{}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not all(isinstance(value, str) for value in header.values()):
        raise ValueError(f"ckpt={str(file.path)!r}: {HEADER}={text[:60]!r}: a JSON object of texts is needed")
    return header


def marks_of(surplus: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Those of the surplus that tell other programs, and us, what a model predicts."""
    return {name: lazy for name, lazy in surplus.items() if name in ("v_pred", "ztsnr")}


def _described(
    target: Path, family: Family, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The metadata, with the family in it where the file would be taken for another one."""
    shapes = {name: lazy.shape for name, lazy in tensors.items()}
    try:
        found = detect(shapes, Clues(metadata, target.stem, None, lambda name: tensors[name].read())).family
    except ValueError:
        found = None
    same = found is not None and replace(found, name=family.name, defaults=family.defaults) == family
    return dict(metadata) if same else {**metadata, "sfumato.family": family.to_json()}


def _plain(file: TensorFile, name: str) -> Lazy:
    return Lazy(file.shape(name), file.dtype(name), lambda: file.read(name), lambda: file.release(name))


def in_precision(parts: Parts, dtype: torch.dtype | None) -> Parts:
    """The parts in another precision; None leaves each tensor as it is."""
    if dtype is None:
        return parts
    return {part: {name: lazy.to(dtype) for name, lazy in tensors.items()} for part, tensors in parts.items()}


def averages_in(surplus: Mapping[str, Lazy], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """The surplus with its averaged weights in another precision; None leaves them, and what else there is stays."""

    def is_average(name: str, lazy: Lazy) -> bool:
        return name.startswith(AVERAGES) and lazy.dtype.is_floating_point and len(lazy.shape) > 0  # not their decay

    return {
        name: lazy.to(dtype) if dtype is not None and is_average(name, lazy) else lazy for name, lazy in surplus.items()
    }


def write(
    target: Path,
    family: Family,
    parts: Parts,
    surplus: Mapping[str, Lazy] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a .safetensors file, or a folder where the target has no such ending; whole or not at all.

    ValueError where the target is there already as the other kind, or is a folder with something in it.
    """
    if target.suffix == ".safetensors":
        if target.is_dir():
            raise ValueError(f"out={str(target)!r}: a folder is there")
        tensors = _single(family, parts) | dict(surplus or {})
        write_safetensors(target, tensors, _described(target, family, tensors, metadata or {}), progress)
        return
    if target.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"out={str(target)!r}: .safetensors or a folder; pickles are not written")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"out={str(target)!r}: it is there already; a new or empty folder is needed")
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _write_folder(beside, family, parts, surplus or {}, metadata or {}, progress)
        if target.is_dir():
            target.rmdir()
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _single(family: Family, parts: Parts) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    for part, ours in parts.items():
        tensors |= stored(ours, original_names.part_table(family, part, ours))
    return tensors


def _write_folder(
    folder: Path,
    family: Family,
    parts: Parts,
    surplus: Mapping[str, Lazy],
    metadata: Mapping[str, str],
    progress: Progress | None,
) -> None:
    folder.mkdir(parents=True)
    for name, text in folder_files(family).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    surplus, folders = dict(surplus), components(family)
    for part, ours in parts.items():
        table = table_of(family, part)
        rest = {name: lazy for name, lazy in ours.items() if name not in table}
        surplus |= stored(rest, original_names.part_table(family, part, rest))
        file = "model" if folders[part].startswith("text_encoder") else "diffusion_pytorch_model"
        write_safetensors(
            folder / folders[part] / f"{file}.safetensors", stored(ours, table), {"format": "pt"}, progress
        )
    if surplus or metadata:
        write_safetensors(folder / SURPLUS, surplus, {HEADER: json.dumps(dict(metadata))}, progress)
        log.info("%d tensors and the header that this layout has no place for are in %s", len(surplus), SURPLUS)
