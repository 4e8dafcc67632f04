"""How likely a picture carries a visible watermark: LAION's detector, in its public weight format.

What LAION's lists call `pwatermark` came from it. Letters: B pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.models.efficientnet import WatermarkDetector
from sfumato.train.data.pictures import Pictures, read
from sfumato.weights.files import open_tensors

SIDE = 256  # px: pictures are stretched to this square, whatever their shape, as LAION's example does
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, levels in [0, 1]
COUNTS = "num_batches_tracked"  # which old files lack, and no one reads


def load_detector(path: str | Path) -> WatermarkDetector:
    """The detector of a file such as `watermark_model_v1.pt`; ValueError names the first tensor that is amiss."""
    network = WatermarkDetector()
    own = network.state_dict()
    with open_tensors(path) as file:
        found = {name.removeprefix("module."): file.read(name).float().clone() for name in file.names()}
    given = {name: tensor for name, tensor in found.items() if not name.endswith(COUNTS)}
    for name, tensor in own.items():
        if name.endswith(COUNTS):
            continue
        if name not in given:
            raise ValueError(f"watermark={str(path)!r}: no tensor {name}; LAION's watermark_model_v1.pt is needed")
        if given[name].shape != tensor.shape:
            shapes = f"{tuple(given[name].shape)}, {tuple(tensor.shape)} is needed"
            raise ValueError(f"watermark={str(path)!r}: {name} is {shapes}")
    if unknown := sorted(set(given) - set(own)):
        raise ValueError(f"watermark={str(path)!r}: {unknown[0]} is not of this network")
    network.load_state_dict(own | given)
    return network.eval().requires_grad_(False)


def as_input(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, 256, 256), normalised; bilinear with antialiasing."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    levels = np.asarray(small, dtype=np.float32) / 255
    normal = (levels - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1)


@torch.inference_mode()
def watermark_probs(network: WatermarkDetector, images: Tensor) -> Tensor:
    """Images (B, 3, 256, 256) of `as_input` -> probabilities (B,) of a watermark."""
    return network(images).softmax(-1)[:, 0]


def watermarks_of_pictures(
    network: WatermarkDetector, pictures: Pictures, batch_size: int = 16
) -> Iterator[tuple[int, float]]:
    """(number, probability) of every picture that can be read; the others are in the pictures' report."""
    numbers: list[int] = []
    images: list[Tensor] = []
    for index in range(len(pictures)):
        got = read(pictures, index, need_caption=False)
        if got is not None:
            numbers.append(index)
            images.append(as_input(got[0]))
        if images and (len(images) == batch_size or index == len(pictures) - 1):
            yield from zip(numbers, watermark_probs(network, torch.stack(images)).tolist(), strict=True)
            numbers, images = [], []
