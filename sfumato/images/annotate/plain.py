"""Annotators that need nothing but arithmetic: smaller, blurred, grey, inverted. Letters: H W pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from sfumato.images.annotate.registry import Option, annotator, three


def luminance(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8, ITU-R BT.601."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _resized(pixels: np.ndarray, width: int, height: int, how: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((max(1, width), max(1, height)), how))


@annotator("tile", Option("factor", 4.0, 1.0, 32.0, "how many times smaller it becomes in between"))
def tile(pixels: np.ndarray, *, factor: float) -> np.ndarray:
    """The picture without its details, made small and large again, for "tile" networks.

    ControlNet 1.1, f1e_tile: means of blocks down, Lanczos up.
    """
    height, width = pixels.shape[:2]
    small = _resized(pixels, round(width / factor), round(height / factor), Image.Resampling.BOX)
    return _resized(small, width, height, Image.Resampling.LANCZOS)


@annotator("blur", Option("sigma", 9.0, 0.1, 100.0, "deviation of the Gaussian in pixels"))
def blur(pixels: np.ndarray, *, sigma: float) -> np.ndarray:
    """The picture blurred."""
    soft = gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0), mode="nearest")
    return np.rint(soft).clip(0, 255).astype(np.uint8)


@annotator("invert")
def invert(pixels: np.ndarray) -> np.ndarray:
    """The negative: a drawing of dark lines on white becomes what networks were trained on, white on black."""
    return 255 - pixels


@annotator("threshold", Option("level", 127, 0, 254, "luminance above which a pixel is white"))
def threshold(pixels: np.ndarray, *, level: float) -> np.ndarray:
    """Black and white by luminance."""
    return three(np.where(luminance(pixels) > level, 255, 0).astype(np.uint8))


@annotator("grey")
def grey(pixels: np.ndarray) -> np.ndarray:
    """The luminance, for networks that colour or light a picture."""
    return three(luminance(pixels))


@annotator("colour", Option("block", 64, 2, 512, "side of a block in pixels"))
def colour(pixels: np.ndarray, *, block: float) -> np.ndarray:
    """Blocks of one colour each, for T2I-Adapter's "color".

    Mou et al. 2023: bicubic to one cell a block, nearest back.
    """
    height, width = pixels.shape[:2]
    small = _resized(pixels, width // int(block), height // int(block), Image.Resampling.BICUBIC)
    return _resized(small, width, height, Image.Resampling.NEAREST)
