"""Sizes of pictures that train together: aspect-ratio buckets, an idea of NovelAI's (2022).

Knows no picture. Sizes are (width, height).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]


def bucket_sizes(max_pixels: int, least: int, most: int, step: int, square: int) -> list[Size]:
    """Every width from `least` to `most` in steps of `step` with the largest height whose area is in `max_pixels`,
    the same lying on their side, and `square` x `square`; sorted by aspect ratio."""
    if not 0 < step <= least <= most or least * least > max_pixels:
        raise ValueError(f"step={step}, least={least}, most={most}, max_pixels={max_pixels}: no bucket fits")
    sizes: set[Size] = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, max_pixels // width // step * step)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size[0]))


def nearest(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """sizes (n, 2) -> (n,) the bucket whose aspect ratio is nearest, by its logarithm; of equals the largest."""
    order = sorted(range(len(buckets)), key=lambda k: -buckets[k][0] * buckets[k][1])
    ratios = np.log([buckets[k][0] / buckets[k][1] for k in order])
    best = np.empty(len(sizes), dtype=np.int32)
    for start in range(0, len(sizes), 1 << 16):  # pieces, so that memory stays flat
        piece = sizes[start : start + (1 << 16)]
        away = np.abs(np.log(piece[:, 0] / piece[:, 1])[:, None] - ratios)
        best[start : start + len(piece)] = np.asarray(order)[away.round(9).argmin(axis=1)]
    return best


def merged(assigned: np.ndarray, buckets: Sequence[Size], batch_size: int) -> np.ndarray:
    """`assigned` (n,) again, with every bucket of fewer than `batch_size` pictures given to the nearest larger one.

    The smallest goes first. ValueError where the whole set is smaller than a batch.
    """
    if len(assigned) < batch_size:
        raise ValueError(f"batch_size={batch_size}: the set has only {len(assigned)} pictures that can be used")
    assigned = assigned.copy()
    ratios = np.log([width / height for width, height in buckets])
    counts = np.bincount(assigned, minlength=len(buckets))
    while small := [k for k in np.flatnonzero(counts) if counts[k] < batch_size]:
        least = min(small, key=lambda k: (counts[k], k))
        others = [k for k in np.flatnonzero(counts) if k != least]
        into = min(others, key=lambda k: (abs(ratios[k] - ratios[least]), k))
        assigned[assigned == least] = into
        counts[into] += counts[least]
        counts[least] = 0
    return assigned


NOVELAI = tuple(bucket_sizes(512 * 768, 256, 1024, 64, 512))  # their SD 1.x buckets

# Podell et al. 2023, appendix I; (width, height).
SDXL: tuple[Size, ...] = (
    (2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640),
    (1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832),
    (1152, 896), (1088, 896), (1088, 960), (1024, 960), (1024, 1024), (960, 1024), (960, 1088), (896, 1088),
    (896, 1152), (832, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408), (704, 1472), (640, 1536),
    (640, 1600), (576, 1664), (576, 1728), (576, 1792), (512, 1856), (512, 1920), (512, 1984), (512, 2048),
)  # fmt: skip
PRESETS = {"novelai": NOVELAI, "sdxl": SDXL}
