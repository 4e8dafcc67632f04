"""Masks: (H, W) float32 in [0, 1], 1 is drawn anew. Blurs, boxes, what lies under a mask, one picture over another.

Knows no file and no latents. A box is (left, top, right, bottom) in pixels. Letters: H W pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import distance_transform_edt, gaussian_filter1d, maximum_filter

Box = tuple[int, int, int, int]
FAR = 1e6  # sigmas: what lies that way is no edge
# Radii in px of ever finer blurs laid over each other, and how often each: A1111's masked content "fill".
FILL_RADII = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def blurred(mask: np.ndarray, sigma_x: float, sigma_y: float) -> np.ndarray:
    """A Gaussian of kernel 2 * int(2.5 sigma + 0.5) + 1 along each axis, as A1111 blurs masks; 0 leaves it alone."""
    for axis, sigma in ((1, sigma_x), (0, sigma_y)):
        if sigma > 0:
            mask = gaussian_filter1d(mask, sigma, axis=axis, mode="mirror", radius=int(2.5 * sigma + 0.5))
    return np.clip(mask, 0, 1).astype(np.float32)


def feathered(mask: np.ndarray, sigma_x: float, sigma_y: float) -> np.ndarray:
    """An edge that fades inwards: from 0 outside the mask to the mask itself, two sigmas within.

    Of what is thinner, the middle of every stroke reaches the mask. What was 0 is exactly 0.
    """
    if sigma_x == sigma_y == 0 or not (mask == 0).any():
        return mask
    # how far inside, in sigmas; a direction that is not blurred does not count
    sampling = [1 / sigma if sigma > 0 else FAR for sigma in (sigma_y, sigma_x)]
    inside = distance_transform_edt(mask > 0, sampling=sampling)
    reach = [2 * int(np.ceil(2 * sigma)) + 1 for sigma in (sigma_y, sigma_x)]
    depth = np.minimum(2, maximum_filter(inside, size=reach))  # of the stroke here
    share = np.divide(inside, depth, out=np.zeros_like(inside), where=depth > 0).clip(0, 1)
    return (mask * share * share * (3 - 2 * share)).astype(np.float32)


def box_of(mask: np.ndarray, padding: int = 0) -> Box:
    """The smallest box around all that is not 0, larger by `padding` on each side but not than the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("mask: nothing in it is white, so there is nothing to draw")
    height, width = mask.shape
    return (
        max(0, int(columns[0]) - padding),
        max(0, int(rows[0]) - padding),
        min(width, int(columns[-1]) + 1 + padding),
        min(height, int(rows[-1]) + 1 + padding),
    )


def shaped_like(box: Box, width: int, height: int, within: tuple[int, int]) -> Box:
    """The box made wider or higher to the shape width : height, moved to stay within (height, width) of a picture.

    Where the picture is too small for that, the box is as large as it can be.
    """
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    if wide * height < high * width:
        left, right = _grown(left, right, round(high * width / height), within[1])
    else:
        top, bottom = _grown(top, bottom, round(wide * height / width), within[0])
    return left, top, right, bottom


def _grown(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """An interval of `length`, or of all `most`, about the same middle, within 0 and `most`."""
    length = min(max(length, last - first), most)
    start = min(max(0, first - (length - (last - first)) // 2), most - length)
    return start, start + length


def filled(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) uint8 with the colours around the mask flowing into it: blurs, the finest on top."""
    alpha = np.round((1 - mask) * 255).astype(np.uint8)
    known = np.dstack([_premultiplied(pixels, alpha), alpha])
    result = Image.new("RGBA", (pixels.shape[1], pixels.shape[0]))
    for radius, times in FILL_RADII:
        softened = Image.fromarray(known, "RGBa").filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(softened)
    return np.asarray(result.convert("RGB")).copy()


def _premultiplied(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.round(pixels * (alpha[..., None] / 255.0)).astype(np.uint8)


def laid_on(ground: np.ndarray, drawn: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`drawn` over `ground`, both (H, W, 3) uint8, by weight (H, W): equal to the ground to the bit where that is 0."""
    result = ground.copy()
    for row in np.flatnonzero(weight.any(axis=1)):  # one by one: a large picture is never there in floats
        share = weight[row, :, None]
        mixed = np.round(ground[row] * (1 - share) + drawn[row] * share).astype(np.uint8)
        result[row] = np.where(share > 0, mixed, ground[row])
    return result
