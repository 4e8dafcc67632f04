"""Enlarge pictures: by a method or a network, and with --strength above 0 drawn over in tiles ("SD upscale")."""

from __future__ import annotations

import argparse
from dataclasses import replace

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS
from sfumato.types import Job

__all__ = ["add_flags", "run"]

FACTOR, STRENGTH = 2.0, 0.3  # of A1111's "SD upscale", and what is usually recommended for it


def _check(job: Job) -> Job:
    """A job that enlarges, and draws over what is enlarged where a prompt says what it is."""
    strength = job.strength if job.strength is not None or not job.prompt else STRENGTH
    return replace(job, upscale=FACTOR if job.upscale is None else job.upscale, strength=strength)


WITHOUT = (*GROUPS["second pass"], *GROUPS["new ground"], *GROUPS["mask"], "resize", "depth", "tile")
SFUMATO = Style("upscale", prompt="", takes_image=True, without=WITHOUT, check=_check)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato upscale`."""
    drawing.add_flags(parser, SFUMATO)
