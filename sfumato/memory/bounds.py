"""Bounds: how much is computed at once, and kept. They hold memory down, and decide the last bits of a picture.

So a recipe says those that are not the usual ones. Knows no networks and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf

MAX_ROWS = 32  # of a U-Net call
MAX_PICTURES = 4  # decoded at once


@dataclass(frozen=True)
class Bounds:
    """Rows of a U-Net call, pictures of a decode, query rows of attention; the side in px of tiles in the autoencoder.

    `fast_bytes` is what hastened layers may keep. None is no bound, but a tile of None is the whole picture.
    """

    max_rows: int = MAX_ROWS
    max_pictures: int = MAX_PICTURES
    query_rows: int | None = None
    tile: int | None = None
    fast_bytes: int | None = None

    @property
    def facts(self) -> dict[str, str]:
        """Those that are not the usual ones, as a recipe says them."""
        usual = asdict(Bounds())
        return {name: str(value) for name, value in asdict(self).items() if value != usual[name]}

    def within(self, other: Bounds) -> Bounds:
        """The tighter of each."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        least = {name: min(pair, key=lambda value: inf if value is None else value) for name, pair in pairs.items()}
        return Bounds(**least)


def bounds_of(facts: Mapping[str, str]) -> Bounds:
    """What a recipe's facts say of bounds, the usual ones where they say nothing. ValueError for what is no bound."""
    found: dict[str, int] = {}
    for field in fields(Bounds):
        if (told := facts.get(field.name)) is None:
            continue
        least = 0 if field.name == "fast_bytes" else 1
        if not (told.isascii() and told.isdigit() and int(told) >= least):
            raise ValueError(f"{field.name}={told!r}: a whole number of {least} or more is needed")
        found[field.name] = int(told)
    return Bounds(**found)
