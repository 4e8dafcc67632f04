"""How near one picture is to another: PSNR and SSIM of uint8 pictures. Knows no model and no file.

Letters: H W pixels; any dimensions before them count pictures.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import correlate1d

PEAK = 255.0
SIDE, SIGMA = 11, 1.5  # SSIM's window, px: Wang et al. 2004, section III.C
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as doubles; ValueError where they are not uint8 pictures (..., H, W, 3) of one shape."""
    for name, picture in (("a", a), ("b", b)):
        if picture.dtype != np.uint8 or picture.ndim < 3 or picture.shape[-1] != 3 or picture.size == 0:
            raise ValueError(f"{name}: it is {picture.shape} {picture.dtype}, (..., H, W, 3) uint8 is needed")
    if a.shape != b.shape:
        raise ValueError(f"b: it is {b.shape}, a's shape {a.shape} is needed")
    return a.astype(np.float64), b.astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio in dB over all pixels and channels, infinite for equal pictures (..., H, W, 3) uint8.

    Of several pictures it is that of their common mean squared error.
    """
    first, second = _pair(a, b)
    error = float(np.square(first - second).mean())
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity in [-1, 1], 1 for equal pictures (..., H, W, 3) uint8: Wang et al. 2004, equation 13.

    Gaussian window of 11 px and deviation 1.5, K1 = 0.01, K2 = 0.03; the mean over the places where the window lies
    within the picture, over red, green and blue, and over pictures. ValueError where a side is shorter than 11 px.
    """
    first, second = _pair(a, b)
    if min(a.shape[-3:-1]) < SIDE:
        raise ValueError(f"a: it is {a.shape[-2]} x {a.shape[-3]} px, {SIDE} px or more a side are needed")
    mean_a, mean_b = _window(first), _window(second)
    var_a, var_b = _window(first**2) - mean_a**2, _window(second**2) - mean_b**2
    cov = _window(first * second) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + C1) * (2 * cov + C2)
    return float((similar / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean())


def _window(x: np.ndarray) -> np.ndarray:
    """Gaussian means of (..., H, W, 3) where the window lies within: (..., H - 10, W - 10, 3)."""
    places = np.arange(SIDE) - SIDE // 2
    weights = np.exp(-(places**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        x = correlate1d(x, weights, axis=axis, mode="nearest")
    edge = SIDE // 2
    return x[..., edge:-edge, edge:-edge, :]
