"""What an inpainting U-Net learns from: random masks, and the pictures without what lies under them.

Masks are boxes and thick strokes, as of Suvorov et al. 2022 (LaMa, "wide" masks), and for a quarter of the pictures
everything, as Stable Diffusion's inpainting models were trained. Knows no loss. Letters: B pictures, H W pixels,
h w size of the latents, C their channels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.families import FAMILIES, Family, Model
from sfumato.models.unet import UNet

EVERYTHING = 0.25  # share of pictures that are hidden whole
BOXES, STROKES = (1, 4), (1, 5)  # how many of a mask, from, below
SIDE = (0.15, 0.6)  # of a box, in shares of the picture's
BRUSH = (0.04, 0.15)  # half of a stroke's thickness, in shares of the longer side
CORNERS = (2, 6)  # of a stroke, from, below


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) bool, True where the picture is hidden, at least one pixel."""
    if rng.random() < EVERYTHING:
        return np.ones((height, width), bool)
    canvas = Image.new("1", (width, height))
    brush = ImageDraw.Draw(canvas)
    if rng.random() < 0.5:
        for _ in range(rng.integers(*BOXES)):
            tall, wide = (max(1, round(rng.uniform(*SIDE) * side)) for side in (height, width))
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            brush.rectangle((left, top, left + wide - 1, top + tall - 1), fill=1)
    else:
        for _ in range(rng.integers(*STROKES)):
            half = max(1.0, rng.uniform(*BRUSH) * max(height, width))
            corners = [tuple(rng.uniform(0, (width, height))) for _ in range(rng.integers(*CORNERS))]
            brush.line(corners, fill=1, width=round(2 * half))
            for x, y in corners:
                brush.ellipse((x - half, y - half, x + half, y + half), fill=1)
    return np.asarray(canvas)


@torch.no_grad()
def beside_of(model: Model, images: Tensor, masks: Tensor) -> Tensor:
    """What the U-Net sees beside x: mask, then scaled latents of the picture with grey under it; (B, 1 + C, h, w).

    `images` (B, 3, H, W) in [-1, 1], `masks` (B, 1, H, W), 1 where hidden. The same as is made where pictures are drawn
    (tasks/conditions.py): a cell of the latents is hidden where any of its pixels is.
    """
    latents = model.autoencoder.encode(images * (1 - masks)).mean * model.family.latent_scale
    return torch.cat([F.max_pool2d(masks, model.family.autoencoder.factor), latents], dim=1)


def inpainting_family(family: Family) -> Family:
    """The family with a U-Net that sees mask and masked picture too; ValueError where it sees something already."""
    if family.concat is not None or family.unet.num_classes is not None:
        raise ValueError(f"inpainting: {family.name}'s U-Net sees more than a text already")
    channels = 2 * family.autoencoder.latent_channels + 1
    made = replace(
        family, name=f"{family.name}-inpaint", unet=replace(family.unet, in_channels=channels), concat="inpaint"
    )
    published = (known for known in FAMILIES.values() if replace(known, name=made.name) == made)
    return next(published, made)


def widened(model: Model) -> Model:
    """A model that inpaints, and answers as before until it is trained: what is new in its first layer is zero.

    Rombach et al. 2022 began their inpainting models so. ValueError where the U-Net sees more than a text.
    """
    family = inpainting_family(model.family)
    before = model.unet.state_dict()
    with torch.device("meta"):
        unet = UNet(family.unet)
    for name, like in unet.state_dict().items():
        value = before[name]
        if value.shape != like.shape:  # (out, in, 3, 3) of the first layer alone
            before[name] = F.pad(value, (0, 0, 0, 0, 0, like.shape[1] - value.shape[1]))
    unet.load_state_dict(before, assign=True)
    return replace(model, family=family, unet=unet.train(model.unet.training), hasher=lambda: "")
