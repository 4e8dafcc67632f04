"""What U-Nets see beside x when they learn: masked pictures, pictures to be edited, depth maps; and how they begin.

Masks are boxes and thick strokes, as of Suvorov et al. 2022 (LaMa, "wide" masks), and for a quarter of the pictures
everything, as Stable Diffusion's inpainting models were trained. Everything is as it is made where pictures are drawn
(tasks/conditions.py). Knows no loss. Letters: B pictures, H W pixels, h w size of the latents, C their channels.
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
def masked(model: Model, images: Tensor, masks: Tensor) -> Tensor:
    """Of inpainting models: mask, then scaled latents of the picture with grey under it; (B, 1 + C, h, w).

    `images` (B, 3, H, W) in [-1, 1], `masks` (B, 1, H, W), 1 where hidden; a cell of the latents is hidden where any of
    its pixels is.
    """
    latents = model.autoencoder.encode(images * (1 - masks)).mean * model.family.latent_scale
    return torch.cat([F.max_pool2d(masks, model.family.autoencoder.factor), latents], dim=1)


@torch.no_grad()
def edited(model: Model, images: Tensor) -> Tensor:
    """Of models that edit by instructions: (B, C, h, w), latents of what is edited, not scaled (Brooks et al. 2023).

    `images` (B, 3, H, W) in [-1, 1].
    """
    return model.autoencoder.encode(images).mean


def depths(model: Model, maps: Tensor) -> Tensor:
    """Of models that see depth: (B, 1, h, w), each map at latent size, from -1 (far) to 1 (near).

    `maps` (B, 3, H, W) of any range, near is bright. A map that is the same everywhere, as a cut of a sky may be, is 0.
    """
    factor = model.family.autoencoder.factor
    size = (maps.shape[2] // factor, maps.shape[3] // factor)
    small = F.interpolate(maps.mean(1, keepdim=True), size=size, mode="bicubic", align_corners=False)
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    deep = high - low > 1e-4 * maps.abs().max().clamp(min=1e-4)
    return torch.where(deep, 2 * (small - low) / (high - low).clamp(min=1e-12) - 1, 0.0)


KINDS = {"inpaint": "inpaint", "edit": "picture", "depth": "depth"}  # of models, and what their U-Nets see


def seeing(family: Family, kind: str) -> Family:
    """The family with a U-Net that sees more, `kind` one of KINDS; the published one where there is one.

    ValueError where the U-Net sees something already.
    """
    if family.concat is not None or family.unet.num_classes is not None:
        raise ValueError(f"into={kind!r}: {family.name}'s U-Net sees more than a text already")
    latent = family.autoencoder.latent_channels
    more = {"inpaint": latent + 1, "edit": latent, "depth": 1}[kind]
    unet = replace(family.unet, in_channels=latent + more)
    made = replace(family, name=f"{family.name}-{kind}", unet=unet, concat=KINDS[kind])
    published = next((known for known in FAMILIES.values() if replace(known, name=made.name) == made), None)
    if published is None and made.name in FAMILIES:  # SD 2 at 768 px predicts v, its published relatives noise
        return replace(made, name=f"{family.name}-{family.prediction}-{kind}")
    return published or made


def widened(model: Model, kind: str) -> Model:
    """A model of that kind which answers as before until it is trained: what is new in its first layer is zero.

    Rombach et al. 2022 and Brooks et al. 2023 began theirs so. ValueError where the U-Net sees more than a text.
    """
    family = seeing(model.family, kind)
    before = model.unet.state_dict()
    with torch.device("meta"):
        unet = UNet(family.unet)
    for name, like in unet.state_dict().items():
        value = before[name]
        if value.shape != like.shape:  # (out, in, 3, 3) of the first layer alone
            before[name] = F.pad(value, (0, 0, 0, 0, 0, like.shape[1] - value.shape[1]))
    unet.load_state_dict(before, assign=True)
    return replace(model, family=family, unet=unet.train(model.unet.training), hasher=lambda: "")
