"""Opening a checkpoint in the original single-file layout: .safetensors, .ckpt, .pt, with or without EMA twins."""

from __future__ import annotations

import re
from pathlib import Path

from sfumato.families import Family
from sfumato.families.detect import ASKED, Clues, Detection, detect, other_kind
from sfumato.weights.files import TensorFile, open_tensors
from sfumato.weights.layouts import original_names
from sfumato.weights.layouts.tables import Change, Place
from sfumato.weights.overrides import recall
from sfumato.weights.parts import Checkpoint, Pool, match, shapes_of


def open_file(path: Path, family: Family | None, use_ema: bool) -> Checkpoint:
    """Read what a file holds, without its data; `family` overrides what is detected or remembered for it."""
    file = open_tensors(path)
    stored = {name: (file, name) for name in file.names()}
    try:
        found = _detect(file, family or recall(path), path)
        natural = None if family is None else natural_family(file, path)
        pool = {original_names.canonical(name, found.family): place for name, place in stored.items()}
        checkpoint = Checkpoint(path, "single file", found, file.metadata, files=(path,), ema=use_ema)
        checkpoint.natural = natural
        checkpoint.has_ema = any(name.startswith(original_names.EMA + "diffusion_model") for name in pool)
        if use_ema and not checkpoint.has_ema:
            raise ValueError("use_ema: the file holds no averaged weights (model_ema...)")
        used: set[str] = set()
        for part, shapes in shapes_of(found.family).items():
            table = original_names.part_table(found.family, part, shapes)
            table = {ours: _spelled(place, pool) for ours, place in table.items()}
            if use_ema and part == "unet":
                table = {ours: Place(original_names.ema_name(place.name)) for ours, place in table.items()}
                used |= {name for name in pool if name.startswith(original_names.UNET)}
            used |= match(checkpoint, part, pool, table, shapes)
        _sort_rest(checkpoint, {name: place for name, place in pool.items() if name not in used})
    except ValueError as error:
        raise ValueError(f"ckpt={str(path)!r}: {error}") from error
    return checkpoint


def _spelled(place: Place, pool: Pool) -> Place:
    """A place as the file spells it: some converters write OpenCLIP's projection as a linear layer."""
    linear = f"{place.name}.weight"
    if place.change is Change.TRANSPOSED and place.name not in pool and linear in pool:
        return Place(linear)
    return place


def natural_family(file: TensorFile, path: Path) -> Family | None:
    """What a file would be taken for if nobody had said; None where it is no known checkpoint."""
    try:
        return _detect(file, None, path).family
    except ValueError:
        return None


def _detect(file: TensorFile, family: Family | None, path: Path) -> Detection:
    if family is not None:
        return Detection(family, ASKED)
    shapes = {name: file.shape(name) for name in file.names()}
    return detect(shapes, Clues(file.metadata, path.stem, _yaml_prediction(path), file.read))


def _yaml_prediction(path: Path) -> str | None:
    """The prediction that a config beside the file (same name, .yaml) tells, of the original code or its successor."""
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return None
    text = beside.read_text(encoding="utf-8", errors="replace")
    if found := re.search(r"(V|Eps)(Scaling|Weighting)\b", text):  # configs of generative-models
        return "v" if found[1] == "V" else "eps"
    if found := re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.M):
        return found[1]
    return "eps" if "LatentDiffusion" in text else None  # the original's default


def _sort_rest(checkpoint: Checkpoint, rest: Pool) -> None:
    """Tensors of no network: known and rightly unused, or unknown."""
    for name, place in rest.items():
        if original_names.rightly_unused(name, checkpoint.family) or not original_names.is_ours(
            name, checkpoint.family
        ):
            checkpoint.unused[name] = place
        else:
            checkpoint.unknown.append(name)
    if (
        checkpoint.unknown
        and not checkpoint.parts["unet"]
        and all(checkpoint.missing.get(part) for part in checkpoint.family.parts)
    ):
        raise ValueError(f"it is {other_kind(list(rest))}, no checkpoint of the family {checkpoint.family.name}")
