"""What steers a job, checked before the job is accepted: annotators, their options, image encoders; and hints shown.

Reads the headers of files, never their weights. Knows no HTTP. Letters: H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sfumato.images.annotate import ANNOTATORS, annotate, find_annotator
from sfumato.images.fitting import fitted
from sfumato.memory import GIB, free_memory
from sfumato.models.hed import HEDConfig
from sfumato.types import Control
from sfumato.weights.controls import hed
from sfumato.weights.controls.files import opened
from sfumato.weights.controls.names import kin_of
from sfumato.weights.files import open_tensors
from sfumato.weights.shelf import Shelf
from sfumato.weights.towers import FILES

if TYPE_CHECKING:  # which makes its jobs' hints with what is here
    from sfumato.server.service import Service

SLACK = 1.35  # of what a network's tensors take, as for U-Nets (memory/estimate.py)


def annotators() -> tuple[str, ...]:
    """The annotators that can be used here: those that need no network, or one that is installed."""
    edges = find_spec(hed.PACKAGE) is not None
    return tuple(
        name for name, each in ANNOTATORS.items() if each.network is None or (each.network == "edges" and edges)
    )


def check_control(control: Control, number: int, shelf: Shelf) -> None:
    """ValueError where a control whose network is on the shelf cannot make its hint, or has not its image encoder."""
    field = f"controls[{number}]"
    wanted = _encoder(shelf.find("control", control.model))
    if wanted is not None:
        _check_encoder(control, field, wanted, shelf)
    elif control.annotate is not None:
        check_options(control.annotate, control.options, field)
    elif control.options:
        raise ValueError(f"{field}.options: without annotate there are none")


def check_options(name: str, options: Mapping[str, float], field: str) -> None:
    """ValueError that begins with the field where an annotator is not to be had, or an option is wrong."""
    if name not in annotators():
        known = ", ".join(annotators())
        raise ValueError(f"{field}.annotate={name[:80]!r}: there is no such one here, but {known}")
    known_options = {option.name: option for option in find_annotator(name).options}
    for option, value in options.items():
        if option not in known_options:
            raise ValueError(
                f"{field}.options: {name} has no {option[:40]!r}, but {', '.join(known_options) or 'none'}"
            )
        try:
            known_options[option].checked(value)
        except ValueError as error:
            raise ValueError(f"{field}.options: {error}") from error


def hint_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of a picture's hint whose shorter side is `side` px; `size` is the picture's (width, height)."""
    scale = side / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def hint_bytes(size: tuple[int, int]) -> int:
    """What the network of an annotator takes for (width, height) px: the most is at HED's first scale.

    A convolution's input, its result, and what is made of that, in float32.
    """
    return round(3 * 4 * HEDConfig().widths[0] * size[0] * size[1] * SLACK)


def check_hint_memory(name: str, size: tuple[int, int], device: torch.device, field: str) -> None:
    """ValueError with the estimate where an annotator has a network that has no room for (width, height) px."""
    if find_annotator(name).network is None:
        return
    try:
        free = free_memory(device)
    except ValueError:  # the system does not say
        return
    taken = hint_bytes(size)
    if taken > free:
        raise ValueError(
            f"{field}: {name} of {size[0]} x {size[1]} px needs about {taken / GIB:.1f} GiB, {free / GIB:.1f} are free"
        )


def hint_of(service: Service, pixels: np.ndarray, name: str, options: Mapping[str, float], side: int) -> np.ndarray:
    """The hint (H, W, 3) uint8 of a picture whose shorter side is made `side` px first.

    Annotators with a network work beside the service's drawing. ValueError as of annotate, or where there is no memory
    for one.
    """
    width, height = size = hint_size((pixels.shape[1], pixels.shape[0]), side)
    pipeline = service.pipeline
    if find_annotator(name).network is None:
        return annotate(fitted(pixels, width, height, "stretch"), name, None, **options)
    control = Control(annotate=name, options=dict(options), resize="stretch")

    def made() -> torch.Tensor:
        check_hint_memory(name, size, pipeline.model.device, "image")
        return pipeline.extras.hint(control, pixels, width, height)

    hint = service.beside(made, hint_bytes(size))
    return np.ascontiguousarray((hint[0] * 255).round().byte().permute(1, 2, 0).numpy())


def _check_encoder(control: Control, field: str, wanted: tuple[int, bool], shelf: Shelf) -> None:
    """ValueError where the image encoder that is named, or the only one, does not give what an IP-Adapter reads."""
    there = shelf.files("vision")
    if control.annotate is None and len(there) != 1:
        known = f"one of {', '.join(there)}" if there else "there is none here"
        raise ValueError(f"{field}.annotate=None: {control.model!r} needs to be told its image encoder: {known}")
    if control.annotate is not None and control.annotate.lower() not in {name.lower() for name in there}:
        known = ", ".join(there) or "none"
        raise ValueError(f"{field}.annotate={control.annotate[:80]!r}: no such image encoder here, but {known}")
    path = next(iter(there.values())) if control.annotate is None else shelf.find("vision", control.annotate)
    width, embedding = _tower(path, path.stat().st_mtime)
    numbers, plus = wanted
    given = width if plus else embedding
    if numbers != given:
        reads = f"{control.model!r} reads {numbers} numbers, this encoder gives {given}"
        raise ValueError(f"{field}.annotate={control.annotate!r}: {reads}")


def _encoder(path: Path) -> tuple[int, bool] | None:
    """How many numbers an IP-Adapter reads of an encoder, and whether of its patches; None of other networks."""
    return _read(path, path.stat().st_mtime)


@lru_cache(maxsize=1000)
def _read(path: Path, changed: float) -> tuple[int, bool] | None:
    try:
        pool, values, _ = opened(path)
    except ValueError:  # damaged: loading it says what is wrong, as the job's own error
        return None
    if values or kin_of(pool) != "an IP-Adapter":
        return None
    plus = "image_proj.latents" in pool
    name = "image_proj.proj_in.weight" if plus else "image_proj.proj.weight"
    if name not in pool:
        return None
    file, stored = pool[name]
    return file.shape(stored)[1], plus


@lru_cache(maxsize=1000)
def _tower(path: Path, changed: float) -> tuple[int, int]:
    """(width, width of embeddings) of an image encoder's file or folder."""
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path)
    with open_tensors(path) as file:
        names = ("vision_model.embeddings.patch_embedding.weight", "visual_projection.weight")
        if lacking := sorted(set(names) - set(file.names())):
            raise ValueError(f"controls.annotate: no tensor {lacking[0]} in {path.stem!r}; it is no image encoder")
        return file.shape(names[0])[0], file.shape(names[1])[0]
