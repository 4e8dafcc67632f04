"""Outpainting: new ground at the sides of a picture, begun as noise of the picture's kind and drawn in passes.

Each pass draws one side at about the model's own size: the new ground and as much of the old picture beside it as
that holds. The old picture stays as it is, to the bit. Letters: H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sfumato.families import Family
from sfumato.images.fitting import fitted
from sfumato.images.masks import laid_on
from sfumato.images.outpainting import extended, passes, without_step
from sfumato.tasks.canvas import Canvas, flat
from sfumato.tasks.picture_checks import SIDES
from sfumato.tasks.redraw import levels_of, redraw_on
from sfumato.tasks.scenes import Task
from sfumato.tasks.studio import Studio
from sfumato.types import Job

STRENGTH = 0.8  # recommended for outpainting mk2
FILLS = {"original": "mirror", "fill": "edge", "noise": "noise", "nothing": "edge"}  # what new ground begins as
Area = tuple[slice, slice]
REACH = 1 / 8  # of the model's size: how far a step of colour at the border is evened out


def outpaint(job: Job, studio: Studio) -> Task:
    """The job's image with new ground of `left`, `right`, `up` and `down` pixels."""
    assert job.image is not None
    picture = flat(studio.pictures.picture(job.image, "image"))
    family = studio.model.family
    if family.concat == "depth":
        raise ValueError(f"ckpt: {studio.model.name!r} wants a depth map of ground that is not drawn yet")
    sides = [getattr(job, side) for side in SIDES]
    turns = list(_turns(picture.shape[:2], sides, family))
    strength = STRENGTH if job.strength is None and family.concat is None else job.strength
    found = []
    for index in range(job.count):  # after the first pass every picture has surroundings of its own
        one = replace(job, count=1, seed=job.seed + index, strength=strength, fill="original", mask=None)
        canvas = picture
        for number, (side, pixels) in enumerate(turns):
            steps = max(0, len(levels_of(one, studio.model).sigmas) - 1)
            later = (len(turns) * (job.count - index) - number - 1) * steps
            canvas = yield from _pass(canvas, side, pixels, one, job, studio, later)
        found.append(canvas)
    return np.stack(found)


def _turns(size: tuple[int, int], sides: list[int], family: Family) -> Iterator[tuple[str, int]]:
    """One side after the other, a pass adding no more than half of the model's size."""
    left, right, up, down = sides
    for turn in passes(size, left, right, up, down, family.size // 2):
        yield from ((side, pixels) for side, pixels in zip(SIDES, turn, strict=True) if pixels)


def _pass(picture: np.ndarray, side: str, pixels: int, one: Job, job: Job, studio: Studio, later: int) -> Task:
    """A picture (H, W, 3) with `pixels` more at one side."""
    family = studio.model.family
    sides = [pixels if name == side else 0 for name in SIDES]
    left, right, up, down = sides
    canvas = np.pad(picture, [(up, down), (left, right), (0, 0)])
    area, old = _window(canvas.shape[:2], side, pixels, family)
    noise, seen = np.random.default_rng(0), canvas[area][old]
    ground, weight = extended(seen, *sides, blur=_blur(job, family), fill="mirror", rng=noise)
    begun, _ = extended(
        seen, *sides, blur=_blur(job, family), fill=FILLS[str(job.fill)], falloff=job.falloff,
        colour_variation=job.colour_variation, rng=noise,
    )  # fmt: skip
    free = (weight > 0).astype(np.float32)
    tall, wide = free.shape
    height, width = (-(-length // family.size_step) * family.size_step for length in free.shape)

    def finished(drawn: np.ndarray) -> np.ndarray:
        even = without_step(ground, drawn[0, :tall, :wide], free, family.size * REACH)
        whole = canvas.copy()
        whole[area] = laid_on(ground, even, weight)
        return whole[None]

    def placed(plane: np.ndarray) -> np.ndarray:
        whole = np.zeros(canvas.shape[:2], dtype=np.float32)
        whole[area] = plane[:tall, :wide]
        return whole

    fit = (width, height, "keep")
    inner = Canvas(fitted(begun, *fit), fitted(free, *fit), finished, placed=placed)
    own = replace(one, width=width, height=height)
    return (yield from redraw_on(inner, own, studio, later=later, first=one.seed - job.seed))[0]


def _blur(job: Job, family: Family) -> float:
    """Pixels of new ground over which the old picture's mirror image goes over into it: 8 in outpainting mk2."""
    given = [blur for blur in (job.mask_blur_x, job.mask_blur_y) if blur is not None]
    return max(given, default=float(family.autoencoder.factor))


def _window(size: tuple[int, int], side: str, pixels: int, family: Family) -> tuple[Area, Area]:
    """The rows and columns that a pass draws: the new ground and old picture up to the model's size. And the old
    picture's within them."""
    across = side in ("left", "right")
    whole = size[1] if across else size[0]
    length = min(whole, max(family.size, 2 * pixels))
    first = side in ("left", "up")
    drawn = slice(0, length) if first else slice(whole - length, whole)
    old = slice(pixels, length) if first else slice(0, length - pixels)
    every = slice(None)
    return ((every, drawn), (every, old)) if across else ((drawn, every), (old, every))
