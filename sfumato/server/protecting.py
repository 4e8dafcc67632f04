"""What is done with finished pictures before they are kept, and what a kept one says of it.

Whoever looks at pictures, marks and signs them is handed in; nothing of the kind is known here. Letters: H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sfumato.images import RECIPE_KEY
from sfumato.types import Job, Result

REMEMBERED = 20_000  # results whose recipes need not be read again


class Protector(Protocol):
    """Looks at orders before they are accepted, and treats pictures before anybody can fetch them."""

    @property
    def hides(self) -> bool:
        """Whether a flagged picture is not shown as it was drawn, so that previews must not show it either."""

    def check_order(self, job: Job, width: int, height: int) -> None:
        """ValueError where a complete job, whose pictures are width x height px, may not be drawn."""

    def protected(self, result: Result, alive: Callable[[], None]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Each picture (H, W, 3) uint8 as it may be shown, with its recipe; calls `alive` now and then."""


@dataclass(frozen=True)
class Told:
    """What a picture's recipe says was done with it: `safety` and `watermark` as the recipe has them, who signed."""

    safety: Mapping[str, Any] | None = None
    watermark: Mapping[str, Any] | None = None
    signed_by: str | None = None

    @property
    def flagged(self) -> bool:
        """Whether a checker flagged it."""
        return bool(self.safety and self.safety.get("flagged"))


def told_by(path: Path | None) -> Told:
    """What a result says of itself; nothing where it is gone. A file's name is its content's, so it is read once."""
    if path is None:
        return Told()
    try:
        return _read(path)
    except FileNotFoundError:  # cleaned away meanwhile
        return Told()


@lru_cache(maxsize=REMEMBERED)
def _read(path: Path) -> Told:
    with Image.open(path) as picture:
        recipe = json.loads(picture.info.get(RECIPE_KEY, "{}"))
    signature = recipe.get("signature") or {}
    return Told(recipe.get("safety"), recipe.get("watermark"), signature.get("by"))
