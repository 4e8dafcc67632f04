"""Pictures as numbers: tensors in [-1, 1] <-> uint8 arrays, sizes, grids. Knows no file and no model."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

UPSCALERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_uint8(images: Tensor) -> np.ndarray:
    """images (B, 3, H, W) about [-1, 1], clipped -> (B, H, W, 3) uint8, rounded to nearest."""
    scaled = images.float().clamp(-1, 1).add_(1).mul_(127.5).round_()
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> images (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def resize(images: np.ndarray, width: int, height: int, how: str = "lanczos") -> np.ndarray:
    """(B, H, W, 3) uint8 -> (B, height, width, 3); `how` is one of UPSCALERS."""
    if how not in UPSCALERS:
        raise ValueError(f"upscaler={how!r}: one of {', '.join(UPSCALERS)}")
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), UPSCALERS[how])) for image in images])


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """images (B, H, W, 3) uint8 -> one picture of ceil(B / columns) rows, read left to right, with black gaps."""
    if columns < 1:
        raise ValueError(f"columns={columns}: 1 or more are needed")
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    sheet = np.zeros((gap + rows * (height + gap), gap + columns * (width + gap), 3), dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
