"""Opening and writing a checkpoint as a diffusers folder: a folder for each network, its config and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.families import Family
from sfumato.families.detect import Detection
from sfumato.weights.files import TensorFile, open_tensors, sha256
from sfumato.weights.layouts.diffusers_configs import components, stored_layers
from sfumato.weights.layouts.diffusers_family import family_of
from sfumato.weights.layouts.diffusers_names import (
    autoencoder_keys,
    canonical,
    component_files,
    rightly_unused,
    text_keys,
    unet_keys,
)
from sfumato.weights.layouts.diffusers_tokenizer import check_vocabulary
from sfumato.weights.layouts.tables import Table
from sfumato.weights.parts import Checkpoint, match, shapes_of

SURPLUS = "sfumato_surplus.safetensors"  # tensors of a single file that the folder's layout has no place for


def table_of(family: Family, part: str) -> Table:
    """Ours -> theirs for a network of the family, as far as a folder holds it."""
    if part == "unet":
        return unet_keys(family.unet)
    if part == "autoencoder":
        return autoencoder_keys(family.autoencoder)
    config = family.texts[family.text_parts.index(part)].config
    return text_keys(config, num_layers=stored_layers(family, part))


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """All JSON configs that a folder's networks, scheduler and index have; ValueError where one is no JSON."""
    configs = {}
    names = ("*.json", "*/*config.json", "*/special_tokens_map.json")
    for path in sorted(path for name in names for path in folder.glob(name)):
        name = path.relative_to(folder).as_posix()
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"ckpt={str(folder)!r}: {name} is not readable JSON ({error})") from error
        if isinstance(value, dict):
            configs[name] = value
    return configs


def open_folder(folder: Path, family: Family | None, variant: str | None) -> Checkpoint:
    """Read what a folder holds, without its data; a component that is missing is an error that names it."""
    if not (folder / "unet").is_dir():
        raise ValueError(f"ckpt={str(folder)!r}: a folder without unet/: not a checkpoint in the diffusers layout")
    configs = read_configs(folder)
    try:
        found = Detection(family, "as asked") if family else Detection(family_of(configs), "the folder's configs")
        folders = components(found.family, configs)
        for part, tower in zip(found.family.text_parts, found.family.texts, strict=True):
            check_vocabulary(folder / folders[part].replace("text_encoder", "tokenizer"), tower.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"ckpt={str(folder)!r}: {error}") from error
    checkpoint = Checkpoint(folder, "diffusers folder", found, {})
    for part, shapes in shapes_of(found.family).items():
        component = folders[part]
        pool = open_component(folder, component, variant)
        used = match(checkpoint, part, pool, table_of(found.family, part), shapes)
        for name, place in pool.items():
            if name in used:
                continue
            if rightly_unused(component, name):
                checkpoint.unused[f"{component}/{name}"] = place
            else:
                checkpoint.unknown.append(f"{component}/{name}")
    return checkpoint


def open_component(folder: Path, component: str, variant: str | None) -> dict[str, tuple[TensorFile, str]]:
    """A component's tensors by their names in this layout, over all its shards."""
    pool = {}
    for path in component_files(folder, component, variant):
        file = open_tensors(path)
        pool.update({canonical(component, name): (file, name) for name in file.names()})
    return pool


def folder_hash(files: Mapping[str, Path]) -> str:
    """Ten digits that name a folder's weights: the SHA-256 of the names and hashes of its files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {sha256(files[name])}\n".encode())
    return digest.hexdigest()[:10]
