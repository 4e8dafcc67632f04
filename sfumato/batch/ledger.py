"""The ledger of a run: which rows of a table are done, on disk after each; pictures that are there whole or not at all.

A line of `rows.jsonl` is a row that is over. Whoever is killed goes on behind the last whole line. Knows no drawing.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sfumato.batch.tables import table_library
from sfumato.images.files import write_png, written_beside

SETTINGS = "batch.json"
JOURNAL = re.compile(r"rows(?:-(\d+)-of-(\d+))?\.jsonl")
HALF = re.compile(r"\.(\d{8})(?:-\d{4})?\.png\..+\.part")
COLUMNS = ("row", "picture", "file", "seed", "sha256", "verdict", "error")


@dataclass(frozen=True)
class Kept:
    """A picture on disk: its file below the run's folder, its seed, the SHA-256 of the file, a checker's verdict."""

    file: str
    seed: int
    sha256: str
    verdict: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What has become of a row: its pictures, or the error for which it has none.

    `mark` says what the row was, `time` when it was put down, in s since 1970; 0 in lines from before there were times.
    """

    row: int
    pictures: tuple[Kept, ...] = ()
    error: str | None = None
    mark: str = ""
    time: float = 0.0


def keep_picture(folder: Path, file: str, image: np.ndarray, made: Mapping[str, Any]) -> str:
    """Write (H, W, 3) uint8 with its recipe as a PNG that outlasts a power cut; returns the file's SHA-256."""
    written = io.BytesIO()
    write_png(written, image, made)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside, beside.open("wb") as out:
        out.write(written.getbuffer())
        _sync(out)
    _sync_folder(path.parent)
    return hashlib.sha256(written.getbuffer()).hexdigest()


class Ledger:
    """The rows of a shard (i, n) that are over, in a run's folder, which one process at a time holds.

    `settings` is what decides the pictures beside the rows, `marks` tells the run's rows from others: a folder that was
    begun with something else is refused, one that does not know a setting was begun with that of `usual`; a row that
    failed and was mended is not over, nor with `retry` any that failed. ValueError where another holds the shard.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        marks: Mapping[int, str],
        shard: tuple[int, int] = (1, 1),
        retry: bool = False,
        usual: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.marks = folder, marks
        folder.mkdir(parents=True, exist_ok=True)
        self._settle(settings, usual or {})
        name = "rows.jsonl" if shard[1] == 1 else f"rows-{shard[0]}-of-{shard[1]}.jsonl"
        self._check_others(shard)
        self._file = _held(folder / name)
        whole = _whole(self._file)
        self._file.truncate(whole)  # the line at which a process was killed
        self._file.seek(whole)
        self.done: set[int] = set()
        self.failed = 0  # rows of this run
        for outcome in outcomes(folder, marks):
            self._note(outcome, retry)
        self._sweep(shard)

    def put(self, outcome: Outcome) -> None:
        """A row is over; once this returns, it is so after a power cut too. Its pictures lie there already."""
        outcome = replace(outcome, mark=self.marks[outcome.row], time=time.time())
        self._file.write(json.dumps(asdict(outcome)).encode() + b"\n")
        _sync(self._file)
        self.done.add(outcome.row)
        self.failed += outcome.error is not None

    def close(self) -> None:
        """Let another process have the shard."""
        self._file.close()

    def _note(self, outcome: Outcome, retry: bool) -> None:
        """One of the rows that are over; ValueError where it was drawn as something else."""
        mark = self.marks.get(outcome.row)
        if mark is None:  # another shard's, or beyond the limit
            return
        if outcome.error is not None:
            if retry or outcome.mark != mark:
                return
            self.failed += 1
        elif outcome.mark != mark:
            raise ValueError(
                f"row={outcome.row}: {str(self.folder)!r} has its picture as it was before the row was changed; "
                "another folder is needed"
            )
        self.done.add(outcome.row)

    def _settle(self, settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
        """Note what decides the pictures; ValueError where the folder was begun with something else."""
        path = self.folder / SETTINGS
        if not path.exists():
            with written_beside(path) as beside:
                beside.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"out={str(self.folder)!r}: its {SETTINGS} is damaged ({error})") from error
        if not isinstance(before, dict):
            raise ValueError(f"out={str(self.folder)!r}: its {SETTINGS} is damaged (an object is needed)")
        for name in {**before, **settings}:
            then = before.get(name, usual.get(name))
            if then != (now := json.loads(json.dumps(settings.get(name)))):
                raise ValueError(
                    f"{name}={now!r}: the pictures in {str(self.folder)!r} were begun with {then!r}; "
                    "the same or another folder is needed"
                )

    def _check_others(self, shard: tuple[int, int]) -> None:
        """ValueError where a run that is split otherwise is at work, whose rows could be ours."""
        for path in self.folder.iterdir():
            found = JOURNAL.fullmatch(path.name)
            if found is not None and int(found[2] or 1) != shard[1]:
                _held(path).close()

    def _sweep(self, shard: tuple[int, int]) -> None:
        """Remove the half files of a process that was killed, of this shard's rows."""
        for place in (path for path in self.folder.iterdir() if re.fullmatch(r"\d{5,}", path.name)):
            for path in place.iterdir():
                found = HALF.fullmatch(path.name)
                if found is not None and int(found[1]) % shard[1] == shard[0] - 1:
                    path.unlink(missing_ok=True)


def outcomes(folder: Path, marks: Mapping[int, str] | None = None) -> list[Outcome]:
    """What has become of every row that is over, of all shards, by number.

    Of a row with several: what it is now, by `marks`, before what it was; pictures before an error; then the latest.
    """
    found: dict[int, Outcome] = {}
    marks = marks or {}

    def worth(outcome: Outcome) -> tuple[bool, bool, float]:
        return outcome.mark == marks.get(outcome.row), outcome.error is None, outcome.time

    for path in sorted(path for path in folder.iterdir() if JOURNAL.fullmatch(path.name)):
        lines = path.read_bytes().split(b"\n")[:-1]  # what is behind the last is not whole
        for number, line in enumerate(lines, 1):
            try:
                plain = json.loads(line)
                kept = tuple(Kept(**each) for each in plain["pictures"])
                outcome = Outcome(plain["row"], kept, plain["error"], plain["mark"], float(plain.get("time", 0)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"out={str(path)!r}: line {number} is damaged ({error})") from error
            before = found.get(outcome.row)
            if before is None or worth(outcome) >= worth(before):  # of one file the later line
                found[outcome.row] = outcome
    return [found[row] for row in sorted(found)]


def write_index(folder: Path, parquet: bool, marks: Mapping[int, str] | None = None) -> Path:
    """Write what there is as one table, a line a picture or a row that failed; returns where it is.

    Shards that end together do so one after the other, so that the last one's index has the rows of all.
    """
    path = folder / ("index.parquet" if parquet else "index.jsonl")
    with _alone(folder):
        _write_table(path, parquet, list(_index(outcomes(folder, marks))))
    return path


def _write_table(path: Path, parquet: bool, lines: list[dict[str, Any]]) -> None:
    with written_beside(path) as beside:
        if parquet:
            polars = table_library()
            kinds = {"row": polars.Int64, "picture": polars.Int64, "seed": polars.Int64}
            schema = {name: kinds.get(name, polars.String) for name in COLUMNS}
            for line in lines:
                line["verdict"] = None if line["verdict"] is None else json.dumps(line["verdict"])
            polars.DataFrame(lines, schema=schema).write_parquet(beside)
        else:
            beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")


def _index(found: list[Outcome]) -> Iterator[dict[str, Any]]:
    for outcome in found:
        common = dict.fromkeys(COLUMNS) | {"row": outcome.row, "error": outcome.error}
        if outcome.error is not None:
            yield common
        for index, kept in enumerate(outcome.pictures):
            yield common | {"picture": index, **asdict(kept)}


def _held(path: Path) -> BinaryIO:
    """A file that one process alone holds, however it ends."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"out={str(path.parent)!r}: another run is at work there ({path.name})") from error
    return file


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block that one process of a folder at a time is in; the others wait."""
    with (folder / SETTINGS).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole(file: BinaryIO) -> int:
    """How many bytes of a file are whole lines."""
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
