"""What two networks see in pictures: the judge, and EfficientNet-Lite0 in pictures made small.

The judge reads drawn pictures, blurred ones too; EfficientNet knows photographs and minds sharpness, so it is shown all
pictures at SMALL px. Neither has seen the character. Letters: N pictures, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.box.judge import Judge, answers
from sfumato.evaluate.features import Network, features_of
from sfumato.images import resize

SMALL, JUDGED = 24, 128  # px


def judged_size(pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Pictures (H, W, 3) uint8 -> (N, JUDGED, JUDGED, 3), as the judge takes them."""
    pixels = np.stack(list(pictures))
    return pixels if pixels.shape[1:3] == (JUDGED, JUDGED) else resize(pixels, JUDGED, JUDGED)


def judge_features(judge: Judge, pictures: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """What the judge's answers are made of: (N, 384), its last hidden layer."""
    found: list[Tensor] = []
    handle = judge.hidden.register_forward_hook(lambda module, given, out: found.append(F.silu(out)))
    try:
        answers(judge, judged_size(pictures))
    finally:
        handle.remove()
    return torch.cat(found)


def small_features(network: Network, pictures: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """Features (N, D) of pictures seen at SMALL px."""
    return features_of(network, resize(np.stack(list(pictures)), SMALL, SMALL, "bicubic"))
