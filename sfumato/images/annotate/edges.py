"""Annotators that find edges and lines, white on black: OpenCV's, differences of Gaussians, a network's.

Letters: H W pixels.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter1d

from sfumato.images.annotate.plain import luminance
from sfumato.images.annotate.registry import Network, Option, annotator, opencv, three

NARROW, WIDE = 0.5, 5.0  # px, the Gaussians of ControlNet's scribbles from differences
THIN = 3.0  # px, how much edges are blurred before and after they are thinned
INK = 4  # grey level above which the blurred thin line is drawn


@annotator(
    "canny",
    Option("low", 100, 0, 2000, "gradient from which a pixel goes on with an edge"),
    Option("high", 200, 0, 2000, "gradient from which an edge begins"),
)
def canny(pixels: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Edges by Canny 1986, OpenCV's: the network's own way."""
    if low > high:
        raise ValueError(f"low={low}: it must not be above high={high}")
    return three(opencv("canny").Canny(np.ascontiguousarray(pixels), low, high))


@annotator(
    "lines",
    Option("length", 20.0, 1.0, 1000.0, "pixels below which a segment is left out"),
    Option("width", 2, 1, 20, "pixels that a line is drawn wide"),
)
def lines(pixels: np.ndarray, *, length: float, width: float) -> np.ndarray:
    """Straight lines by LSD, von Gioi et al. 2010, OpenCV's: near to M-LSD's, but another method."""
    cv2 = opencv("lines")
    found = cv2.createLineSegmentDetector().detect(np.ascontiguousarray(luminance(pixels)))[0]
    drawn = np.zeros(pixels.shape[:2], dtype=np.uint8)
    for x0, y0, x1, y1 in [] if found is None else found.reshape(-1, 4):
        if np.hypot(x1 - x0, y1 - y0) >= length:
            ends = [(round(float(x)), round(float(y))) for x, y in ((x0, y0), (x1, y1))]
            cv2.line(drawn, *ends, 255, int(width))
    return three(drawn)


@annotator("scribble", Option("threshold", 32.0, 1.0, 254.0, "how dark a line must be against what is around it"))
def scribble(pixels: np.ndarray, *, threshold: float) -> np.ndarray:
    """Broad strokes from a difference of Gaussians, as XDoG, Winnemöller et al. 2012.

    A pixel is drawn where all channels are darker than around it by more than half the threshold: ControlNet's way.
    """
    x = pixels.astype(np.float32)
    narrow, wide = (gaussian_filter(x, (sigma, sigma, 0), mode="mirror") for sigma in (NARROW, WIDE))
    darker = (wide - narrow).min(axis=2)
    return three(np.where(2 * darker > threshold, 255, 0).astype(np.uint8))


@annotator("hed", network="edges")
def hed(pixels: np.ndarray, network: Network) -> np.ndarray:
    """Soft edges by a network, HED of Xie and Tu 2015."""
    return three(_grey_levels(network(pixels)))


@annotator(
    "scribble-hed",
    Option("level", 127, 1, 254, "grey level that a thinned soft edge must have"),
    network="edges",
)
def scribble_hed(pixels: np.ndarray, network: Network, *, level: float) -> np.ndarray:
    """Scribbles from soft edges: only the ridges stay, and are drawn broad.

    Zhang et al. 2023's way: a ridge is highest along one of four directions.
    """
    soft = gaussian_filter(_grey_levels(network(pixels)).astype(np.float32), THIN, mode="mirror")
    ridge = np.zeros(soft.shape, dtype=bool)
    for line in _directions(soft):
        ridge |= line == soft
    thin = np.where(ridge & (soft > level), 255.0, 0.0)
    broad = gaussian_filter(thin, THIN, mode="mirror")
    return three(np.where(broad > INK, 255, 0).astype(np.uint8))


@annotator("depth", network="depth")
def depth(pixels: np.ndarray, network: Network) -> np.ndarray:
    """Depth by a network, near is bright."""
    return three(_grey_levels(network(pixels)))


def _directions(soft: np.ndarray) -> list[np.ndarray]:
    """The largest of each pixel and its two neighbours, (H, W): across, down and along both diagonals."""
    padded = np.pad(soft, 1, mode="edge")
    height, width = soft.shape

    def shifted(down: int, across: int) -> np.ndarray:
        return padded[1 + down : 1 + down + height, 1 + across : 1 + across + width]

    straight = [maximum_filter1d(soft, 3, axis=axis, mode="nearest") for axis in (0, 1)]
    slanted = [np.maximum.reduce([shifted(-1, -side), soft, shifted(1, side)]) for side in (-1, 1)]
    return straight + slanted


def _grey_levels(found: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] -> uint8."""
    return np.rint(np.asarray(found, dtype=np.float32).clip(0, 1) * 255).astype(np.uint8)
