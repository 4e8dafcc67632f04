"""Put new ground on the sides of pictures and draw it. The old picture stays, to the bit."""

from __future__ import annotations

import argparse

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS
from sfumato.types import Job

__all__ = ["add_flags", "run"]


def _check(job: Job) -> Job:
    from sfumato.tasks.picture_checks import SIDES

    if not any(getattr(job, side) for side in SIDES):
        raise ValueError("left: say how much to put on with --left, --right, --up or --down PX")
    return job


NOT_HERE = (
    "mask",
    "mask_invert",
    "mask_resize",
    "mask_soft",
    "from_alpha",
    "only_masked",
    "padding",
    "resize",
    "depth",
)
WITHOUT = (*GROUPS["second pass"], *NOT_HERE, "upscale", "upscaler")
SFUMATO = Style("outpaint", takes_image=True, without=WITHOUT, check=_check)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato outpaint`."""
    drawing.add_flags(parser, SFUMATO)
