"""What a safety checker says of a call's pictures, and what diffusers does about it: those flagged come back black.

A checker is one of ours (`check` of (B, H, W, 3) uint8 gives verdicts with `flagged`) or is called as theirs are.
Letters: B pictures, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.images import to_uint8
from sfumato.safety.concepts import FILES, open_concepts
from sfumato.weights.towers import prepared

log = logging.getLogger(__name__)

OWN = object()  # as a safety_checker: the folder's own

SIDE = 224  # px, of the pictures that the published checker's network takes


def check_checker(checker: Any) -> Any:
    """A checker that can look at pictures, or None; ValueError where it is neither."""
    if checker is not None and not callable(getattr(checker, "check", checker)):
        raise ValueError(
            f"safety_checker={checker!r}: None, a checker such as open_checker of sfumato.safety.choosing gives, or a "
            "function of (images, clip_input) is needed"
        )
    return checker


def own_checker(path: Path, index: Mapping[str, Any]) -> Any:
    """The checker that a diffusers folder's `index`, model_index.json, names; None where it names none.

    Where its weights are not in the folder a warning says that nothing looks. ValueError where they are no checker's.
    """
    if index.get("safety_checker") in (None, [None, None]):
        return None
    if not any((path / "safety_checker" / name).is_file() for name in FILES):
        log.warning("%s names a safety checker whose weights are not there: pictures are not looked at", path.name)
        return None
    return open_concepts(path / "safety_checker")


def looked_at(checker: Any, images: Tensor) -> tuple[Tensor, list[bool]]:
    """images (B, 3, H, W) about [-1, 1] -> the same with flagged ones black, and which those are."""
    flags = _flags(checker, to_uint8(images))
    if len(flags) != len(images):
        raise ValueError(f"safety_checker: it gave {len(flags)} verdicts for {len(images)} pictures")
    if any(flags):
        log.warning("%d of %d pictures flagged; black ones are given instead", sum(flags), len(flags))
        images = images.masked_fill(torch.tensor(flags, device=images.device)[:, None, None, None], -1.0)
    return images, flags


def _flags(checker: Any, pixels: np.ndarray) -> list[bool]:
    """Which pictures (B, H, W, 3) uint8 a checker flags."""
    if hasattr(checker, "check"):
        return [bool(verdict.flagged) for verdict in checker.check(pixels)]
    inputs = torch.stack([prepared(each, SIDE) for each in pixels])
    _, found = checker(images=pixels.astype(np.float32) / 255, clip_input=inputs)
    if isinstance(found, bool):  # of all
        return [found] * len(pixels)
    if not isinstance(found, Sequence):
        raise ValueError(f"safety_checker: it gave {found!r}; a list of bools is needed")
    return [bool(flag) for flag in found]
