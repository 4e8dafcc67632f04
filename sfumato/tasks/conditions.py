"""What a U-Net sees beside x, of families that see something: mask and masked picture, depth, the picture itself.

Letters: H W pixels, h w latent size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.families import Model
from sfumato.images import from_uint8
from sfumato.tasks.canvas import Canvas
from sfumato.tasks.depth import depth_of
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.scenes import size_of
from sfumato.tasks.studio import Draw, Studio
from sfumato.types import Job


def blank(model: Model, size: tuple[int, int]) -> Tensor | None:
    """What an inpainting U-Net sees beside x where all (height, width) is to be drawn; None for most families.

    A mask of ones, then the latents of a grey picture. ValueError where a family cannot draw from words alone.
    """
    family = model.family
    if family.concat is None:
        return None
    if family.concat != "inpaint":
        raise ValueError(f"image=None: {model.name!r} ({family.name}) draws from a picture, not from words alone")
    grey = torch.zeros(1, 3, *size, device=model.device, dtype=model.dtype)
    latents = model.autoencoder.encode(grey).mean * family.latent_scale
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1)


def concat_of(canvas: Canvas, job: Job, studio: Studio, draw: Draw | None) -> Tensor | None:
    """(1, Cc, h, w) for a complete job on this canvas; None for families that see nothing but x."""
    family = studio.model.family
    if family.concat is None:
        return None
    if family.concat == "inpaint":
        return _inpaint(canvas, job, studio, draw)
    if family.concat == "depth":
        return _depth(canvas, job, studio)
    if family.concat == "picture":  # InstructPix2Pix: the posterior's mean, not brought to diffusion's scale
        return studio.encode(canvas.pixels[None], job) / family.latent_scale
    raise ValueError(f"ckpt: {studio.model.name!r} ({family.name}) only enlarges pictures (sfumato upscale)")


def _inpaint(canvas: Canvas, job: Job, studio: Studio, draw: Draw | None) -> Tensor | None:
    """The mask, then the latents of the picture with grey under it."""
    model = studio.model
    if canvas.mask is None:
        return blank(model, size_of(job))
    factor = model.family.autoencoder.factor
    mask = torch.from_numpy(np.ascontiguousarray(canvas.mask))[None, None]
    mask = (mask >= 0.5).float() if find_profile(job.like).sampled else (mask > 0).float()
    # grey is between two numbers of uint8, and these models saw exactly 0
    image = from_uint8(canvas.pixels[None]) * (1 - mask)
    latents = studio.encode_images(image, job, draw)
    size = tuple(side // factor for side in size_of(job))
    small = F.interpolate(mask, size=size) if find_profile(job.like).sampled else F.max_pool2d(mask, factor)
    return torch.cat([small.to(latents), latents], dim=1)


def _depth(canvas: Canvas, job: Job, studio: Studio) -> Tensor:
    """The depth map at latent size, from -1 (far) to 1 (near) over the picture, as the model was trained."""
    height, width = size_of(job)
    factor = studio.model.family.autoencoder.factor
    depth = depth_of(canvas, job, studio)
    small = F.interpolate(
        torch.from_numpy(depth)[None, None], size=(height // factor, width // factor), mode="bicubic",
        align_corners=False,
    )  # fmt: skip
    low, high = small.amin(), small.amax()
    if high - low < 1e-4:  # bicubic rounding apart
        raise ValueError(f"depth={job.depth!r}: it is the same everywhere, so it says nothing")
    return (2 * (small - low) / (high - low) - 1).to(studio.model.device)
