r"""Emphasis: `(more)`, `[less]`, `(exactly:1.3)`, escapes and BREAK -> pieces of text with their weights.

Rules as in A1111, with two exceptions: BREAK inside brackets is still a break (there it turns into a word), and a
weight that is no number (`(a:1.2.3)`) is text (there it is an error). Knows no tokens.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np

MORE = 1.1  # A1111's factor for one pair of round brackets
LESS = 1 / 1.1  # and for one pair of square ones
MOST = 1e30  # weights stay finite in float32, whatever is nested

# A backslash with what it protects, or alone; a bracket; the end of `(text:1.2)`; text.
TOKEN = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?(?:\d{1,30}(?:\.\d*)?|\.\d+))\s*\)|[^\\()\[\]:]+|:")
WORD_BREAK = re.compile(r"\bBREAK\b")


class Break(Enum):
    """The type of the mark that ends a chunk."""

    BREAK = "BREAK"


BREAK: Final = Break.BREAK


class Piece(NamedTuple):
    """Text without brackets and the weight of all of it."""

    text: str
    weight: float


Pieces: TypeAlias = list[Piece | Literal[Break.BREAK]]


def _read(text: str) -> tuple[list[str | Break], list[tuple[int, int, float]]]:
    """Texts and marks in order, and the (start, end, factor) ranges of them that brackets weigh, inner ones first."""
    found: list[str | Break] = []
    ranges: list[tuple[int, int, float]] = []
    opened: dict[str, list[int]] = {")": [], "]": []}
    for match in TOKEN.finditer(text):
        token, number = match[0], match[1]
        closer = token[-1]
        if token[0] == "\\":
            found.append(token[1:])
        elif token == "(":
            opened[")"].append(len(found))
        elif token == "[":
            opened["]"].append(len(found))
        elif number and opened[")"]:
            ranges.append((opened[")"].pop(), len(found), float(number)))
        elif opened.get(token):
            ranges.append((opened[closer].pop(), len(found), MORE if closer == ")" else LESS))
        else:
            found += _breaks(token)
    ranges += [(start, len(found), MORE) for start in opened[")"]]
    ranges += [(start, len(found), LESS) for start in opened["]"]]
    return found, ranges


def _breaks(text: str) -> list[str | Break]:
    """Text cut at each BREAK, which takes the blanks beside it along."""
    parts = WORD_BREAK.split(text)
    found: list[str | Break] = []
    for index, part in enumerate(parts):
        part = part.lstrip() if index else part
        part = part.rstrip() if index < len(parts) - 1 else part
        found += [BREAK, part] if index else [part]
    return found


def emphasis(text: str) -> Pieces:
    """Pieces in order, BREAK marks between them. Neighbours of equal weight are one piece; there is at least one.

    Brackets inside brackets multiply. An open bracket weighs all that follows; a stray closing one is text. Weights
    are finite.
    """
    found, ranges = _read(text)
    weights = np.ones(len(found))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start, end, factor in ranges:
            weights[start:end] *= factor
    weights = np.nan_to_num(weights, nan=0.0).clip(-MOST, MOST)
    pieces: Pieces = []
    run: list[str] = []
    weight = 1.0

    def flush() -> None:
        if run:
            pieces.append(Piece("".join(run), weight))
            run.clear()

    for item, item_weight in zip(found, weights.tolist(), strict=True):
        if isinstance(item, Break):
            flush()
            pieces.append(BREAK)
        elif item:
            if item_weight != weight:
                flush()
            run.append(item)
            weight = item_weight
    flush()
    return pieces or [Piece("", 1.0)]
