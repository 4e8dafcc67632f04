"""The studio: what tasks work with beside the engine - a model, the pictures that jobs name, and how memory is kept.

Knows no task. Letters: B pictures, C latent channels, H W pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.images import UPSCALERS, resize
from sfumato.models.layers import wrapped
from sfumato.tasks.decoding import decode_pixels
from sfumato.tasks.encoding import encode
from sfumato.tasks.extras import Extras
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.scenes import Drawn, seamless_of
from sfumato.types import Job
from sfumato.weights.upscalers import Upscaler, enlarged, load_upscaler

Draw = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Studio:
    """`tile` px bounds what is encoded and decoded at once, `max_pictures` how many; `upscalers` are those loaded."""

    model: Model
    pictures: Pictures = field(default_factory=Pictures)
    tile: int | None = None
    max_pictures: int = 4
    upscalers: dict[str, Upscaler] = field(default_factory=dict)
    extras: Extras | None = None

    def encode(self, pixels: np.ndarray, job: Job, draw: Draw | None = None) -> Tensor:
        """(B, H, W, 3) uint8 -> latents (B, C, h, w): the posterior's mean, or a sample with the noise of `draw`."""
        return self.encode_images(torch.from_numpy(pixels).permute(0, 3, 1, 2), job, draw)

    def encode_images(self, images: Tensor, job: Job, draw: Draw | None = None) -> Tensor:
        """The same of images (B, 3, H, W), uint8 or in [-1, 1]."""
        with wrapped(self.model.autoencoder, seamless_of(job)):
            return encode(images, self.model, job.tile or self.tile, draw)

    def decode(self, drawn: Drawn, job: Job) -> np.ndarray:
        """Latents -> pictures (B, H, W, 3) uint8."""
        with wrapped(self.model.autoencoder, seamless_of(job)):
            return decode_pixels(drawn.latents, drawn.last, self.model, self.max_pictures, job.tile or self.tile)

    def enlarged(self, pixels: np.ndarray, width: int, height: int, upscaler: str) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8 at another size, by one of UPSCALERS, or a network: its file or packaged name."""
        if upscaler in UPSCALERS:
            return resize(pixels, width, height, upscaler)
        if upscaler not in self.upscalers:
            self.upscalers[upscaler] = load_upscaler(upscaler, self.model.device, self.model.dtype)
        network = self.upscalers[upscaler]
        factor = max(width / pixels.shape[2], height / pixels.shape[1])
        return resize(np.stack([enlarged(one, factor, network) for one in pixels]), width, height)
