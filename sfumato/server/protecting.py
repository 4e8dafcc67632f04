"""What is done with finished pictures before they are kept, and what a kept one says of it.

Whoever looks at pictures, marks and signs them is handed in; nothing of the kind is known here. Letters: H W pixels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sfumato.images import RECIPE_KEY
from sfumato.images.reading import DAMAGE
from sfumato.types import Job, Result

log = logging.getLogger(__name__)

REMEMBERED = 20_000  # results whose recipes need not be read again
# What each part of a recipe that is answered has at least.
VERDICT, MARK, SIGNATURE = {"policy", "flagged", "scores", "checker"}, {"text", "method"}, {"by"}


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
    """What a result says of itself; nothing where it is gone, or damaged, which is logged once.

    A file's name is its content's, so it is read once.
    """
    if path is None:
        return Told()
    try:
        return _read(path)
    except FileNotFoundError:  # cleaned away meanwhile
        return Told()
    except (*DAMAGE, AttributeError) as error:  # a recipe that is no object has no parts
        _tell_damage(path, " ".join(str(error).split()) or type(error).__name__)
        return Told()


@lru_cache(maxsize=REMEMBERED)
def _read(path: Path) -> Told:
    with Image.open(path) as picture:
        recipe = json.loads(picture.info.get(RECIPE_KEY, "{}"))
    parts = [recipe.get(name) for name in ("safety", "watermark", "signature")]
    for part, needed in zip(parts, (VERDICT, MARK, SIGNATURE), strict=True):
        if part is not None and not needed <= part.keys():
            raise ValueError(f"its recipe is damaged ({', '.join(sorted(needed))} are needed)")
    safety, watermark, signature = parts
    return Told(safety, watermark, None if signature is None else signature["by"])


@lru_cache(maxsize=REMEMBERED)
def _tell_damage(path: Path, why: str) -> None:
    """Log that a result cannot be read; once each."""
    log.warning("result %s: damaged or cut short (%s)", path.name, why)
