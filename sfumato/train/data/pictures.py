"""What every set of captioned pictures offers: random access by number, to bytes, facts and sizes, and a report.

Knows no kind of source. Facts are a picture's metadata by the names that the source uses; `caption` is always one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sfumato.train.data.decoding import decode, size_in
from sfumato.train.data.report import Report

TRIED = 16  # pictures read at once, to see that a set is not broken from end to end
CAPTIONS = ("caption", "TEXT", "text")  # img2dataset's name first, then LAION's, then imagefolder's


class Pictures(Protocol):
    """Captioned pictures by number. Cheap to make and to pickle; what it reads is noted in `report`.

    `data` and `facts` raise ValueError or OSError where a picture's files are damaged or gone.
    """

    path: Path
    kind: str
    report: Report

    @property
    def near(self) -> int:
        """How many pictures in a row are best read together; 0 where any are read as fast."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person finds it by."""
        ...

    def data(self, index: int) -> bytes:
        """The encoded picture."""
        ...

    def facts(self, index: int) -> dict[str, Any]:
        """Its metadata; `caption` is None where it has none."""
        ...


def caption_in(facts: Mapping[str, Any]) -> str | None:
    """The caption among a picture's metadata, without spaces around it; None where there is none."""
    for name in CAPTIONS:
        if isinstance(facts.get(name), str):
            return str(facts[name]).strip()
    return None


def line_of(error: BaseException) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def known_size(facts: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of the stored picture in its metadata, as img2dataset writes them; None where they are not."""
    width, height = facts.get("width"), facts.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


def size_of(pictures: Pictures, index: int) -> tuple[int, int]:
    """(width, height) of a picture, from its metadata where they tell, else from its header; raises as `data` does."""
    return known_size(pictures.facts(index)) or size_in(pictures.data(index))


def read(
    pictures: Pictures, index: int, least: tuple[int, int] | None = None, need_caption: bool = True
) -> tuple[np.ndarray, str] | None:
    """Pixels (H, W, 3) uint8 and caption of a picture, or None where it is broken, which the report then says."""
    try:
        caption = caption_in(pictures.facts(index))
        if caption is None and need_caption:
            raise ValueError("no caption")
        pixels = decode(pictures.data(index), least)
    except (ValueError, OSError) as error:
        pictures.report.note_broken(pictures.name(index), line_of(error))
        return None
    pictures.report.read += 1
    return pixels, caption or ""


def substitutes(index: int, members: int, seed: int) -> Iterator[int]:
    """Numbers below `members` to try in place of `index`, the same in every run; a hundred, then no more."""
    generator = np.random.default_rng([seed, index, members])
    for _ in range(100):
        yield int(generator.integers(members))


def check_usable(pictures: Pictures, need_caption: bool = True) -> None:
    """ValueError, in one line, where the set is empty or none of a few spread over it can be read."""
    if not len(pictures):
        raise ValueError(f"data={str(pictures.path)!r}: no pictures in this {pictures.kind}{_why(pictures)}")
    tried = sorted({int(index) for index in np.linspace(0, len(pictures) - 1, TRIED)})
    for index in tried:
        try:
            if need_caption and caption_in(pictures.facts(index)) is None:
                raise ValueError("no caption")
            decode(pictures.data(index))
        except (ValueError, OSError) as error:
            pictures.report.note_broken(pictures.name(index), line_of(error))
        else:
            return
    raise ValueError(f"data={str(pictures.path)!r}: none of {len(tried)} pictures tried can be used{_why(pictures)}")


def _why(pictures: Pictures) -> str:
    reasons = [*pictures.report.shards.items(), *pictures.report.broken.items()]
    return f"; {reasons[0][0]}: {reasons[0][1]}" if reasons else ""


class Joined:
    """Several sets as one, in the order given."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        self.parts = list(parts)
        self.path = self.parts[0].path
        self.kind = " and ".join(dict.fromkeys(part.kind for part in self.parts))
        self.report = self.parts[0].report
        for part in self.parts[1:]:
            self.report.merge(part.report)
            part.report = self.report
        self.near = max(part.near for part in self.parts)
        self._ends = np.cumsum([len(part) for part in self.parts])

    def _place(self, index: int) -> tuple[Pictures, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        part, inside = self._place(index)
        return part.name(inside)

    def data(self, index: int) -> bytes:
        part, inside = self._place(index)
        return part.data(inside)

    def facts(self, index: int) -> dict[str, Any]:
        part, inside = self._place(index)
        return part.facts(inside)
