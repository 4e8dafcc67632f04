"""A path -> the set of captioned pictures that it is."""

from __future__ import annotations

from pathlib import Path

from sfumato.train.data.listed import Folder, Lines, Table
from sfumato.train.data.pictures import Joined, Pictures, check_usable
from sfumato.train.data.shards import Shards

LISTS = ("metadata.jsonl", "metadata.parquet")  # imagefolder's


def open_pictures(*paths: str | Path, need_captions: bool = True) -> Pictures:
    """The pictures of a path, several as one set: shards, a captioned folder, JSON lines or Parquet.

    A few pictures are read at once: ValueError, in one line, where a path is none of these, the set is empty, or none
    of those tried can be used. What is wrong with others is in `.report` when they are read; `.kind` says what it is.
    """
    if not paths:
        raise ValueError("data: no path is given")
    parts = [_opened(Path(path)) for path in paths]
    for part in parts:
        check_usable(part, need_captions)
    return parts[0] if len(parts) == 1 else Joined(parts)


def _opened(path: Path) -> Pictures:
    if not path.exists():
        raise ValueError(f"data={str(path)!r}: no such file or folder")
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".tar":
        return Shards(path, [path])
    if path.suffix in (".jsonl", ".ndjson"):
        return Lines(path)
    if path.suffix == ".parquet":
        return Table(path)
    raise ValueError(f"data={str(path)!r}: a folder, .tar, .jsonl or .parquet is needed")


def _in_folder(path: Path) -> Pictures:
    """Shards before lists before plain pictures: shards have lists and plain pictures beside them, never within."""
    if shards := sorted(path.glob("*.tar")):
        return Shards(path, shards)
    for name in LISTS:
        if (path / name).is_file():
            return _opened(path / name)
    pictures = Folder(path)
    lists = sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")])
    if len(pictures) or not lists:
        return pictures
    if len(lists) > 1:
        raise ValueError(f"data={str(path)!r}: {len(lists)} lists and no pictures; name one, such as {lists[0].name}")
    return _opened(lists[0])
