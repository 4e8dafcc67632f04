"""Pictures that lie as files: in a folder with their captions beside, or listed in JSONL or Parquet.

A list's lines are found when it is opened and understood when they are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.train.data.columns import FILES, frame_of
from sfumato.train.data.decoding import SUFFIXES
from sfumato.train.data.pictures import caption_in
from sfumato.train.data.report import Report


def pictures_under(folder: Path) -> list[str]:
    """Paths below a folder, relative to it, of everything with a picture's suffix, sorted; hidden files are not."""
    return sorted(os.path.relpath(path, folder) for path in _walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield f"{place}/{name}"


class Folder:
    """Pictures of a folder and of those in it, each with its caption in the .txt of the same stem; .json is metadata.

    img2dataset's "files" format is one.
    """

    kind = "folder of pictures"
    near = 0

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.report = Report()
        self._names = pictures_under(self.path)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self.path / self._names[index])

    def data(self, index: int) -> bytes:
        return (self.path / self._names[index]).read_bytes()

    def facts(self, index: int) -> dict[str, Any]:
        path = self.path / self._names[index]
        beside, text = path.with_suffix(".json"), path.with_suffix(".txt")
        facts = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        if not isinstance(facts, dict):
            raise ValueError("its .json holds no table")
        facts["caption"] = text.read_text("utf-8").strip() if text.is_file() else caption_in(facts)
        facts.setdefault("key", path.stem)
        return facts


class Lines:
    """A list of JSON lines, each with a picture's path (one of FILES, from the list's folder) and its caption."""

    kind = "list of JSON lines"
    near = 0

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.report = Report()
        starts, place = [], 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(place)
                place += len(line)
        self._starts = np.array(starts, dtype=np.int64)

    def _row(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self._starts[index]))
            row = json.loads(file.readline())
        if not isinstance(row, dict):
            raise ValueError("the line holds no table")
        return row

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        return f"{self.path}, picture {index + 1}"

    def data(self, index: int) -> bytes:
        return (self.path.parent / _file_in(self._row(index))).read_bytes()

    def facts(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        row["caption"] = caption_in(row)
        row.setdefault("key", Path(_file_in(row)).stem)
        return row


class Table:
    """A Parquet file whose rows name picture files (one of FILES, from its folder), with captions and metadata.

    The rows are kept in memory, a worker reads the file anew. ValueError where no column names files.
    """

    kind = "Parquet table"
    near = 0

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.report = Report()
        self._frame: Any = None
        self._length = len(self._rows())
        if not set(FILES) & set(self._rows().columns):
            raise ValueError(
                f"data={str(path)!r}: no column of picture files ({', '.join(FILES)}); "
                "a list of addresses is downloaded first, with img2dataset"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frame": None}

    def _rows(self) -> Any:
        if self._frame is None:
            self._frame = frame_of(self.path)
        return self._frame

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def data(self, index: int) -> bytes:
        return (self.path.parent / _file_in(self._rows().row(index, named=True))).read_bytes()

    def facts(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._rows().row(index, named=True)
        row["caption"] = caption_in(row)
        row.setdefault("key", Path(_file_in(row)).stem)
        return row


def _file_in(row: dict[str, Any]) -> str:
    """The path of a row's picture."""
    for name in FILES:
        if isinstance(row.get(name), str) and row[name]:
            return str(row[name])
    raise ValueError(f"no picture named (one of {', '.join(FILES)} is needed)")
