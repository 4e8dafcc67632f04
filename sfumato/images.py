"""Pictures: tensors in [-1, 1] <-> uint8 arrays <-> files, grids, and the recipe inside a PNG.

Knows nothing of models. The recipe is JSON under the text key "sfumato"; files appear whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

RECIPE_KEY = "sfumato"
UPSCALERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_uint8(images: Tensor) -> np.ndarray:
    """images (B, 3, H, W) about [-1, 1], clipped -> (B, H, W, 3) uint8, rounded to nearest."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> images (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def resize(images: np.ndarray, width: int, height: int, how: str = "lanczos") -> np.ndarray:
    """(B, H, W, 3) uint8 -> (B, height, width, 3); `how` is one of UPSCALERS."""
    if how not in UPSCALERS:
        raise ValueError(f"upscaler={how!r}: one of {', '.join(UPSCALERS)}")
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), UPSCALERS[how])) for image in images])


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """images (B, H, W, 3) uint8 -> one picture of ceil(B / columns) rows, read left to right, with black gaps."""
    if columns < 1:
        raise ValueError(f"columns={columns}: 1 or more are needed")
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    sheet = np.zeros((gap + rows * (height + gap), gap + columns * (width + gap), 3), dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: Path, image: np.ndarray, recipe: dict[str, Any] | None = None, *, new: bool = False) -> None:
    """Write (H, W, 3) uint8 beside, then rename; an OSError (full disk, no permission) leaves no half file.

    With `new`, a file that is already there is left alone and FileExistsError raised, also where another process
    made it a moment ago.
    """
    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False))
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(image).save(beside, format="PNG", pnginfo=info)
        if new:
            path.touch(exist_ok=False)  # claims the name
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
