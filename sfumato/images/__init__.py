"""Pictures: as numbers, as files of ours with their recipe, and as anybody's files. Knows nothing of models."""

from sfumato.images.files import RECIPE_KEY, load_png, save_png
from sfumato.images.given import picture_from
from sfumato.images.pixels import UPSCALERS, from_uint8, grid, resize, to_uint8
from sfumato.images.reading import Picture, mask_of, read_mask, read_picture

__all__ = [
    "RECIPE_KEY",
    "UPSCALERS",
    "Picture",
    "from_uint8",
    "grid",
    "load_png",
    "mask_of",
    "picture_from",
    "read_mask",
    "read_picture",
    "resize",
    "save_png",
    "to_uint8",
]
