"""What the fields about a picture to draw over must be: sizes filled in from it, and fields that go together.

Part of checks.complete. Letters: sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sfumato.families import Family
from sfumato.images.fitting import FITS
from sfumato.images.reading import MAX_PIXELS
from sfumato.tasks.profiles import find_profile
from sfumato.types import Job

MAX_SIDE = 8192  # px; a larger picture is a slip of the keyboard
FILLS = ("original", "fill", "noise", "nothing")
SEAMLESS = ("", "x", "y", "xy")
SIDES = ("left", "right", "up", "down")
# What an image is needed for.
OVER_AN_IMAGE = ("strength", "exact_steps", "resize", "mask", "mask_invert", "mask_soft", "mask_resize", "from_alpha",
                 "fill", "only_masked", "depth", "upscale", "image_guidance", *SIDES)  # fmt: skip
# What else a field needs one of, and what it does not go with.
MASKS = ("mask", "from_alpha")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "upscaler": ("upscale",),
    "fill": (*MASKS, *SIDES),
    "mask_blur_x": (*MASKS, *SIDES),
    "mask_blur_y": (*MASKS, *SIDES),
    "padding": ("only_masked",),
    "falloff": SIDES,
    "colour_variation": SIDES,
}
EXCLUDES: Mapping[str, tuple[str, ...]] = {
    "upscale": (*MASKS, *SIDES, "mask_invert", "mask_soft", "only_masked", "depth", "tile", "controls"),
    **dict.fromkeys(SIDES, (*MASKS, "mask_invert", "mask_soft", "only_masked", "depth", "seamless", "controls")),
    "only_masked": ("seamless", "controls"),
    "reuse": ("controls", "sag"),
}


def _one_of(name: str, value: str | None, names: tuple[str, ...]) -> None:
    if value is not None and value not in names:
        raise ValueError(f"{name}={value!r}: one of {', '.join(names)}")


def check_fields_together(job: Job, family: Family) -> None:
    """ValueError for a field that is for nothing without another, or that another makes nothing of."""
    empty = Job()

    def said(name: str) -> bool:
        return getattr(job, name) != getattr(empty, name)

    for name, needed in NEEDS.items():
        if said(name) and not any(map(said, needed)):
            raise ValueError(f"{name}={getattr(job, name)!r}: it says nothing without {' or '.join(needed)}")
    for name, others in EXCLUDES.items():
        for other in others:
            if said(name) and said(other):
                raise ValueError(f"{other}={getattr(job, other)!r}: it does not go with {name}={getattr(job, name)!r}")
    if any(map(said, SIDES)) and job.resize != "keep":
        raise ValueError(f"resize={job.resize!r}: with new ground the image keeps its size")
    if job.upscale is not None and job.resize != "stretch":
        raise ValueError(f"resize={job.resize!r}: upscale says the size")
    if job.image_guidance is not None and family.concat != "picture":
        raise ValueError(f"image_guidance={job.image_guidance}: {family.name} is told of no picture beside the noise")


def _check_finished_size(job: Job, size: tuple[int, int]) -> None:
    """ValueError where what comes out would be larger than a picture may be."""
    try:
        height, width = (float(side) * float(job.upscale or 1) for side in size)
        height, width = height + float(job.up + job.down), width + float(job.left + job.right)
    except TypeError:
        return  # no numbers; what they must be is said where they are checked
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"image={job.image!r}: {width:.0f} x {height:.0f} px would come out; {MAX_PIXELS} in all are allowed"
        )


def complete_picture(job: Job, family: Family, size: tuple[int, int] | None) -> Job:
    """The fields about a picture to draw over; its size decides the job's where that says none."""
    _one_of("resize", job.resize, FITS)
    _one_of("fill", job.fill, FILLS)
    _one_of("seamless", job.seamless, SEAMLESS)
    if job.image is None:
        empty = Job()
        for name in OVER_AN_IMAGE:
            if getattr(job, name) != getattr(empty, name):
                raise ValueError(f"{name}={getattr(job, name)!r}: an image is needed for that")
        return job
    if job.hires is not None:
        raise ValueError("hires: a second pass is for pictures from words; an image is enlarged with upscale")
    if size is None:
        raise ValueError(f"image={job.image!r}: its size is not known")
    _check_finished_size(job, size)
    if any(getattr(job, side) for side in SIDES):  # each pass has a size of its own
        for name in ("width", "height"):
            if getattr(job, name) not in (None, family.size):
                raise ValueError(f"{name}={getattr(job, name)}: not with new ground; passes have the model's size")
        job = replace(job, resize=job.resize or "keep", fill=job.fill or "noise")
        return replace(job, width=family.size, height=family.size)
    if job.mask is not None or job.from_alpha:
        job = replace(job, fill=job.fill or "original")
    picture_size = find_profile(job.like).picture_size
    if job.only_masked or job.upscale is not None or picture_size == "native":
        usual = (family.size, family.size)
    elif job.width is None and job.height is None:
        keeps = picture_size == "keep" and job.resize in (None, "keep")
        usual = (_to_step(size[0], family.size_step, up=keeps), _to_step(size[1], family.size_step, up=keeps))
        if max(usual) > MAX_SIDE:
            raise ValueError(
                f"image={job.image!r}: {size[1]} x {size[0]} px, and {MAX_SIDE} a side are drawn at most;"
                " width and height draw it smaller"
            )
        if job.seamless and keeps and usual != size:
            raise ValueError(
                f"seamless={job.seamless!r}: the image is {size[1]} x {size[0]} px; for edges that meet both must be"
                f" multiples of {family.size_step} (width={usual[1]}, height={usual[0]} stretch it)"
            )
        job = replace(job, resize="keep" if keeps else job.resize)
    else:
        usual = _of_same_shape(job, size, family.size_step)
    height, width = (own if given is None else given for own, given in zip(usual, (job.height, job.width), strict=True))
    return replace(job, height=height, width=width, resize=job.resize or "stretch")


def _to_step(side: int, step: int, *, up: bool) -> int:
    """The multiple of `step` next to a side in pixels, one at least."""
    return max(1, -(-side // step) if up else side // step) * step


def _of_same_shape(job: Job, size: tuple[int, int], step: int) -> tuple[int, int]:
    """(height, width) where one of the two is given: the other so that the picture keeps its shape."""
    (tall, wide), height, width = size, job.height, job.width
    try:
        high = height if width is None else max(1, round(tall * width / wide / step)) * step
        broad = width if height is None else max(1, round(wide * height / tall / step)) * step
    except TypeError:
        return tall, wide  # no numbers; what they must be is said where they are checked
    return int(high or 0), int(broad or 0)
