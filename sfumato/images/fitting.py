"""Pictures of one size made to fit another: stretched, cropped, filled up or padded. Letters: H W pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfumato.images.pixels import UPSCALERS

FITS = ("keep", "stretch", "crop", "fill", "latent")


def fitted(
    pixels: np.ndarray, width: int, height: int, fit: str, how: str = "lanczos", mirrored: bool | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 or (H, W) float32 in [0, 1] -> (height, width, ...) of the same kind.

    fit: "stretch" (also "latent", where latents are stretched later); "crop": enlarged to cover, the middle kept;
    "fill": the whole in the middle, its edges drawn out; "keep": not resized, what lacks at the right and below is
    mirrored, or 0 where not `mirrored` (None: pictures are, masks are not). `how` is one of UPSCALERS. ValueError where
    the picture is larger than what keeps it.
    """
    tall, wide = pixels.shape[:2]
    if (wide, tall) == (width, height):
        return pixels
    if fit == "keep":
        if wide > width or tall > height:
            raise ValueError(f"resize='keep': {wide} x {tall} px do not fit into {width} x {height}")
        return _padded(pixels, height - tall, width - wide, pixels.ndim == 3 if mirrored is None else mirrored)
    if fit == "crop":
        scale = max(width / wide, height / tall)
        large = _resized(pixels, max(width, round(wide * scale)), max(height, round(tall * scale)), how)
        top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
        return np.ascontiguousarray(large[top : top + height, left : left + width])
    if fit == "fill":
        scale = min(width / wide, height / tall)
        small = _resized(pixels, max(1, min(width, round(wide * scale))), max(1, min(height, round(tall * scale))), how)
        top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
        around = [(top, height - small.shape[0] - top), (left, width - small.shape[1] - left)]
        return np.pad(small, around + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    return _resized(pixels, width, height, how)


def _padded(pixels: np.ndarray, below: int, right: int, mirrored: bool) -> np.ndarray:
    room = [(0, below), (0, right), *[(0, 0)] * (pixels.ndim - 2)]
    return np.pad(pixels, room, mode="symmetric") if mirrored else np.pad(pixels, room)


def _resized(pixels: np.ndarray, width: int, height: int, how: str) -> np.ndarray:
    found = np.array(Image.fromarray(pixels).resize((width, height), UPSCALERS[how]))  # a copy: theirs is read-only
    return np.clip(found, 0, 1) if pixels.dtype == np.float32 else found
