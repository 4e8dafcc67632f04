"""A sheet: pictures in labelled blocks of rows and columns on white, each at a place of which the box is known.

Knows no job and no field, only names, labels and sizes. Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
MAX_PIXELS = 170_000_000  # Pillow refuses to open more than 179 million
MAX_LINES = 3
INK, GREY, EDGE = (20, 20, 20), (110, 110, 110), (215, 215, 215)
MIN_WIDTH = 240  # px, room for the title
PIECES = re.compile(r"\s+|[^\s_/,+-]+[_/,+-]*|[_/,+-]+")


def font_size(cell_width: int) -> int:
    """A size in pixels that reads well beside cells of this width."""
    return max(12, min(28, cell_width // 14))


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """The text in lines of at most `width` px, broken behind blanks and signs, the last one shortened if need be."""
    lines = [""]
    for piece in PIECES.findall(" ".join(text[:1000].split())):
        if font.getlength(lines[-1] + piece.rstrip()) <= width:
            lines[-1] += piece
            continue
        if lines[-1]:
            lines.append("")
        for letter in piece.lstrip():  # a word wider than the line is cut anywhere
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line.strip() for line in lines]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], shortened(" ".join(lines[max_lines - 1 :]), font, width)]
    return lines


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of it as `width` px hold, then an ellipsis."""
    text = text[:1000]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@dataclass(frozen=True)
class Names:
    """What varies along x, y and z; "" for nothing."""

    x: str = ""
    y: str = ""
    z: str = ""


@dataclass(frozen=True)
class Block:
    """A table of cells: their numbers by rows, a label for each column and row, and a heading."""

    cells: Sequence[Sequence[int]]
    columns: Sequence[str]
    rows: Sequence[str]
    heading: str = ""


def blocks_of(xs: Sequence[str], ys: Sequence[str], zs: Sequence[str], columns: int | None) -> list[Block]:
    """A block for each z; or, where only x varies and `columns` are given, one for each so many cells."""
    if len(ys) == len(zs) == 1 and columns:
        starts = range(0, len(xs), columns)
        return [Block([range(s, min(s + columns, len(xs)))], xs[s : s + columns], ys) for s in starts]
    found = []
    for z, heading in enumerate(zs):
        first = z * len(xs) * len(ys)
        rows = [range(first + y * len(xs), first + (y + 1) * len(xs)) for y in range(len(ys))]
        found.append(Block(rows, xs, ys, heading))
    return found


@dataclass
class Layout:
    """Where everything goes: the boxes of cells and (left, top, text, colour) of every line of text."""

    width: int = 0
    height: int = 0
    boxes: dict[int, Box] = field(default_factory=dict)
    texts: list[tuple[float, float, str, tuple[int, int, int]]] = field(default_factory=list)

    def add(self, other: Layout, left: int, top: int) -> None:
        """Put another layout's contents at a place."""
        self.boxes |= {key: (x0 + left, y0 + top, x1 + left, y1 + top) for key, (x0, y0, x1, y1) in other.boxes.items()}
        self.texts += [(x + left, y + top, text, ink) for x, y, text, ink in other.texts]
        self.width, self.height = max(self.width, left + other.width), max(self.height, top + other.height)


class Sheet:
    """White paper with a title, labels and room for the pictures; `paste` puts them in.

    `sizes` are (width, height) of every cell. `columns` is for blocks_of, or the number of z's blocks side by side.
    ValueError where the whole would have too many pixels.
    """

    def __init__(
        self,
        title: tuple[str, str],
        names: Names,
        labels: tuple[Sequence[str], Sequence[str], Sequence[str]],
        sizes: Sequence[tuple[int, int]],
        columns: int | None = None,
    ) -> None:
        self.names, self.sizes = names, sizes
        size = font_size(max(width for width, _ in sizes))
        self.font = _font(size)
        self.line, self.gap = round(size * 1.3), max(4, size // 3)
        blocks = blocks_of(*labels, columns)
        across = min(columns or 1, len(blocks)) if len(labels[2]) > 1 else 1
        layout = self._arranged([self._block(block) for block in blocks], across, title)
        if layout.width * layout.height > MAX_PIXELS:
            raise ValueError(
                f"plot: {layout.width} x {layout.height} pixels; {MAX_PIXELS} in all are allowed, "
                "fewer values or a smaller width and height are needed"
            )
        self.boxes = [layout.boxes[index] for index in range(len(sizes))]
        self.pixels = self._drawn(layout)

    def paste(self, index: int, image: np.ndarray) -> None:
        """Put a picture (H, W, 3) uint8 in its cell."""
        left, top, right, bottom = self.boxes[index]
        if image.shape != (bottom - top, right - left, 3):
            raise ValueError(f"cell {index + 1}: a picture of {image.shape}, {right - left} x {bottom - top} is needed")
        self.pixels[top:bottom, left:right] = image

    def _block(self, block: Block) -> Layout:
        """A heading, the name of x, column labels, then rows: a label, and the cells in the middle of their places."""
        gap = self.gap
        widths = [max(self.sizes[row[at]][0] for row in block.cells) for at in range(len(block.columns))]
        limit = max(max(widths), 8 * self.line)
        rows = [wrapped(label, self.font, limit) for label in block.rows]
        beside = max(map(self._width, [self.names.y, *(line for lines in rows for line in lines)]))
        left = beside + 2 * gap if beside else gap
        lefts = list(accumulate((width + gap for width in widths[:-1]), initial=left))
        out = Layout(width=left + sum(widths) + gap * len(widths))
        out.height = self._head(out, block, lefts, widths) + gap // 2
        for lines, row in zip(rows, block.cells, strict=True):
            self._row(out, lines, row, lefts, widths)
        return out

    def _head(self, out: Layout, block: Block, lefts: Sequence[int], widths: Sequence[int]) -> int:
        """What stands over the cells of a block; returns the height that it takes."""
        top = self.gap
        if block.heading:
            heading = shortened(f"{self.names.z} = {block.heading}", self.font, out.width - 2 * self.gap)
            out.texts.append((self.gap, top, heading, INK))
            top += self.line
        if self.names.x:
            middle = (lefts[0] + lefts[-1] + widths[-1] - self._width(self.names.x)) / 2
            out.texts.append((max(self.gap, middle), top, self.names.x, GREY))
            top += self.line
        columns = [
            wrapped(text, self.font, width + self.gap // 2) for text, width in zip(block.columns, widths, strict=True)
        ]
        has_labels = any(block.columns)
        if has_labels or self.names.y:
            top += self.line * max(map(len, columns))
        if self.names.y:
            out.texts.append((self.gap, top - self.line, self.names.y, GREY))
        for lines, left, width in zip(columns, lefts, widths, strict=True):
            for back, line in enumerate(reversed(lines), 1):  # they stand on the cells
                out.texts.append((left + (width - self._width(line)) / 2, top - back * self.line, line, INK))
        return top

    def _row(
        self, out: Layout, label: Sequence[str], row: Sequence[int], lefts: Sequence[int], widths: Sequence[int]
    ) -> None:
        """A row of cells under what is there, its label's middle at the height of theirs."""
        needed = len(label) * self.line if any(label) else 0
        tall = max(needed, *(self.sizes[cell][1] for cell in row))
        for number, line in enumerate(label):
            out.texts.append((self.gap, out.height + (tall - needed) / 2 + number * self.line, line, INK))
        for cell, left, room in zip(row, lefts, widths, strict=True):
            width, height = self.sizes[cell]
            left, top = left + (room - width) // 2, out.height + (tall - height) // 2
            out.boxes[cell] = (left, top, left + width, top + height)
        out.height += tall + self.gap

    def _arranged(self, parts: Sequence[Layout], across: int, title: tuple[str, str]) -> Layout:
        """The title, and under it the blocks, `across` of them side by side."""
        out = Layout(width=MIN_WIDTH)
        top = self.gap + self.line
        for start in range(0, len(parts), across):
            left = 0
            for part in parts[start : start + across]:
                out.add(part, left, top)
                left += part.width + 2 * self.gap
            top = out.height + self.gap
        head, tail = title
        room = out.width - 2 * self.gap - self._width(tail)
        out.texts.append((self.gap, self.gap, shortened(head, self.font, room) + tail, INK))
        return out

    def _width(self, text: str) -> int:
        return round(self.font.getlength(text))

    def _drawn(self, layout: Layout) -> np.ndarray:
        paper = Image.new("RGB", (layout.width, layout.height), "white")
        pen = ImageDraw.Draw(paper)
        for left, top, text, ink in layout.texts:
            pen.text((left, top), text, fill=ink, font=self.font)
        for left, upper, right, lower in layout.boxes.values():  # so that a white picture has an edge
            pen.rectangle((left - 1, upper - 1, right, lower), outline=EDGE)
        return np.array(paper)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found
