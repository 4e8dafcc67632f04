"""Encoded pictures -> pixels or sizes, from bytes, so that shards and folders give the same. Knows no source.

Letters: H W pixels.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from sfumato.images.given import picture_from
from sfumato.images.reading import DAMAGE, KINDS, MAX_PIXELS, ORIENTATION

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def decode(data: bytes, least: tuple[int, int] | None = None) -> np.ndarray:
    """The first frame as (H, W, 3) uint8: upright, in sRGB, what is see-through over white.

    A JPEG may come out at a half, a quarter or an eighth of its size where it still covers twice `least`
    (width, height), which saves most of the work. ValueError with the reason where it is damaged or no picture.
    """
    try:
        with _opened(data) as opened:
            if least is not None:
                opened.draft(None, (2 * max(least), 2 * max(least)))  # both sides: it may lie on its side
            opened.load()
            picture = picture_from(opened, "picture")
    except DAMAGE as error:
        raise ValueError(reason_of(error)) from error
    if picture.alpha is None:
        return picture.pixels
    alpha = picture.alpha[..., None].astype(np.float32) / 255
    return np.rint(picture.pixels * alpha + 255 * (1 - alpha)).astype(np.uint8)


def size_in(data: bytes) -> tuple[int, int]:
    """(width, height) as it stands upright, from the header; ValueError with the reason where there is none."""
    try:
        with _opened(data) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except DAMAGE as error:
        raise ValueError(reason_of(error)) from error
    return (height, width) if turned else (width, height)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the size, checked below, and of tags not used here
        image = Image.open(io.BytesIO(data), formats=[kind for kind in KINDS if kind in Image.OPEN and kind != "TGA"])
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels (at most {MAX_PIXELS} are read)")
    return image


def reason_of(error: BaseException) -> str:
    """One line: the kind of damage, then the reader's own words in brackets."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of a kind that is not read"
    if type(error) is ValueError and not words.startswith("picture"):
        return words
    return f"damaged or cut short ({words})"
