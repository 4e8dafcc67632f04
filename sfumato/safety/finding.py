"""How a picture was turned, enlarged and cut since waves of known frequencies were laid over it: found blindly.

Waves stay waves, so their peaks in the Fourier magnitude tell turn and size (Pereira & Pun 2000),
whatever was cut; their phases tell the place. Knows no payload. Letters: H W pixels, K waves, f (K, 2) cycles per px by
(x, y) of the picture as it was marked, G (2, 2) such that f G' is where they are now.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.fft import fft2, ifft2
from scipy.ndimage import gaussian_filter

FINEST, NEAR, QUIET = 2.2, 2.7, 2.0  # px that are fine, px around that tell how loud a place is, levels of loudness
BLOCK, FINE = 512, 1024  # px of the windows whose spectra are averaged (Welch 1967), and of the spectrum
TURN, GROWTH = np.deg2rad(0.35), 0.006  # steps of the search; half a turn more is told by the phases
SMALLEST, LARGEST = 0.45, 2.25  # times its size that it may have
HIGHEST = 0.48  # cycles per px looked at
LOUDEST = 12.0  # times its surroundings that one peak counts: an edge of the picture is no wave


def levelled(luma: np.ndarray) -> np.ndarray:
    """luma (H, W) without what is coarse, every place as loud as every other: (H, W), about -3 to 3."""
    fine = luma - gaussian_filter(luma, FINEST)
    return (fine / (np.sqrt(gaussian_filter(fine**2, NEAR)) + QUIET)).astype(np.float32)


def likely(level: np.ndarray, f: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """The likeliest G, best first, `most` of them, from the peaks of the levelled picture's spectrum."""
    power = _spectrum(level)
    turns = np.arange(0, np.pi, TURN)
    sizes = np.exp(np.arange(np.log(SMALLEST), np.log(LARGEST), GROWTH))
    spins = np.stack([_spin(turn) for turn in turns])  # (turns, 2, 2)
    turned = FINE * np.einsum("kx,tyx->ykt", f, spins)
    score = np.empty((len(sizes), len(turns)))
    for row, size in enumerate(sizes):
        x, y = np.rint(turned / size).astype(np.int32)
        score[row] = np.where(x**2 + y**2 < (HIGHEST * FINE) ** 2, power[y % FINE, x % FINE], 1).sum(axis=0)
    for _ in range(most):
        row, column = (int(at) for at in np.unravel_index(score.argmax(), score.shape))
        yield spins[column] / sizes[row]
        score[max(0, row - 4) : row + 5, np.arange(column - 6, column + 7) % len(turns)] = 0


def _spin(turn: float) -> np.ndarray:
    return np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])


def _spectrum(level: np.ndarray) -> np.ndarray:
    """The mean power of windows of the picture, over its surroundings: (FINE, FINE), about 1 where there is no peak."""
    height, width = (min(BLOCK, size) for size in level.shape)
    window = np.outer(np.hanning(height), np.hanning(width))
    power = np.zeros((FINE, FINE))
    for top in _starts(level.shape[0], height):
        for left in _starts(level.shape[1], width):
            part = level[top : top + height, left : left + width] * window
            power += np.abs(fft2(part, (FINE, FINE))) ** 2
    around = gaussian_filter(power, 16, mode="wrap")
    return np.minimum(power / (around + around.mean() * 1e-3 + 1e-12), LOUDEST)


def _starts(size: int, block: int) -> range | list[int]:
    """Where windows begin that overlap by half and reach both ends."""
    count = max(1, round((size - block) / (block / 2)) + 1)
    return [round(at) for at in np.linspace(0, size - block, count)]


def waves(level: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The picture's Fourier transform (K,) at frequencies f (K, 2), with the phases of its middle; a Hann window."""
    height, width = level.shape
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    across = (np.hanning(width) * np.exp(-2j * np.pi * np.outer(f[:, 0], x))).astype(np.complex64)
    down = (np.hanning(height) * np.exp(-2j * np.pi * np.outer(f[:, 1], y))).astype(np.complex64)
    half = down.real @ level + 1j * (down.imag @ level)
    return np.einsum("kw,kw->k", half, across)


def sharpened(level: np.ndarray, f: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """G near a guess, so that all waves lie on their peaks: first as one turn and one size, then freely."""
    step = 0.5 / np.array(level.shape[::-1])  # half a line's width, by (x, y)
    for free in (False, False, True, True):
        now = f @ guess.T
        middle = np.abs(waves(level, now)) ** 2
        sides = np.empty((2, 2, len(f)))
        for axis in (0, 1):
            for side, sign in enumerate((-1, 1)):
                moved = now.copy()
                moved[:, axis] += sign * step[axis]
                sides[axis, side] = np.abs(waves(level, moved)) ** 2
        bend = sides[:, 0] + sides[:, 1] - 2 * middle
        away = 0.5 * (sides[:, 0] - sides[:, 1]) / np.where(bend < 0, bend, -np.inf)  # the top of a parabola
        away = np.where(bend < 0, away, np.sign(sides[:, 1] - sides[:, 0])).clip(-1.5, 1.5).T * step
        loud = np.minimum(middle, 4 * np.median(middle))
        guess = _fitted(f, now + away, loud, free)
    return guess


def _fitted(f: np.ndarray, now: np.ndarray, loud: np.ndarray, free: bool) -> np.ndarray:
    """The G that takes f (K, 2) nearest to `now` (K, 2), each counted as loud as it is; `free`: any matrix."""
    root = np.sqrt(loud)[:, None]
    if free:
        return np.linalg.lstsq(f * root, now * root, rcond=None)[0].T
    x, y = f.T
    rows = np.concatenate([np.stack([x, -y], 1) * root, np.stack([y, x], 1) * root])
    a, b = np.linalg.lstsq(rows, (now * root).T.ravel(), rcond=None)[0]
    return np.array([[a, -b], [b, a]])


def placed(found: np.ndarray, f: np.ndarray, phases: np.ndarray, tile: int) -> tuple[np.ndarray, float]:
    """Where the picture's middle lies in a tile (2,), in px as it was marked; how well the waves agree there, 0 to 1.

    `found` (K,) are their transforms, f whole numbers of waves in `tile` px, `phases` what they were laid with.
    """
    fine = 4 * tile
    grid = np.zeros((fine, fine), complex)
    x, y = np.rint(f.T * tile).astype(int)
    grid[y % fine, x % fine] = (found * np.exp(-1j * phases)).conj()
    agree = ifft2(grid).real
    row, column = np.unravel_index(agree.argmax(), agree.shape)
    return np.array([column, row]) / 4, float(agree.max() * fine**2 / (np.abs(found).sum() + 1e-12))
