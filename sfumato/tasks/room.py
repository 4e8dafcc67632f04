"""Whether there is room in memory for what jobs want to draw, asked before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.families import Model
from sfumato.memory import GIB, free_memory
from sfumato.memory.estimate import Kernels, decoder_bytes, unet_bytes
from sfumato.tasks.picture_checks import SIDES
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.scenes import size_of
from sfumato.types import Job


def drawn_at_once(job: Job, model: Model, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels of the largest piece that a complete job draws."""
    height, width = size_of(job)
    if image_size is None:
        return height, width
    if model.family.concat == "lowres" and job.upscale is not None:
        return round(image_size[0] * job.upscale), round(image_size[1] * job.upscale)
    if any(getattr(job, side) for side in SIDES):  # a pass is as long as the side that it is on
        size = model.family.size
        along = image_size[0] + job.up + job.down, image_size[1] + job.left + job.right
        return (along[0], size) if along[0] > along[1] else (size, along[1])
    return height, width


def needed(job: Job, model: Model, image_size: tuple[int, int] | None = None, tile: int | None = None) -> int:
    """Bytes beside the weights that a complete job's largest network call takes: one picture's, with guidance.

    `tile` px are decoded at once, all of the picture where it is None. `image_size` is the (height, width) of the job's
    image.
    """
    family = model.family
    factor, kernels = family.autoencoder.factor, Kernels(model.device)
    height, width = drawn_at_once(job, model, image_size)
    drawn = [min(side, job.tile or side) // factor for side in (height, width)]
    decoded = [min(side, job.tile or tile or side) // factor for side in (height, width)]
    calls = (
        unet_bytes(family.unet, drawn[0], drawn[1], 2, model.dtype, kernels),
        decoder_bytes(family.autoencoder, decoded[0], decoded[1], 1, model.dtype, kernels),
    )
    return max(calls)


def check_memory(jobs: Sequence[Job], model: Model, pictures: Pictures, tile: int | None = None) -> None:
    """ValueError with the estimate where a complete job's pictures do not fit; only asked of more than native size."""
    size = model.family.size
    for job in jobs:
        height, width = drawn_at_once(job, model, pictures.size(job))
        if height * width <= 2 * size * size:
            continue
        try:
            free = free_memory(model.device)
        except ValueError:  # the system does not say
            return
        taken = needed(job, model, pictures.size(job), tile)
        if taken > free:
            raise ValueError(
                f"width={width}, height={height}: drawing needs about {taken / GIB:.1f} GiB, {free / GIB:.1f} are free;"
                f" tile={size} draws it in tiles, or a smaller size is needed"
            )
