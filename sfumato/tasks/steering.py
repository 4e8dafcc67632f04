"""The networks that steer, called alike: those that add to the U-Net (ControlNet, T2I-Adapter), those that prompt it.

IP-Adapters prompt: a picture becomes tokens that the U-Net's attentions read beside the words. Knows no file.
Letters: H W pixels, N tokens, D their width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from sfumato.models.controlnet import ControlNet
from sfumato.models.ip_adapter import IPAdapter
from sfumato.models.residuals import Residuals
from sfumato.models.t2i_adapter import T2IAdapter
from sfumato.models.unet import UNet
from sfumato.types import Control
from sfumato.weights.towers import ImageTower, prepared

SOFT = 0.825  # each layer further from the middle counts so much less, in A1111's modes
GUESS = 0.1  # of the first layer in diffusers' guess mode


class Adding:
    """A ControlNet, or a T2I-Adapter, which looks at the hint alone."""

    def __init__(self, network: ControlNet | T2IAdapter) -> None:
        self.network = network

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None, hint: Tensor) -> Residuals:
        """What the network adds."""
        if isinstance(self.network, ControlNet):
            return self.network(x, t, context, vector, hint)
        return self.network(hint)

    def around(self, unet: UNet, hint: Tensor, weight: float | tuple[float, ...]) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def count(self, hint: Tensor) -> int:
        """How many residuals it gives."""
        return len(self.network.input_blocks) + 1 if isinstance(self.network, ControlNet) else len(self.network(hint))


class Prompting:
    """An IP-Adapter."""

    def __init__(self, network: IPAdapter) -> None:
        self.network = network

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None, hint: Tensor) -> None:
        """Nothing."""

    def around(self, unet: UNet, hint: Tensor, weight: float | tuple[float, ...]) -> AbstractContextManager[None]:
        """The U-Net's attentions read the tokens too."""
        return self.network.steering(unet, hint, weight)

    @torch.inference_mode()
    def tokens(self, pixels: np.ndarray, tower: ImageTower) -> tuple[Tensor, Tensor]:
        """The tokens (1, N, D) of a picture (H, W, 3) uint8, and those of none, for the negative prompt."""
        wanted, there = self.network.config.image_dim, tower.config.width
        if not self.network.plus:
            there = tower.visual_projection.out_features
        if wanted != there:
            raise ValueError(f"controls.annotate: the adapter reads {wanted} numbers, this image encoder gives {there}")
        like = tower.visual_projection.weight
        image = prepared(pixels, tower.config.image_size)[None].to(like)
        if self.network.plus:
            seen, nothing = tower.tokens(image), tower.tokens(torch.zeros_like(image))
        else:
            seen = tower.embedding(image)
            nothing = torch.zeros_like(seen)
        return self.network(seen), self.network(nothing)


def steering_of(network: ControlNet | T2IAdapter | IPAdapter) -> Adding | Prompting:
    """How a network steers."""
    return Prompting(network) if isinstance(network, IPAdapter) else Adding(network)


def weights_of(control: Control, count: int) -> float | tuple[float, ...]:
    """The weight of each of `count` layers in a control's mode.

    "prompt" and "control" as in A1111's ControlNet extension, "guess" as in diffusers.
    """
    if control.mode == "balanced":
        return control.weight
    if control.mode == "guess":
        return tuple(control.weight * GUESS ** (1 - index / max(1, count - 1)) for index in range(count))
    return tuple(control.weight * SOFT ** (count - 1 - index) for index in range(count))
