"""Checkpoints, single files and folders alike: opening them, loading a Model from them, writing one. Strict.

Opening reads names and shapes only. Loading builds the networks on "meta" and fills them tensor by tensor from a
memory map, so that nothing is in memory twice. Layouts, families and files have modules of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.families import Family, Model
from sfumato.families.detect import ASKED
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.weights.files import file_hash, open_tensors, save_safetensors
from sfumato.weights.layouts import original_names
from sfumato.weights.layouts.diffusers_names import autoencoder_keys
from sfumato.weights.layouts.folder import files_of, folder_hash, open_component, open_folder, read_config
from sfumato.weights.layouts.single_file import natural_family, open_file
from sfumato.weights.layouts.tables import Place, to_layout
from sfumato.weights.parts import Checkpoint, Pool, build, match, shapes_of
from sfumato.weights.placing import fill

log = logging.getLogger(__name__)

SCALE_TOLERANCE = 0.01  # relative: of scales that were rounded in writing


def open_checkpoint(
    path: str | Path,
    family: Family | None = None,
    use_ema: bool = False,
    vae: str | Path | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Read what a checkpoint holds, without its data. Every ValueError begins with the file's name.

    `family` overrides what is detected, `use_ema` takes the averaged U-Net of a full training file, `vae` is a file or
    folder to take the autoencoder from, `variant` names a folder's files ("fp16").
    """
    path = Path(path)
    if path.is_dir():
        opened = open_folder(path, family, variant)
        if use_ema:
            raise ValueError(f"ckpt={str(path)!r}: use_ema: a diffusers folder holds one set of weights")
    else:
        opened = open_file(path, family, use_ema)
    opened.variant = variant
    if vae is not None:
        _take_autoencoder(opened, Path(vae), variant)
    return opened


def _take_autoencoder(checkpoint: Checkpoint, path: Path, variant: str | None) -> None:
    """Replace the checkpoint's autoencoder by that of another file or folder, in whichever layout."""
    family = checkpoint.family
    shapes = shapes_of(family)["autoencoder"]
    try:
        if path.is_dir():
            inner = path if (path / "vae").is_dir() else path.parent
            pool: Pool = open_component(inner, "vae" if inner == path else path.name, variant)
            table = autoencoder_keys(family.autoencoder)
        else:
            file = open_tensors(path)
            prefix = original_names.AUTOENCODER
            pool = {name.removeprefix(prefix): (file, name) for name in file.names()}
            diffusers = any(name.startswith("encoder.down_blocks.") for name in pool)
            table = autoencoder_keys(family.autoencoder) if diffusers else {name: Place(name) for name in shapes}
        taken = Checkpoint(path, "autoencoder", checkpoint.detection, {})
        match(taken, "autoencoder", pool, table, shapes)
        if problems := taken.problems():
            raise ValueError(f"it does not hold {family.name}'s autoencoder: {problems[0]}")
        _check_scale(_scale_of(path), family)
    except ValueError as error:
        text = str(error)
        raise ValueError(
            text.replace("ckpt=", "vae=", 1) if text.startswith("ckpt=") else f"vae={str(path)!r}: {text}"
        ) from error
    checkpoint.vae = path, files_of(pool)
    checkpoint.parts["autoencoder"] = taken.parts["autoencoder"]
    checkpoint.missing.pop("autoencoder", None)
    checkpoint.misshapen = [text for text in checkpoint.misshapen if original_names.AUTOENCODER not in text]


def _scale_of(path: Path) -> float | None:
    """The scale of an autoencoder's latents: of the family of the file that it is in, or its folder's config.json."""
    if path.is_dir():
        config = (path / "vae" if (path / "vae").is_dir() else path) / "config.json"
        found = read_config(path, config.relative_to(path).as_posix()) or {}
        scale = found.get("scaling_factor")
        return float(scale) if isinstance(scale, (int, float)) and not isinstance(scale, bool) else None
    family = natural_family(open_tensors(path), path)
    return None if family is None else family.latent_scale  # an autoencoder alone does not tell


def _check_scale(scale: float | None, family: Family) -> None:
    """ValueError where an autoencoder tells that its latents have another scale than the U-Net was trained with."""
    if scale is not None and abs(scale / family.latent_scale - 1) > SCALE_TOLERANCE:
        raise ValueError(
            f"its latents have the scale {scale:g}, the U-Net of {family.name} knows {family.latent_scale:g}: it is "
            "another family's"
        )


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    family: Family | None = None,
    use_ema: bool = False,
    vae: str | Path | None = None,
    variant: str | None = None,
) -> Model:
    """Load a checkpoint (arguments as in `open_checkpoint`); every ValueError begins with the file's name."""
    checkpoint = open_whole(path, family, use_ema, vae, variant)
    return model_of(checkpoint, torch.device(device), dtype)


def open_whole(
    path: str | Path,
    family: Family | None = None,
    use_ema: bool = False,
    vae: str | Path | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """A checkpoint that can be loaded as it is, and the log of what was decided; ValueError names the first problem."""
    checkpoint = open_checkpoint(path, family, use_ema, vae, variant)
    if problems := checkpoint.problems():
        more = f" (and {len(problems) - 1} more: sfumato inspect)" if len(problems) > 1 else ""
        raise ValueError(f"ckpt={str(path)!r}: as {checkpoint.family.name}, {problems[0]}{more}{checkpoint.hint}")
    report(checkpoint, use_ema)
    return checkpoint


def report(checkpoint: Checkpoint, use_ema: bool = False) -> None:
    """Log what was decided of a checkpoint, and why."""
    name, found = checkpoint.path.name, checkpoint.detection
    log.info("%s: family %s (%s), %s", name, found.family.name, found.why, checkpoint.layout)
    if not found.sure:
        log.warning("%s: taken for %s; if pictures are wrong, name the family with --family", name, found.family.name)
    if checkpoint.has_ema:
        log.info("%s: the %s weights are used", name, "averaged (EMA)" if use_ema else "plain, not the averaged,")
    if checkpoint.unused:
        log.info("%s: %d known tensors rightly unused", name, len(checkpoint.unused))


def model_of(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    """Build and fill the networks of a checkpoint that has no problems."""
    family = checkpoint.family
    with torch.device("meta"):
        parts = build(family)
    for part, module in parts.items():
        fill(module, checkpoint.parts[part], device, dtype)
    path = checkpoint.path
    return Model(
        family=family,
        texts=tuple(parts[part] for part in family.text_parts),  # type: ignore[misc]
        unet=parts["unet"],  # type: ignore[arg-type]
        autoencoder=parts["autoencoder"],  # type: ignore[arg-type]
        tokenizers=tuple(ClipTokenizer(tower.config.vocab_size) for tower in family.texts),
        device=device,
        dtype=dtype,
        name=_name_of(path),
        hasher=partial(_hash_of, path, checkpoint.files),
        reader=partial(_facts_of, checkpoint),
    )


def _name_of(path: Path) -> str:
    """A checkpoint's name, however its path is spelled."""
    return path.stem if path.is_file() else path.resolve().name


def _hash_of(path: Path, files: Sequence[Path]) -> str:
    return file_hash(path) if path.is_file() else folder_hash(path, files)


def _facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """`Model.facts` of a checkpoint."""
    facts: dict[str, Any] = {"family": checkpoint.family.name} if checkpoint.detection.why == ASKED else {}
    if checkpoint.ema:
        facts["ema"] = True
    if checkpoint.variant is not None:
        facts["variant"] = checkpoint.variant
    if checkpoint.vae is not None:
        path, files = checkpoint.vae
        digest = file_hash(files[0]) if len(files) == 1 else folder_hash(files[0].parent, files)
        facts["vae"] = {"name": _name_of(path), "hash": digest}
    return facts


def save_checkpoint(
    path: str | Path, family: Family, parts: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype = torch.float16
) -> None:
    """Write networks' state dicts, by the names of `family.parts`, as one file in the original layout.

    The family goes into its header. ValueError names a network, tensor or shape that is not the family's.
    """
    tensors: dict[str, Tensor] = {}
    for part, shapes in shapes_of(family).items():
        state = {name: tensor.detach().to(dtype) for name, tensor in parts.get(part, {}).items()}
        for name, tensor in state.items():
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{part}: the tensor {name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
        try:
            tensors |= to_layout(state, original_names.part_table(family, part, shapes))
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
    if unknown := set(parts) - set(family.parts):
        raise ValueError(f"{min(unknown)}: no network of the family; there are {', '.join(family.parts)}")
    save_safetensors(path, tensors, {"format": "pt", "sfumato.family": family.to_json()})
