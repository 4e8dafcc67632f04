"""Upscaling: by a method or a network alone, then drawn over tile by tile ("SD upscale"), or by the x4 latent upscaler.

Memory does not grow with the picture: what is drawn at once is a tile. Letters: H W pixels of the large picture.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sfumato.diffusion.noise import MAX_SEED
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig
from sfumato.images import from_uint8
from sfumato.images.fitting import fitted
from sfumato.models.tiling import ramps, starts
from sfumato.tasks.canvas import Canvas, flat
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.redraw import Begun, levels_of, redraw_on
from sfumato.tasks.scenes import OneGenerator, Scene, Task, has_one_generator, noise_of, overlap_of, sigmas_of
from sfumato.tasks.studio import Studio
from sfumato.types import Job

STRIDE = 1_000_003  # between the seeds of tiles: far from those of the job's pictures
X4 = 4  # what the latent upscaler enlarges by, its autoencoder's factor
# The latent upscaler's own noise over the small picture: level 0 to 999 of these, 20 usually (its published config).
LOW_RES = ScheduleConfig(beta_start=0.0001, beta_end=0.02)
LOW_RES_LEVEL = 20


def upscale(job: Job, studio: Studio) -> Task:
    """The job's image made `job.upscale` times larger; at a strength above 0 drawn over in tiles of the job's size."""
    assert job.image is not None and job.upscale is not None
    pixels = flat(studio.pictures.picture(job.image, "image"))
    if studio.model.family.concat == "lowres":
        return (yield from _by_latents(pixels, job, studio))
    height, width = (max(1, round(side * job.upscale)) for side in pixels.shape[:2])
    large = studio.enlarged(pixels[None], width, height, job.upscaler or "lanczos")[0]
    if job.strength and studio.model.family.concat == "depth":
        raise ValueError(f"ckpt: {studio.model.name!r} wants a depth map of every tile; another model draws them over")
    if not job.strength:
        return np.repeat(large[None], job.count, axis=0)
    return (yield from _redrawn(large, job, studio))


def _redrawn(large: np.ndarray, job: Job, studio: Studio) -> Task:
    """A picture (H, W, 3) uint8 drawn over in overlapping tiles of the job's width x height, blended in pixels.

    The noise that tiles begin from is cut out of the whole picture's, so that they agree where they overlap.
    """
    model, tall, wide = studio.model, *large.shape[:2]
    height, width = (max(int(side or 0), 0) for side in (job.height, job.width))
    ground = fitted(large, max(wide, width), max(tall, height), "keep")
    factor = model.family.autoencoder.factor
    # tiles begin on latent cells: what is left at the right and below is mirrored
    rows, columns = (-(-side // factor) * factor for side in ground.shape[:2])
    ground = fitted(ground, columns, rows, "keep")
    noise = noise_of(replace(job, height=rows, width=columns, noise_width=None, noise_height=None), model)()
    result = np.empty((job.count, *ground.shape), dtype=np.uint8)
    rows_of_tiles = _tiles(ground.shape[:2], (height, width), overlap_of(job), factor)
    one = replace(job, upscale=None, resize="stretch", tile=None, overlap=None, seamless="")
    number = 0
    steps = max(0, len(levels_of(one, model).sigmas) - 1)
    left_over = sum(len(row) for row in rows_of_tiles)
    band = np.zeros((job.count, height, columns, 3), dtype=np.float32)
    for index, row in enumerate(rows_of_tiles):
        for top, left, weight in row:
            left_over -= 1
            area = (slice(top, top + height), slice(left, left + width))
            down, across = (slice(part.start // factor, part.stop // factor) for part in area)
            # the first noise is the whole picture's; what samplers add on the way is every tile's own
            after = noise_of(replace(one, seed=(job.seed + 1 + number * STRIDE) % (MAX_SEED - job.count)), model)
            cut = Begun(noise[..., down, across], after)
            number += 1
            canvas = Canvas(ground[area], None, lambda drawn: drawn)
            drawn = yield from redraw_on(canvas, one, studio, noise=cut, later=left_over * steps)
            band[:, :, left : left + width] += drawn * weight[..., None]
        top = row[0][0]
        done = height if index == len(rows_of_tiles) - 1 else rows_of_tiles[index + 1][0][0] - top
        result[:, top : top + done] = np.round(band[:, :done]).clip(0, 255)
        band[:, : height - done] = band[:, done:].copy()  # what the next row of tiles goes on from
        band[:, height - done :] = 0
    return result[:, :tall, :wide]


def _tiles(
    size: tuple[int, int], tile: tuple[int, int], overlap: int, factor: int
) -> list[list[tuple[int, int, np.ndarray]]]:
    """Rows of tiles that cover (height, width): (top, left, weights) in pixels, on latent cells; weights sum to 1."""
    sides = []
    for length, side in zip(size, tile, strict=True):
        cells = side // factor
        places = starts(length // factor, cells, min(max(1, overlap // factor), cells // 2))
        fades = ramps(places, cells, factor, torch.device("cpu"))
        sides.append([(place * factor, fade.numpy()) for place, fade in zip(places, fades, strict=True)])
    return [[(top, left, down[:, None] * across) for left, across in sides[1]] for top, down in sides[0]]


@torch.inference_mode()
def _by_latents(pixels: np.ndarray, job: Job, studio: Studio) -> Task:
    """The x4 upscaler: it sees the small picture, with a little noise, beside latents of the same size.

    Rombach et al. 2022, section 4.5, as the published model of Stable Diffusion 2.
    """
    model, step = studio.model, studio.model.family.size_step // X4
    if job.upscale != X4:
        raise ValueError(f"upscale={job.upscale:g}: {model.name!r} enlarges {X4} times; {X4} is needed")
    tall, wide = pixels.shape[:2]
    small = fitted(pixels, -(-wide // step) * step, -(-tall // step) * step, "keep")
    one = replace(job, height=small.shape[0] * X4, width=small.shape[1] * X4)
    low = from_uint8(small[None]).to(model.device)
    noise = noise_of(one, model) if has_one_generator(one, model) and find_profile(job.like).sampled else None
    if isinstance(noise, OneGenerator):  # diffusers draws both from one generator, this first
        over = noise.aside(tuple(low.shape))
    else:
        over = torch.randn(low.shape, generator=torch.Generator().manual_seed(job.seed)).to(model.device)
    number = min(LOW_RES_LEVEL, (model.family.unet.num_classes or 1) - 1)
    level = torch.tensor([number], device=model.device)
    noisy, sigma = NoiseSchedule(LOW_RES).add_noise(low, over, level)
    seen = noisy * (1 + sigma.reshape(-1, 1, 1, 1) ** 2).rsqrt()
    drawn = yield Scene(one, sigmas_of(one, model), concat=seen, label=number, noise=noise)
    return studio.decode(drawn, one)[:, : tall * X4, : wide * X4]
