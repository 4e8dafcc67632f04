"""A labelled contact sheet of rows of pictures, in few colours so that the file stays small. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LINE = 96, 3, 18  # px: of a picture, between pictures, of a label
COLOURS = 128
INK, PAPER = (30, 30, 30), (255, 255, 255)
Row = tuple[str, Sequence[np.ndarray]]


def sheet_of(rows: Sequence[Row], columns: int) -> Image.Image:
    """Rows of (label, pictures (H, W, 3) uint8), each label above its first `columns` pictures, resized to SIDE."""
    wide, tall = columns * (SIDE + GAP) + GAP, len(rows) * (LINE + SIDE + GAP)
    page = Image.new("RGB", (wide, tall), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for number, (label, pictures) in enumerate(rows):
        top = number * (LINE + SIDE + GAP)
        pen.text((GAP, top + 2), label, fill=INK, font=font)
        for place, pixels in enumerate(pictures[:columns]):
            small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(small, (GAP + place * (SIDE + GAP), top + LINE))
    return page


def save_sheet(path: Path, rows: Sequence[Row], columns: int = 10) -> None:
    """Write the sheet as a PNG of COLOURS colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = sheet_of(rows, columns)
    page.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
