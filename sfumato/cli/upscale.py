"""Enlarge pictures: by a method or a network, and with --strength above 0 drawn over in tiles ("SD upscale")."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS
from sfumato.types import Job

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.families import Family

__all__ = ["add_flags", "run"]

FACTOR, STRENGTH = 2.0, 0.3  # of A1111's "SD upscale", and what is usually recommended for it


def _check(job: Job) -> Job:
    """A job that draws over what is enlarged where a prompt says what it is. ValueError for an unknown upscaler."""
    from sfumato.images import UPSCALERS
    from sfumato.weights.upscalers import INSTALL, packaged_upscalers

    name = job.upscaler
    if name is not None and name not in UPSCALERS and not Path(name).expanduser().exists():
        packaged = packaged_upscalers()
        if name not in packaged:
            more = f"or of {', '.join(packaged)}" if packaged else f"Real-ESRGAN's own come with {INSTALL}"
            raise ValueError(f"upscaler={name!r}: one of {', '.join(UPSCALERS)}, or a network's file is needed; {more}")
    return replace(job, strength=job.strength if job.strength is not None or not job.prompt else STRENGTH)


def _suited(job: Job, family: Family) -> Job:
    """A job that enlarges, if it does not say how much: as much as a model does that can do nothing else."""
    from sfumato.tasks.upscale import X4

    return job if job.upscale is not None else replace(job, upscale=X4 if family.concat == "lowres" else FACTOR)


WITHOUT = (*GROUPS["second pass"], *GROUPS["new ground"], *GROUPS["mask"], "resize", "depth", "tile")
TILES = "the model's own; it is that of the tiles"
SFUMATO = Style("upscale", size=TILES, prompt="", takes_image=True, without=WITHOUT, check=_check, suited=_suited)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato upscale`."""
    drawing.add_flags(parser, SFUMATO)
