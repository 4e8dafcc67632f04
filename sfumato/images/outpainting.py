"""The mathematics of outpainting: first fills for new ground, the passes of a big extension, and seams.

Pictures are (H, W, 3), masks (H, W) with 1 where the picture is unknown. Knows no model and no file.
Letters: H W pixels, S N spectra of the picture and of white noise.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

FILLS = ("noise", "edge", "mirror")
UNTOUCHED = 1e-3  # a mask below this is known; "Outpainting mk2", AUTOMATIC1111
NEIGHBOURS = 6  # lines on either side that a seam is compared with
FINEST_STEPS = 40  # of conjugate gradients; errors of about 0.2 levels where a step of 50 varies smoothly
ROUNDING = 0.5  # mean second difference, in levels, that rounding to 8 bits makes in a smooth picture


def shaped_noise(
    picture: np.ndarray,
    mask: np.ndarray,
    falloff: float = 1.0,
    colour_variation: float = 0.05,
    *,
    rng: np.random.Generator,
) -> np.ndarray:
    """Noise that looks like the known part of a picture (parlance-zz's g-diffuser; AUTOMATIC1111's "Outpainting mk2").

    picture (H, W, 3) float in [0, 1]; mask (H, W) in [0, 1]. `falloff` in [0, 4] is the exponent of the known part's
    amplitudes: lower has more detail. `colour_variation` in [0, 1]: 0 is grey noise, 1 noise of its own in each
    channel, before the histogram of each known channel is given to it. mk2 draws from `default_rng(0)`. -> (H, W, 3)
    in [0, 1], of the picture's dtype, mixed by the mask; where the mask is 0 the picture, bit by bit.
    """
    _check(picture, mask, np.floating)
    if not 0 <= falloff <= 4:
        raise ValueError(f"falloff={falloff}: from 0 to 4")
    if not 0 <= colour_variation <= 1:
        raise ValueError(f"colour_variation={colour_variation}: from 0 to 1")
    known = mask < UNTOUCHED
    if not known.any():
        raise ValueError("mask: nothing of the picture is known")
    height, width = mask.shape
    shown = picture * (1.0 - mask[..., None].astype(np.float64))
    windowed = shown / (shown.max() or 1.0) + shown.mean() * mask[..., None]
    white = rng.random((height, width, 3))
    white = colour_variation * white + (1 - colour_variation) * white.mean(axis=2, keepdims=True)
    spectrum = np.fft.rfft2(windowed, axes=(0, 1))
    size = np.abs(spectrum)
    phase = np.divide(spectrum, size, out=np.ones_like(spectrum), where=size > 0)
    power = np.abs(np.fft.rfft2(white, axes=(0, 1)) * _low_pass(height, width)[..., None]) ** 2
    # mk2: |N|^2 |S|^falloff with the phase of S
    noise = np.fft.irfft2(power * size**falloff * phase, s=(height, width), axes=(0, 1))
    wanted = mask > 0
    noise[wanted] = with_histogram(noise[wanted], picture[known])
    mixed = np.clip(shown + noise * mask[..., None], 0, 1).astype(picture.dtype)
    return np.where(wanted[..., None], mixed, picture)


def with_histogram(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """values (N, C) moved so that each channel has the histogram of like (M, C) (Gonzalez & Woods 2018, 3.3)."""
    matched = np.empty(values.shape, dtype=np.float64)
    for channel in range(values.shape[1]):
        _, place, counts = np.unique(values[:, channel], return_inverse=True, return_counts=True)
        levels, like_counts = np.unique(like[:, channel], return_counts=True)
        share = np.cumsum(counts) / len(values)
        matched[:, channel] = np.interp(share, np.cumsum(like_counts) / len(like), levels)[place.reshape(-1)]
    return matched


def extended(
    picture: np.ndarray,
    left: int = 0,
    right: int = 0,
    up: int = 0,
    down: int = 0,
    *,
    blur: float = 0.0,
    fill: str = "noise",
    falloff: float = 1.0,
    colour_variation: float = 0.05,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) uint8 with new ground on its sides, in pixels -> the canvas uint8 and its mask float32.

    The mask is 0 exactly on the old picture, which is there bit by bit, and rises to 1 within `blur` pixels of new
    ground. Where it rises, the canvas goes over from the mirrored picture to the fill, so nothing jumps where the
    result is mixed by the mask. `fill`: "noise" is `shaped_noise`, "edge" repeats the border, blurred more the
    farther it is, "mirror" reflects.
    """
    sides = {"left": left, "right": right, "up": up, "down": down}
    _check_sides(sides)
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r}: one of {', '.join(FILLS)}")
    if not (blur >= 0 and math.isfinite(blur)):
        raise ValueError(f"blur={blur}: 0 or more pixels")
    height, width = picture.shape[:2]
    room = ((up, down), (left, right), (0, 0))
    away = distance((height, width), left, right, up, down)
    part = np.clip(away / (blur + 1), 0, 1)
    mask = (part * part * (3 - 2 * part)).astype(np.float32)  # smoothstep: above 0 on all new ground
    _check(picture, mask[up : up + height, left : left + width], np.uint8)
    mirrored = np.pad(picture, room, mode="symmetric")
    if fill == "mirror":
        return mirrored, mask
    if fill == "edge":
        ground = _softened(np.pad(picture, room, mode="edge"), away)
    else:
        black = np.pad(picture / 255.0, room)
        ground = 255 * shaped_noise(black, (away > 0).astype(np.float64), falloff, colour_variation, rng=rng)
    mixed = mirrored + (ground - mirrored) * mask[..., None]
    return np.where(away[..., None] > 0, np.rint(mixed).clip(0, 255).astype(np.uint8), mirrored), mask


def distance(size: tuple[int, int], left: int, right: int, up: int, down: int) -> np.ndarray:
    """How far each pixel of the canvas is from the old picture of `size` (H, W), in pixels: 0 on it, 1 beside it."""
    height, width = size
    y = np.arange(-up, height + down, dtype=np.float64)
    x = np.arange(-left, width + right, dtype=np.float64)
    off_y = np.maximum(np.maximum(-y, y - (height - 1)), 0)
    off_x = np.maximum(np.maximum(-x, x - (width - 1)), 0)
    return np.hypot(off_y[:, None], off_x[None, :])


def passes(
    size: tuple[int, int], left: int, right: int, up: int, down: int, limit: int
) -> list[tuple[int, int, int, int]]:
    """How an extension of a picture of `size` (H, W) is cut: the (left, right, up, down) of each pass, in order.

    No pass adds more than `limit` pixels on a side, nor more than the picture then has that way, so what is drawn
    always sees as much picture as it adds. Passes are about equal, and multiples of 8 where the sum allows it.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size={height}x{width}: 1 or more are needed")
    if limit < 1:
        raise ValueError(f"limit={limit}: 1 or more pixels")
    rest = [left, right, up, down]
    _check_sides(dict(zip(("left", "right", "up", "down"), rest, strict=True)))
    found = []
    while any(rest):
        most = [min(limit, width)] * 2 + [min(limit, height)] * 2
        still = max(math.ceil(side / top) for side, top in zip(rest, most, strict=True))
        step = [min(8 * math.ceil(side / still / 8), top, side) for side, top in zip(rest, most, strict=True)]
        rest = [side - done for side, done in zip(rest, step, strict=True)]
        width, height = width + step[0] + step[1], height + step[2] + step[3]
        found.append((step[0], step[1], step[2], step[3]))
    return found


def seam(picture: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """How visible the border of an old picture is in a bigger one (H, W, 3) uint8; about 1: not, above 1.5: visible.

    `box` is (left, top, right, bottom) of the old picture, as Pillow counts. The mean absolute second difference
    across the border, over that of the lines parallel to it nearby; sides on the picture's own edge do not count.
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box={box}: (left, top, right, bottom) within {width}x{height}")
    levels = picture.astype(np.float64)
    rows, columns = levels[top:bottom], levels[:, left:right].transpose(1, 0, 2)  # lines that cross the border
    across, beside = [], []
    for lines, at in ((rows, left), (rows, right), (columns, top), (columns, bottom)):
        if 2 <= at <= lines.shape[1] - 2:
            bends = np.abs(np.diff(lines, n=2, axis=1)).mean(axis=2)  # bends[:, i] is of the pixels i to i + 2
            here = [at - 2, at - 1]
            near = [*range(max(0, at - 2 - NEIGHBOURS), at - 2), *range(at, min(at + NEIGHBOURS, bends.shape[1]))]
            across.append(bends[:, here].ravel())
            beside.append(bends[:, near].ravel() if near else bends[:, here].ravel())
    if not across:
        raise ValueError(f"box={box}: no side of it is 2 or more pixels inside {width}x{height}")
    return float((np.concatenate(across).mean() + ROUNDING) / (np.concatenate(beside).mean() + ROUNDING))


def without_step(old: np.ndarray, new: np.ndarray, mask: np.ndarray, reach: float = math.inf) -> np.ndarray:
    """`new` moved so that it meets `old` without a step of colour; all (H, W, 3) uint8, mask (H, W).

    `new` is the whole drawn picture, as it was decoded, also where `old` is known: the two are compared there.

    Pérez, Gangnet & Blake 2003, seamless cloning: to the drawn part (mask above 0) is added the membrane c that is
    old - new on the known pixels around it, and c - reach^2 laplace(c) = 0 within; free at the picture's edges. With
    a finite `reach`, in pixels, it dies away as exp(-d / reach). Where the mask is 0 the result is `old`.
    """
    _check(old, mask, np.uint8)
    _check(new, mask, np.uint8)
    if not reach > 0:
        raise ValueError(f"reach={reach}: more than 0 pixels")
    unknown = mask > 0
    if not unknown.any() or unknown.all():
        return np.where(unknown[..., None], new, old)
    rows, columns = (np.flatnonzero(unknown.any(axis=axis)) for axis in (1, 0))
    window = tuple(slice(max(0, int(line[0]) - 1), int(line[-1]) + 2) for line in (rows, columns))
    step = old[window].astype(np.float32) - new[window]
    moved = np.rint(new[window] + _membrane(step, unknown[window], 1 / reach**2)).clip(0, 255).astype(np.uint8)
    result = old.copy()
    result[window] = np.where(unknown[window][..., None], moved, old[window])
    return result


def _membrane(values: np.ndarray, unknown: np.ndarray, screen: float) -> np.ndarray:
    """values (H, W, C) float32 with the unknown pixels (H, W) solved for: laplace(c) = screen c.

    Conjugate gradients from coarse to fine, fewer steps the finer (Bornemann & Deuflhard 1996, the cascadic method).
    """
    beside = ndimage.binary_dilation(unknown) & ~unknown  # only these known pixels are felt
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    grids = [(np.where(unknown, 0, planes), unknown, np.where(beside, 1.0, 1e-9 * ~unknown))]
    while min(grids[-1][1].shape) > 3 and grids[-1][1].any():
        grids.append(_coarser(*grids[-1]))
    known, _, weight = grids[-1]
    guess = np.zeros_like(known) + (known * weight).sum(axis=(1, 2), keepdims=True) / weight.sum()
    for level, (known, free, _) in reversed(list(enumerate(grids))):
        guess = np.where(free, _finer(guess, free.shape), known).astype(np.float32)
        _relax(guess, free, screen * 4.0**level, steps=min(FINEST_STEPS * 2**level, 200))
    return guess.transpose(1, 2, 0)


def _coarser(known: np.ndarray, free: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One grid of half the size: a block is free where all of it is; known ones have the weighted mean."""
    pad = [(0, side % 2) for side in free.shape]
    height, width = ((side + 1) // 2 for side in free.shape)
    blocks = (height, 2, width, 2)
    weight = np.pad(weight, pad)
    mass = weight.reshape(blocks).sum(axis=(1, 3))
    total = (np.pad(known, [(0, 0), *pad]) * weight).reshape(-1, *blocks).sum(axis=(2, 4))
    whole = np.asarray(np.pad(free, pad, mode="edge").reshape(blocks).all(axis=(1, 3)))
    return (total / np.where(mass > 0, mass, 1)).astype(np.float32), whole, mass


def _finer(coarse: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(C, h, w) as a grid of twice the size, cut to shape (H, W), by linear interpolation of the middles of cells."""
    if coarse.shape[1:] == shape:
        return coarse
    for axis, side in enumerate(shape, start=1):
        last = coarse.shape[axis] - 1
        here = np.arange(side) // 2
        beside = np.clip(here + np.where(np.arange(side) % 2, 1, -1), 0, last)
        coarse = 0.75 * coarse.take(here, axis=axis) + 0.25 * coarse.take(beside, axis=axis)
    return coarse


def _relax(c: np.ndarray, free: np.ndarray, screen: float, steps: int) -> None:
    """Steps of conjugate gradients on c (C, H, W) in place, each plane for itself; only free pixels change."""
    residual = -_bend(c, screen) * free
    way = residual.copy()
    power = _dot(residual, residual)
    for _ in range(steps):
        if not (power > 1e-6).any():
            return
        bent = _bend(way, screen)
        bent *= free
        length = power / np.maximum(_dot(way, bent), 1e-30)
        c += length * way
        residual -= length * bent
        before, power = power, _dot(residual, residual)
        way *= power / np.maximum(before, 1e-30)
        way += residual


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The inner product of each plane: (C, H, W) twice -> (C, 1, 1)."""
    return np.einsum("chw,chw->c", a, b)[:, None, None]


def _bend(c: np.ndarray, screen: float) -> np.ndarray:
    """screen c - laplace(c) of planes (C, H, W) on the pixels' grid, with free edges."""
    bent = np.float32(screen) * c
    down, across = np.diff(c, axis=1), np.diff(c, axis=2)
    bent[:, :-1] -= down
    bent[:, 1:] += down
    bent[:, :, :-1] -= across
    bent[:, :, 1:] += across
    return bent


def _low_pass(height: int, width: int) -> np.ndarray:
    """mk2's window of the noise, for rfft2: 1 / ((x^2 + 1) (y^2 + 1)), 1 at the shorter side's last frequency."""
    y = 2 * np.fft.fftfreq(height) * height / min(height, width)
    x = 2 * np.fft.rfftfreq(width) * width / min(height, width)
    return 1 / ((y[:, None] ** 2 + 1) * (x[None, :] ** 2 + 1))


def _softened(picture: np.ndarray, away: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) blurred by half of how far away each pixel is, by mixing blurs of 0, 1, 2, 4, ... pixels."""
    layer = picture.astype(np.float64)
    soft, sigma = layer, 1.0
    while sigma <= max(away.max() / 2, 1):
        blurred = ndimage.gaussian_filter(layer, (sigma, sigma, 0), mode="nearest")
        part = np.clip(np.log2(np.maximum(away / 2, 1e-9) / sigma) + 1, 0, 1)[..., None]
        soft, sigma = soft + (blurred - soft) * part, 2 * sigma
    return soft


def _check(picture: np.ndarray, mask: np.ndarray, kind: type) -> None:
    if picture.ndim != 3 or picture.shape[2] != 3 or not np.issubdtype(picture.dtype, kind):
        raise ValueError(f"picture={picture.shape} {picture.dtype}: (H, W, 3) {kind.__name__} is needed")
    if mask.shape != picture.shape[:2]:
        raise ValueError(f"mask={mask.shape}: {picture.shape[:2]} as the picture is needed")


def _check_sides(sides: dict[str, int]) -> None:
    for name, side in sides.items():
        if side < 0:
            raise ValueError(f"{name}={side}: 0 or more pixels")
    if not any(sides.values()):
        raise ValueError("left, right, up, down are all 0: one of them must be more")
