"""Maps of heat laid over pictures."""

from __future__ import annotations

import numpy as np

# From dark to bright: black, blue, violet, red, orange, yellow, white; what is hot stands out on any picture.
COLOURS = np.array(
    [(0, 0, 0), (30, 20, 120), (130, 20, 150), (220, 50, 60), (250, 140, 20), (250, 230, 60), (255, 255, 255)],
    dtype=np.float64,
)


def coloured(heat: np.ndarray) -> np.ndarray:
    """heat (H, W) in [0, 1] -> (H, W, 3) uint8, dark where it is 0, white where it is 1."""
    places = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(heat, places, COLOURS[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def heated(picture: np.ndarray, heat: np.ndarray, share: float = 0.65) -> np.ndarray:
    """A picture (H, W, 3) uint8 in grey with `share` of the heat (H, W), its least to its most, over it -> the same."""
    low, high = float(heat.min()), float(heat.max())
    heat = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    grey = picture.astype(np.float64).mean(axis=2, keepdims=True)
    return np.round((1 - share) * grey + share * coloured(heat)).astype(np.uint8)
