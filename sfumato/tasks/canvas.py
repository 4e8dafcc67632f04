"""The canvas: the pixels that a job draws over, what of them is free, and how what was drawn becomes the picture.

Owns sizes, crops and masks in pixels; knows no latents. Letters: H W pixels of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sfumato.families import Family
from sfumato.images import Picture, resize
from sfumato.images.fitting import fitted
from sfumato.images.masks import blurred, box_of, feathered, filled, laid_on, shaped_like
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.scenes import size_of
from sfumato.types import Job

PAPER = 255  # what is behind a picture with transparent parts, as A1111's
OF_A_MASK = ("mask_invert", "mask_resize", "mask_soft", "only_masked")  # fields that are for nothing without one


@dataclass(frozen=True)
class Canvas:
    """Pixels (H, W, 3) uint8 to draw over; `mask` (H, W) float32, 1 is free, None where all is.

    `finished` takes what was drawn, (B, H, W, 3) uint8, to the pictures that the job asked for. Planes are float32:
    `carried` takes one of the whole picture, of any size, to the canvas, and `placed` one of the canvas into the
    finished picture, 0 where nothing is drawn.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    finished: Callable[[np.ndarray], np.ndarray]
    carried: Callable[[np.ndarray], np.ndarray] = lambda plane: plane
    placed: Callable[[np.ndarray], np.ndarray] = lambda plane: plane


def flat(picture: Picture) -> np.ndarray:
    """Pixels (H, W, 3) uint8, what is transparent laid on white."""
    if picture.alpha is None:
        return picture.pixels
    return laid_on(np.full_like(picture.pixels, PAPER), picture.pixels, picture.alpha.astype(np.float32) / 255)


def mask_size_error(mask: np.ndarray, picture: np.ndarray, name: str) -> ValueError:
    """What to say of a mask of another size."""
    (tall, wide), (height, width) = mask.shape, picture.shape[:2]
    return ValueError(
        f"mask={name!r}: {wide} x {tall} px, the image has {width} x {height}; the same size is needed"
        " (--mask-resize, mask_resize=True, stretches it)"
    )


def read_free(job: Job, picture: Picture, pictures: Pictures) -> np.ndarray | None:
    """What of a job's picture is to be drawn, (H, W) float32: its mask, or what is transparent where it has none.

    ValueError for a mask of another size, where nothing is to be drawn, and for what is said of a mask that is missing.
    """
    if job.mask is None:
        if not job.from_alpha:
            for name in OF_A_MASK:
                if getattr(job, name):
                    raise ValueError(f"{name}=True: there is no mask; one is needed for that")
            return None
        if picture.alpha is None:
            raise ValueError(
                f"mask=None: {job.image!r} is nowhere transparent, so a mask must say what to draw: white where it is"
            )
        mask = 1 - picture.alpha.astype(np.float32) / 255
    else:
        mask = pictures.mask(job.mask)
        if mask.shape != picture.pixels.shape[:2]:
            if not job.mask_resize:
                raise mask_size_error(mask, picture.pixels, job.mask)
            mask = fitted(mask, picture.pixels.shape[1], picture.pixels.shape[0], "stretch", "bilinear")
    if job.mask_invert:
        mask = 1 - mask
    free = mask if job.mask_soft else (mask >= 0.5).astype(np.float32)
    if not free.any():
        raise _nothing_to_draw(job, greys=bool(mask.any()))
    return free


def _nothing_to_draw(job: Job, *, greys: bool) -> ValueError:
    """What to say where a mask leaves nothing; there are `greys` in it that are too weak to count."""
    where = f"image={job.image!r}" if job.mask is None else f"mask={job.mask!r}"
    if job.mask is None:
        what = "nowhere more than half transparent" if greys else "nowhere transparent"
        what = "transparent all over, which mask_invert turns round" if job.mask_invert and not greys else what
    elif greys:
        side = "darker" if job.mask_invert else "brighter"
        what = f"nowhere {side} than half grey; mask_soft takes greys in part"
    else:
        what = "white all over, which mask_invert turns to black" if job.mask_invert else "black all over"
    return ValueError(f"{where}: it is {what}, so there is nothing to draw")


def blurs(job: Job, family: Family) -> tuple[float, float]:
    """The standard deviations in px, along x and y, by which a complete job's mask is blurred."""
    usual = find_profile(job.like).mask_blur
    usual = family.autoencoder.factor / 4 if usual is None else usual
    across = usual if job.mask_blur_x is None else job.mask_blur_x
    return across, across if job.mask_blur_y is None else job.mask_blur_y


def softened(mask: np.ndarray, job: Job, family: Family) -> np.ndarray:
    """How much of what was drawn lies over the old picture, (H, W): the mask with its edge blurred."""
    sigmas = blurs(job, family)
    if job.mask_soft:
        mask = np.clip(4 * mask, 0, 1)  # what is changed least is not cut off
    return feathered(mask, *sigmas) if find_profile(job.like).mask_inward else blurred(mask, *sigmas)


def canvas_of(job: Job, family: Family, pictures: Pictures) -> Canvas:
    """The canvas of a complete job that has an image. ValueError where its pictures do not fit each other or it."""
    assert job.image is not None
    if job.depth is not None and family.concat != "depth":
        raise ValueError(f"depth={job.depth!r}: the model ({family.name}) sees no depth; a depth model is needed")
    picture = pictures.picture(job.image, "image")
    return canvas_over(flat(picture), read_free(job, picture, pictures), job, family)


def canvas_over(pixels: np.ndarray, free: np.ndarray | None, job: Job, family: Family) -> Canvas:
    """The canvas of a complete job over these pixels, of which `free` (H, W) is to be drawn (None: all)."""
    if free is None:
        return _whole(pixels, job, family)
    if job.only_masked:
        return _crop(pixels, free, job, family)
    height, width = size_of(job)
    tall, wide = pixels.shape[:2]
    ground = fitted(pixels, width, height, str(job.resize))
    mask = fitted(free, width, height, str(job.resize), "bilinear")
    if not job.mask_soft:
        mask = (mask >= 0.5).astype(np.float32)
    weight = softened(mask, job, family)

    def finished(drawn: np.ndarray) -> np.ndarray:
        whole = np.stack([laid_on(ground, one, weight) for one in drawn])
        return whole[:, :tall, :wide] if job.resize == "keep" else whole

    # a blurred mask reaches further, and all that it reaches is drawn
    reached = np.maximum(mask, weight)
    return Canvas(_begun(ground, mask, job), reached, finished, *_planes(job, (tall, wide), (height, width)))


def _whole(pixels: np.ndarray, job: Job, family: Family) -> Canvas:
    height, width = size_of(job)
    if job.resize == "latent" and family.concat in (None, "depth"):  # redraw stretches what becomes of these pixels
        factor = family.autoencoder.factor
        height, width = (max(1, side // factor) * factor for side in pixels.shape[:2])
    tall, wide = pixels.shape[:2]

    def finished(drawn: np.ndarray) -> np.ndarray:
        return drawn[:, :tall, :wide] if job.resize == "keep" else drawn

    ground = fitted(pixels, width, height, str(job.resize))
    return Canvas(ground, None, finished, *_planes(job, (tall, wide), size_of(job)))


def _planes(
    job: Job, picture: tuple[int, int], canvas: tuple[int, int]
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """`carried` and `placed` of a canvas of (height, width) over all of a picture of (height, width)."""

    def carried(plane: np.ndarray) -> np.ndarray:
        whole = fitted(plane, picture[1], picture[0], "stretch", "bicubic")
        return fitted(whole, canvas[1], canvas[0], str(job.resize), "bicubic", mirrored=True)

    def placed(plane: np.ndarray) -> np.ndarray:
        return plane[: picture[0], : picture[1]] if job.resize == "keep" else plane

    return carried, placed


def _crop(pixels: np.ndarray, free: np.ndarray, job: Job, family: Family) -> Canvas:
    """The surroundings of the mask alone, at the job's size; what is drawn goes back into the whole picture."""
    height, width = size_of(job)
    weight = softened(free, job, family)
    reached = np.maximum(free, weight)
    left, top, right, bottom = shaped_like(box_of(reached, job.padding), width, height, pixels.shape[:2])
    part = (slice(top, bottom), slice(left, right))
    fit = "stretch" if (right - left) * height == (bottom - top) * width else "fill"
    ground = fitted(pixels[part], width, height, fit)
    mask = fitted(np.ascontiguousarray(reached[part]), width, height, fit, "bilinear")
    if not job.mask_soft:
        mask = (mask > 0).astype(np.float32)

    def finished(drawn: np.ndarray) -> np.ndarray:
        small = _unfitted(drawn, right - left, bottom - top, fit)
        result = np.repeat(pixels[None], len(drawn), axis=0)
        for whole, one in zip(result, small, strict=True):
            whole[part] = laid_on(pixels[part], one, weight[part])
        return result

    def carried(plane: np.ndarray) -> np.ndarray:
        whole = fitted(plane, pixels.shape[1], pixels.shape[0], "stretch", "bicubic")
        return fitted(np.ascontiguousarray(whole[part]), width, height, fit, "bicubic")

    def placed(plane: np.ndarray) -> np.ndarray:
        whole = np.zeros(pixels.shape[:2], dtype=np.float32)
        whole[part] = _unfitted(plane[None], right - left, bottom - top, fit)[0]
        return whole

    return Canvas(_begun(ground, mask, job), mask, finished, carried, placed)


def _unfitted(drawn: np.ndarray, width: int, height: int, fit: str) -> np.ndarray:
    """What `fitted` made of a picture of this size, back at that size."""
    if fit == "stretch":
        return resize(drawn, width, height)
    tall, wide = drawn.shape[1:3]
    scale = min(wide / width, tall / height)
    inner = (max(1, min(tall, round(height * scale))), max(1, min(wide, round(width * scale))))
    top, left = (tall - inner[0]) // 2, (wide - inner[1]) // 2
    return resize(drawn[:, top : top + inner[0], left : left + inner[1]], width, height)


def _begun(ground: np.ndarray, mask: np.ndarray, job: Job) -> np.ndarray:
    """What drawing begins from: the picture, or the colours around the mask flowing into it."""
    return filled(ground, mask) if job.fill == "fill" else ground
