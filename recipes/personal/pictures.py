"""The pictures that the five trainings learn from and are measured with, as captioned folders.

Five of the character and ten held out; the same five captioned for a word that is to be learned; pictures of the box's
sets in one style, whose captions do not say so; pictures and hints for edges. Nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.personal.creature import HELD, SUBJECT, creature, write
from sfumato.train.data import open_pictures
from sfumato.train.data.decoding import decode

SAID = {"3d", "render", "flat", "icon", "cartoon", "sticker", "style"}  # words that tell a style
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A picture (H, W, 3) uint8 of the box's sets, its caption, and what it shows."""

    pixels: np.ndarray
    caption: str
    thing: str
    style: str


def says_style(caption: str) -> bool:
    """Whether a caption tells the style: `3d cat, pink background` does."""
    return bool(SAID & set(caption.lower().replace(",", " ").split()))


def chosen(folder: Path, count: int, wanted: Callable[[Facts], bool]) -> list[Sample]:
    """`count` pictures of a set of shards, evenly spread over those wanted that show one thing alone.

    ValueError where there are fewer.
    """
    pictures = open_pictures(folder)
    facts = [pictures.facts(index) for index in range(len(pictures))]
    found = [index for index, each in enumerate(facts) if "relation" not in each and wanted(each)]
    if len(found) < count:
        raise ValueError(f"data={str(folder)!r}: {len(found)} such pictures, {count} are needed")
    spread = [found[place * len(found) // count] for place in range(count)]
    return [
        Sample(decode(pictures.data(i)), str(facts[i]["caption"]), str(facts[i]["thing"]), str(facts[i]["style"]))
        for i in spread
    ]


def write_character(out: Path, size: int) -> None:
    """`subject` and `held`, captioned in full; `word`, the subject again, whose captions name the background alone."""
    for name, poses in (("subject", SUBJECT), ("held", HELD)):
        write(out / name, [(creature(pose, size), pose.caption) for pose in poses])
    write(out / "word", [(creature(pose, size), f"{pose.background} background") for pose in SUBJECT])


def write_style(out: Path, data: Path, style: str, count: int) -> list[Sample]:
    """`style`: pictures in one style, captions that do not tell it; returns them."""
    samples = chosen(data, count, lambda facts: facts["style"] == style and not says_style(facts["caption"]))
    write(out / "style", [(sample.pixels, sample.caption) for sample in samples])
    return samples


def write_edges(out: Path, data: Path, count: int) -> None:
    """`edges`: pictures to learn from, all styles."""
    samples = chosen(data, count, lambda facts: True)
    write(out / "edges", [(sample.pixels, sample.caption) for sample in samples])
