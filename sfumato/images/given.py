"""Pictures that a program hands over instead of a file: Pillow's images and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sfumato.images import reading
from sfumato.images.reading import Picture


def picture_from(value: Any, field: str = "image") -> Picture:
    """A Picture of an image of Pillow, or an array (H, W), (H, W, 3) or (H, W, 4) uint8. ValueError names the field.

    An image is read as its file would be: turned as its EXIF says, in sRGB as its profile says, 16 bits as 8.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, np.ndarray):
        channels = value.shape[2] if value.ndim == 3 else 1
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in value.shape:
            raise ValueError(f"{field}: an array (H, W, 3) uint8 is needed, got {value.shape} {value.dtype}")
        value = Image.fromarray(value.squeeze(2) if value.ndim == 3 and channels == 1 else value)
    if not isinstance(value, Image.Image):
        raise ValueError(f"{field}={value!r}: a path, an image of Pillow or an array is needed")
    turn = reading.TURNS.get(reading._orientation(value, field))
    image = reading._eight_bits(value if turn is None else value.transpose(turn), field)
    profile = value.info.get("icc_profile")
    return Picture(reading._srgb(reading._without_alpha(image), profile, field), reading._alpha_of(image))
