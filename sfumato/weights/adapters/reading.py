"""A file of an adapter -> an Adapter for a family: every key is found or named, and nothing matched is an error.

Reads .safetensors files, torch files through the safe reader, and folders of PEFT or diffusers. Tensors stay views of
the file's memory map.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sfumato.families import FAMILIES, Family, Model
from sfumato.models.deltas import Change, Difference, LoRA, Rows, check_fits
from sfumato.weights.adapters.adapter import Adapter, Key
from sfumato.weights.adapters.groups import Made, Scale, changes_of, grouped
from sfumato.weights.adapters.names import Targets, find
from sfumato.weights.files import TensorFile, open_tensors, sha256
from sfumato.weights.parts import shapes_of

log = logging.getLogger(__name__)

IN_FOLDERS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' place for PEFT's configs, in a .safetensors header
# Modules of other architectures, by which their adapters are known.
TRANSFORMERS = re.compile(r"(double_blocks|single_blocks|joint_blocks|single_transformer_blocks|lora_transformer_)")

Scales = Callable[[str], Scale | None]  # a stored module name -> what a config says of it


def load_adapter(path: str | Path, model: Model | Family) -> Adapter:
    """Read an adapter for a model, or for any model of a family, and log what it is: see `read_adapter`."""
    adapter = read_adapter(path, model)
    (log.warning if adapter.unmatched else log.info)("%s", adapter.describe())
    return adapter


def read_adapter(path: str | Path, model: Model | Family) -> Adapter:
    """A file's adapter, or a folder's; PEFT's config is read where it lies beside.

    ValueError, one line that begins with the file's name: no adapter, made for another family, shapes that do not
    fit, nothing matched.
    """
    path = _file_of(Path(path))
    family = model.family if isinstance(model, Model) else model
    try:
        file = open_tensors(path)
        return _read(file, path, family)
    except ValueError as error:
        text = re.sub(r"^ckpt=", "lora=", str(error))
        raise ValueError(text if text.startswith("lora=") else f"lora={str(path)!r}: {text}") from error


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"lora={str(path)!r}: the folder has none of {', '.join(IN_FOLDERS)}")


def _read(file: TensorFile, path: Path, family: Family) -> Adapter:
    groups, unmatched = grouped(file.names())
    if not groups:
        first = next(iter(file.names()), None)
        raise ValueError(f"it is no adapter ({'it is empty' if first is None else f'its first tensor is {first}'})")
    scales = _scales(file.metadata, path)
    changes: dict[Key, tuple[Change, ...]] = {}
    taken: set[object] = set()
    matched, total = 0, len(groups) + len(unmatched)
    for stem, names in groups.items():
        found = find(stem, family)
        if not found or found[0][0] in taken:  # some files name a module twice, in two spellings
            unmatched.append(stem)
            continue
        fields = {field: file.read(name) for field, name in names.items()}
        targets, made = _fitting(stem, fields, found, family, scales, groups, file)
        taken.update(targets)
        matched += 1
        for key, change in made:
            changes[key] = (*changes.get(key, ()), change)
    if not matched:
        guess = _made_for(groups, file, family)
        raise ValueError(
            f"0 of {total} keys matched the model's family {family.name}, "
            + (f"it looks to be made for {guess}" if guess else f"first {next(iter(groups))}")
        )
    return Adapter(
        name=path.stem if path.name not in IN_FOLDERS else path.parent.name,
        hash=sha256(path),
        changes=MappingProxyType(changes),
        matched=matched,
        total=total,
        unmatched=tuple(unmatched),
        metadata=MappingProxyType(dict(file.metadata)),
    )


def _fitting(
    stem: str,
    fields: Mapping[str, Tensor],
    found: tuple[Targets, ...],
    family: Family,
    scales: Scales,
    groups: Mapping[str, Mapping[str, str]],
    file: TensorFile,
) -> tuple[Targets, list[tuple[Key, Change]]]:
    """The first of the modules that the tensors fit, and the changes of its parameters."""
    problem: ValueError | None = None
    for targets in found:
        try:
            return targets, _changes(fields, targets, family, lambda: scales(stem))
        except ValueError as error:
            problem = problem or error
    guess = _made_for(groups, file, family)
    if guess:
        raise ValueError(f"it looks to be made for {guess}, the model's family is {family.name}") from problem
    raise ValueError(f"{stem}: {problem}") from problem


def _changes(
    fields: Mapping[str, Tensor], targets: Targets, family: Family, scale: Callable[[], Scale | None]
) -> list[tuple[Key, Change]]:
    out: list[tuple[Key, Change]] = []
    for target in targets:
        shapes = shapes_of(family)[target.part]
        shape = shapes[f"{target.module}.weight"]
        whole = shape if target.third is None else (3 * shape[0], *shape[1:])
        made: Made = changes_of(fields, whole, f"{target.module}.bias" in shapes, scale)
        for end, change in made:
            key = target.parameter(end)
            if target.third is not None:
                if not isinstance(change, LoRA | Difference):
                    raise ValueError(f"{type(change).__name__} of stacked q, k and v; LoRA or diff is allowed")
                change = Rows(change, target.third)
            check_fits(change, shapes[key[1]])
            out.append((key, change))
    return out


def _made_for(groups: Mapping[str, Mapping[str, str]], file: TensorFile, model: Family) -> str | None:
    """The first family whose context has the width that an attention to it is changed for; None for the model's own."""
    for stem, names in groups.items():
        if TRANSFORMERS.search(stem):
            return "a transformer such as Flux or SD 3"
        if re.search(r"attn2[._](?:processor[._])?to_[kv]$", stem):
            name = next((names[each] for each in ("down", "hada_w1_b", "diff") if each in names), None)
            width = file.shape(name)[1] if name and len(file.shape(name)) > 1 else None
            if width == model.unet.context_dim:
                return None
            for family in FAMILIES.values():
                if family.unet.context_dim == width:
                    return family.name
    return (
        "xl" if len(model.texts) == 1 and any("te2_" in stem or "text_encoder_2" in stem for stem in groups) else None
    )


def _scales(metadata: Mapping[str, str], path: Path) -> Scales:
    """What PEFT's configs, in the header or beside the file, say of each module."""
    flat: dict[str, Any] = {}
    beside = path.with_name(PEFT_CONFIG)
    if METADATA in metadata:
        flat = _json(metadata[METADATA], METADATA)
    elif path.name.startswith("adapter_model.") and beside.is_file():
        flat = _json(beside.read_text(encoding="utf-8"), PEFT_CONFIG)

    def scale(stem: str) -> Scale | None:
        prefix = next((f"{each}." for each in _components(flat) if stem.startswith(f"{each}.")), "")
        module = stem.removeprefix("base_model.model.").removeprefix(prefix)
        alpha, rank = (flat.get(prefix + name) for name in ("lora_alpha", "r"))
        alpha = flat.get(f"{prefix}alpha") if alpha is None else alpha
        alpha = _pattern(flat.get(f"{prefix}alpha_pattern"), module, alpha)
        rank = _pattern(flat.get(f"{prefix}rank_pattern"), module, rank)
        if alpha is None or rank is None:
            return None
        return Scale(float(alpha), int(rank), bool(flat.get(f"{prefix}use_rslora")))

    return scale


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a JSON object is needed")
    return found


def _components(flat: Mapping[str, Any]) -> list[str]:
    """Networks that diffusers' flat form speaks of, the longest first."""
    return sorted({key.split(".")[0] for key in flat if "." in key}, key=len, reverse=True)


def _pattern(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends in, as PEFT takes them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
