"""Any picture a person hands us, read whole, upright and in 8 bits of sRGB; or one clear line why not.

Knows no recipe and no model. Letters: H W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 170_000_000  # Pillow refuses to open more than 179 million


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 3) uint8, upright, sRGB; alpha (H, W) uint8 where the file has any, its colours not multiplied.

    `sha256` is of the size and the pixels with alpha: the same for the same picture in another file format.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels))
        if self.alpha is not None:
            digest.update(np.ascontiguousarray(self.alpha))
        return digest.hexdigest()


def read_picture(path: str | Path, field: str = "image") -> Picture:
    """The picture of a file. ValueError names `field`, the path and what is wrong with it, in one line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{field}={str(path)!r}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{field}={str(path)!r}: not a readable picture ({error})") from error
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = np.asarray(upright.convert("RGBA"))
        return Picture(rgba[..., :3].copy(), rgba[..., 3].copy())
    return Picture(np.asarray(upright.convert("RGB")).copy())


def read_mask(path: str | Path, field: str = "mask") -> np.ndarray:
    """The mask of a file, (H, W) float32 in [0, 1]: 1 is drawn anew. ValueError as in `read_picture`."""
    return mask_of(read_picture(path, field))


def mask_of(picture: Picture) -> np.ndarray:
    """A picture as a mask, (H, W) float32 in [0, 1]: its luminance (ITU-R 601-2), times its alpha where it has one."""
    light = np.asarray(Image.fromarray(picture.pixels).convert("L"), dtype=np.float32) / 255
    return light if picture.alpha is None else light * (picture.alpha.astype(np.float32) / 255)
