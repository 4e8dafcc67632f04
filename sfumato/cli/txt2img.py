"""Draw pictures from a prompt. Without --ckpt the model in the box draws, at its own size."""

from __future__ import annotations

import argparse

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS

__all__ = ["ORIGINAL", "add_flags", "run"]

# What only commands with a picture to begin from have; large pictures and textures may be drawn from words too.
WITHOUT = (*GROUPS["image"], *GROUPS["mask"], *GROUPS["new ground"], "upscale", "upscaler")
SFUMATO = Style("txt2img", without=WITHOUT)
ORIGINAL = Style("txt2img", "a painting of a virus monster playing guitar", 2, 3, 50, 7.5, "ddim", always_grid=True,
                 without=WITHOUT)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato txt2img`."""
    drawing.add_flags(parser, SFUMATO)
