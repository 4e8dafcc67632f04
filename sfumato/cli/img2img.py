"""Draw over pictures: noise is put over each and it is drawn on from there, by the prompt."""

from __future__ import annotations

import argparse

from sfumato.cli import drawing
from sfumato.cli.drawing import Style, run
from sfumato.cli.job_flags import GROUPS

__all__ = ["ORIGINAL", "add_flags", "run"]

WITHOUT = (*GROUPS["second pass"], *GROUPS["new ground"], "upscale", "upscaler")
SFUMATO = Style("img2img", takes_image=True, without=WITHOUT)
ORIGINAL = Style("img2img", "a painting of a virus monster playing guitar", 1, 2, 50, 5.0, "ddim", 0.75,
                 always_grid=True, takes_image=True, without=WITHOUT)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato img2img`."""
    drawing.add_flags(parser, SFUMATO)
