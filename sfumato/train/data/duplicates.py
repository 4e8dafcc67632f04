"""Pictures that are nearly the same: perceptual hashes of 64 bits, and what lies within a few bits of another.

Knows no source. Letters: n pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, pairwise
from math import log2

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
MOST = 8  # bits of distance; beyond, pictures that are not alike are found, and slowly
SIDE = 4  # of the thumbnail whose colours are compared
FEW = 32  # pictures of a small crowd
CHUNK = 2048  # pictures of a crowd that are compared with the crowd at once


def _grey(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    small = Image.fromarray(pixels).convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float64)


def _packed(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def dhash(pixels: np.ndarray) -> int:
    """(H, W, 3) uint8 -> 64 bits: is each of 8 x 8 spots darker than its right neighbour? (Krawetz 2013)"""
    small = _grey(pixels, 9, 8)
    return _packed(small[:, :-1] < small[:, 1:])


def phash(pixels: np.ndarray) -> int:
    """(H, W, 3) uint8 -> 64 bits: is each of the 8 x 8 lowest waves above their median? (Zauner 2010, section 3.2.1)"""
    waves = dctn(_grey(pixels, 32, 32), type=2, norm="ortho")[:8, :8]
    return _packed(waves > np.median(waves.ravel()[1:]))


HASHES: Mapping[str, Callable[[np.ndarray], int]] = {"dhash": dhash, "phash": phash}


def colours(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (48,) uint8: its colours in a raster of 4 x 4, which hashes of greys do not tell apart."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)).reshape(-1)


def groups(hashes: np.ndarray, seen: np.ndarray, distance: int, colour: float) -> list[list[int]]:
    """Groups of two or more pictures that are near, directly or through others of the group; numbers ascending.

    hashes (n,) uint64, seen (n, 48) uint8. Near: at most `distance` of 64 bits and, on average, `colour` levels of 255
    apart.
    """
    if not 0 <= distance <= MOST:
        raise ValueError(f"distance={distance}: 0 to {MOST} bits are allowed")
    if colour < 0:
        raise ValueError(f"colour={colour}: 0 or more levels are needed")
    pairs = [pair for pair in near_pairs(hashes, distance, seen.sum(axis=1)) if len(pair)]
    if not pairs:
        return []
    first, second = np.concatenate(pairs).T
    apart = np.abs(seen[first].astype(np.int16) - seen[second]).mean(axis=1)
    first, second = first[apart <= colour], second[apart <= colour]
    edges = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(len(hashes), len(hashes)))
    _, labels = connected_components(edges, directed=False)
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return sorted(part.tolist() for part in np.split(order, cuts) if len(part) > 1)


def near_pairs(hashes: np.ndarray, distance: int, light: np.ndarray) -> Iterator[np.ndarray]:
    """Pieces (k, 2) of pairs of numbers at most `distance` bits apart; a pair may come more than once.

    The bits are cut into distance + j bands. Two hashes that differ in `distance` bits agree in j whole bands, so only
    those are compared that agree in some j; j grows with n, so that few agree by chance. In a crowd of more than CHUNK
    those with the same hash are paired with the next in `light` (n,) only.
    """
    agreed = 1
    while BITS * agreed / (distance + agreed) < min(32, log2(max(2, len(hashes)))):
        agreed += 1
    ends = np.linspace(0, BITS, distance + agreed + 1).round().astype(int)
    masks = [((1 << int(stop)) - 1) ^ ((1 << int(start)) - 1) for start, stop in pairwise(ends)]
    for chosen in combinations(masks, agreed):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        starts, stops = np.r_[0, cuts], np.r_[cuts, len(order)]
        ends = np.repeat(np.where(stops - starts <= FEW, stops, 0), stops - starts)  # of each one's crowd, if small
        place = np.arange(len(order))
        for step in range(1, FEW):  # all small crowds at once: each one and that which comes `step` behind it
            place = place[place + step < ends[place]]
            near = bits_set(hashes[order[place]] ^ hashes[order[place + step]]) <= distance
            yield np.stack([order[place[near]], order[place[near] + step]], axis=1)
        for start, stop in zip(starts[stops - starts > FEW], stops[stops - starts > FEW], strict=True):
            yield from _near(hashes, order[start:stop], distance, light)


def _near(hashes: np.ndarray, crowd: np.ndarray, distance: int, light: np.ndarray) -> Iterator[np.ndarray]:
    """The near pairs among a crowd, as numbers of the whole."""
    if len(crowd) > CHUNK:  # of empty pictures there may be very many
        crowd = crowd[np.lexsort((light[crowd], hashes[crowd]))]
        same = hashes[crowd[1:]] == hashes[crowd[:-1]]
        yield np.stack([crowd[:-1][same], crowd[1:][same]], axis=1)
        crowd = crowd[np.r_[True, ~same]]
    for start in range(0, len(crowd), CHUNK):
        rows = crowd[start : start + CHUNK]
        away = bits_set(hashes[rows][:, None] ^ hashes[crowd][None])
        left, right = np.nonzero(away <= distance)
        ordered = left + start < right
        yield np.stack([rows[left[ordered]], crowd[right[ordered]]], axis=1)


def bits_set(x: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set (Warren, Hacker's Delight, section 5-1)."""
    one, two, four = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    x = x - ((x >> np.uint64(1)) & one)
    x = (x & two) + ((x >> np.uint64(2)) & two)
    x = (x + (x >> np.uint64(4))) & four
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
