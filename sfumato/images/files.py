"""Our own pictures as files: PNG with the recipe inside, which appear whole or not at all.

The recipe is JSON under the text key "sfumato". Knows nothing of models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

RECIPE_KEY = "sfumato"


def save_png(path: Path, image: np.ndarray, recipe: dict[str, Any] | None = None, *, new: bool = False) -> None:
    """Write (H, W, 3) uint8 beside, then rename; an OSError (full disk, no permission) leaves no half file.

    With `new`, a file that is already there is left alone and FileExistsError raised, also where another process
    made it a moment ago.
    """
    with written_beside(path) as beside:
        with beside.open("wb") as file:
            write_png(file, image, recipe)
        if new:
            path.touch(exist_ok=False)  # claims the name


def write_png(file: BinaryIO, image: np.ndarray, recipe: Mapping[str, Any] | None = None) -> None:
    """A PNG of (H, W, 3) uint8 with its recipe inside, into an open file."""
    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False))
    Image.fromarray(image).save(file, format="PNG", pnginfo=info)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A hidden place beside `path` to write to, which becomes it at the end; after an error nothing is left."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_png(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels (H, W, 3) uint8 and the recipe; ValueError where the file is no picture or carries no recipe."""
    if not path.is_file():
        raise ValueError(f"picture={str(path)!r}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(RECIPE_KEY)
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture={str(path)!r}: not a readable picture ({error})") from error
    if text is None:
        raise ValueError(f"picture={str(path)!r}: it carries no sfumato recipe")
    try:
        recipe = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged ({error})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged (not an object)")
    return pixels, recipe
