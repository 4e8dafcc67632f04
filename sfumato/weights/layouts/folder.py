"""Opening and writing a checkpoint as a diffusers folder: a folder for each network, its config and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sfumato.families import Family
from sfumato.families.detect import ASKED, Detection
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
from sfumato.weights.parts import Checkpoint, Pool, match, shapes_of

CONFIGS = (
    *("model_index.json", "unet/config.json", "vae/config.json"),
    *("scheduler/scheduler_config.json", "low_res_scheduler/scheduler_config.json"),
    *(f"text_encoder{number}/config.json" for number in ("", "_2")),
    *(f"tokenizer{n}/{name}.json" for n in ("", "_2") for name in ("tokenizer_config", "special_tokens_map")),
)  # that are read
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
    """The JSON configs of a folder's networks, schedulers, tokenizers and index; ValueError where one is no object.

    Other JSON files, also of a safety checker, are not read.
    """
    found = {name: read_config(folder, name) for name in CONFIGS}
    return {name: config for name, config in found.items() if config is not None}


def read_config(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object in a folder; None where there is no such file. ValueError where it is something else."""
    if not (folder / name).is_file():
        return None
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"ckpt={str(folder)!r}: {name} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"ckpt={str(folder)!r}: {name} holds a {type(value).__name__}; a JSON object is needed")
    return value


def open_folder(folder: Path, family: Family | None, variant: str | None) -> Checkpoint:
    """Read what a folder holds, without its data; a component that is missing is an error that names it."""
    if not (folder / "unet").is_dir():
        raise ValueError(f"ckpt={str(folder)!r}: a folder without unet/: not a checkpoint in the diffusers layout")
    configs = read_configs(folder)
    try:
        found = Detection(family, ASKED) if family else Detection(family_of(configs), "the folder's configs")
        folders = components(found.family, configs)
        for part, tower in zip(found.family.text_parts, found.family.texts, strict=True):
            check_vocabulary(folder / folders[part].replace("text_encoder", "tokenizer"), tower.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"ckpt={str(folder)!r}: {error}") from error
    checkpoint = Checkpoint(folder, "diffusers folder", found, {})
    for part, shapes in shapes_of(found.family).items():
        component = folders[part]
        pool = open_component(folder, component, variant)
        checkpoint.files += files_of(pool)
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


def files_of(pool: Pool) -> tuple[Path, ...]:
    """The files in which tensors lie, each once."""
    return tuple(dict.fromkeys(file.path for file, _ in pool.values()))


def folder_hash(folder: Path, files: Iterable[Path]) -> str:
    """Ten digits that name a folder's weights: the SHA-256 of the names within it and the hashes of its files."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()[:10]
