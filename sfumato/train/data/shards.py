"""Pictures in tar files as img2dataset writes them: key.jpg, key.txt, key.json in 00000.tar, 00001.tar, ...

A shard's table of contents is read when the shard is first used, its count from 00000_stats.json where that is there.
Shards of other makers (WebDataset) are read as well: a picture of any kind, and beside it .txt or .json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sfumato.train.data.decoding import SUFFIXES
from sfumato.train.data.pictures import caption_in, line_of
from sfumato.train.data.report import Report
from sfumato.train.data.tar_index import Damaged, members

KEPT = 1000  # tables of contents in memory: 1.5 MB each for shards of 10,000


@dataclass(frozen=True)
class Contents:
    """One shard's keys, and offset and size of each picture, .txt and .json in `places` (n, 3, 2), -1 where none."""

    keys: list[str]
    suffixes: list[str]
    places: np.ndarray


def contents_of(shard: Path, report: Report) -> Contents:
    """The pictures of a shard, in its own order. What is unreadable is noted, what came before it is kept."""
    places: dict[str, list[tuple[int, int]]] = {}
    suffixes: dict[str, str] = {}
    try:
        for name, offset, size in members(shard):
            key, _, suffix = name.rpartition(".")
            suffix = f".{suffix.lower()}"
            column = 0 if suffix in SUFFIXES else {".txt": 1, ".json": 2}.get(suffix)
            if column is None:
                continue
            places.setdefault(key, [(-1, -1)] * 3)[column] = (offset, size)
            if column == 0:
                suffixes[key] = suffix
    except (Damaged, OSError) as error:
        report.note_shard(str(shard), line_of(error))
    keys = [key for key in places if key in suffixes]
    table = np.array([places[key] for key in keys], dtype=np.int64).reshape(-1, 3, 2)
    return Contents(keys, [suffixes[key] for key in keys], table)


def stated_count(shard: Path) -> int | None:
    """How many pictures img2dataset says that it put into a shard; None where it does not say."""
    path = shard.with_name(f"{shard.stem}_stats.json")
    try:
        count = json.loads(path.read_text("utf-8")).get("successes")
    except (OSError, ValueError, AttributeError):  # the count is then taken from the shard itself
        return None
    return count if type(count) is int and count >= 0 else None


class Shards:
    """The pictures of some tar files. ValueError where there is no file."""

    kind = "set of shards"

    def __init__(self, path: str | Path, shards: Sequence[str | Path]) -> None:
        self.path = Path(path)
        self.report = Report()
        self.shards = [Path(shard) for shard in shards]
        self._contents: dict[int, Contents] = {}
        self._ends = np.cumsum(
            [self._count(number) for number in tqdm(range(len(self.shards)), desc="shards", leave=False, disable=None)]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables of contents: a worker reads those that it needs."""
        return self.__dict__ | {"_contents": {}}

    def _count(self, number: int) -> int:
        stated = stated_count(self.shards[number])
        return len(self.contents(number).keys) if stated is None else stated

    def contents(self, number: int) -> Contents:
        """The table of contents of a shard by its number."""
        found = self._contents.pop(number, None) or contents_of(self.shards[number], self.report)
        self._contents[number] = found  # now the last one used
        if len(self._contents) > KEPT:
            del self._contents[next(iter(self._contents))]
        return found

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the shard, number in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def _bytes(self, index: int, column: int) -> bytes | None:
        number, inside = self._place(index)
        contents = self.contents(number)
        if inside >= len(contents.keys):
            why = self.report.shards.get(str(self.shards[number]), "it holds fewer pictures than its stats.json says")
            raise ValueError(f"lost with its shard ({why})")
        offset, size = contents.places[inside, column]
        if offset < 0:
            return None
        with self.shards[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    @property
    def near(self) -> int:
        """A shard's pictures, where there are more shards than tables of contents are kept."""
        return -(-len(self) // len(self.shards)) if len(self.shards) > KEPT else 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        number, inside = self._place(index)
        contents = self.contents(number)
        if inside >= len(contents.keys):
            return f"{self.shards[number]}: number {inside}"
        return f"{self.shards[number]}: {contents.keys[inside]}{contents.suffixes[inside]}"

    def data(self, index: int) -> bytes:
        return self._bytes(index, 0) or b""

    def facts(self, index: int) -> dict[str, Any]:
        stored = self._bytes(index, 2)
        facts = json.loads(stored) if stored else {}
        if not isinstance(facts, dict):
            raise ValueError("its .json holds no table")
        text = self._bytes(index, 1)
        facts["caption"] = caption_in(facts) if text is None else text.decode("utf-8").strip()
        number, inside = self._place(index)
        facts.setdefault("key", Path(self.contents(number).keys[inside]).name)
        return facts
