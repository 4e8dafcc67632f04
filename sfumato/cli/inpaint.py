"""Draw a part of pictures anew: where a mask is white, or a picture transparent. All else stays, to the bit."""

from __future__ import annotations

import argparse
from dataclasses import replace

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS
from sfumato.types import Job

__all__ = ["add_flags", "run"]


def _check(job: Job) -> Job:
    """A job with a mask, or whose image's transparent parts are it."""
    return job if job.mask is not None else replace(job, from_alpha=True)


WITHOUT = (*GROUPS["second pass"], *GROUPS["new ground"], "upscale", "upscaler", "from_alpha")
SFUMATO = Style("inpaint", takes_image=True, without=WITHOUT, check=_check)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato inpaint`."""
    drawing.add_flags(parser, SFUMATO)
