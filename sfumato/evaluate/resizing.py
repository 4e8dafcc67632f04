"""Pictures of any size -> the side that a feature network wants. Parmar et al. 2022: how matters as much as the model.

`clean` is theirs; the others are what older code did, kept to compare with its numbers. Letters: H W pixels, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def clean(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (S, S, 3) float32 of levels in [0, 255]: bicubic with antialiasing, not rounded.

    Each channel by itself in single precision, as clean-fid does it.
    """
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., index], dtype=np.float32)) for index in range(3)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


def legacy_torch(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bilinear between the four next pixels, centres of pixels aligned: pytorch-fid's, clean-fid's `legacy_pytorch`."""
    levels = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    found = F.interpolate(levels, size=(size, size), mode="bilinear", align_corners=False)
    return found[0].permute(1, 2, 0).numpy()


def legacy_tf(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bilinear between the four next pixels, corners of pixels aligned: TensorFlow 1's, of Heusel et al. 2017's code.

    Place i of the result lies at i H / S of the picture; beyond the last pixel it is repeated.
    """
    levels = pixels.astype(np.float32)
    for axis in (0, 1):
        length = levels.shape[axis]
        place = (np.arange(size, dtype=np.float32) * np.float32(length / size)).astype(np.float32)
        low = np.floor(place).astype(int).clip(0, length - 1)
        part = (place - low).reshape([-1 if index == axis else 1 for index in range(3)])
        first, second = np.take(levels, low, axis), np.take(levels, (low + 1).clip(0, length - 1), axis)
        levels = first + (second - first) * part
    return levels.astype(np.float32)


RESIZERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "clean": clean,
    "legacy-torch": legacy_torch,
    "legacy-tf": legacy_tf,
}


def check_resize(name: str) -> str:
    """The name of a way of resizing; ValueError where there is none of it."""
    if name not in RESIZERS:
        raise ValueError(f"resize={name!r}: one of {', '.join(RESIZERS)}")
    return name


def resized(pictures: Sequence[np.ndarray], size: int, how: str = "clean") -> Tensor:
    """Pictures (H, W, 3) uint8, each of its own size -> (B, 3, S, S) float32 in [0, 1]. Sides are not kept in ratio.

    A picture that has the size already passes unchanged. ValueError names what is no such picture.
    """
    resize = RESIZERS[check_resize(how)]
    found = []
    for index, pixels in enumerate(pictures):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.size == 0:
            raise ValueError(f"pictures[{index}]: it is {pixels.shape} {pixels.dtype}, (H, W, 3) uint8 is needed")
        same = pixels.shape[:2] == (size, size)
        found.append(pixels.astype(np.float32) if same else resize(pixels, size))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous() / 255
