"""Draw over pictures with a model that keeps their depth; --depth gives a depth map or a network that finds it."""

from __future__ import annotations

import argparse

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS
from sfumato.types import Job

__all__ = ["add_flags", "run"]


def _check(job: Job) -> Job:
    if job.depth is None:
        raise ValueError("depth: say with --depth PATH where the depth map, or an .onnx file of a depth network, is")
    return job


WITHOUT = (*GROUPS["second pass"], *GROUPS["new ground"], "upscale", "upscaler")
SFUMATO = Style("depth2img", takes_image=True, without=WITHOUT, check=_check)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato depth2img`."""
    drawing.add_flags(parser, SFUMATO)
