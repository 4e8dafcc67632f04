"""Sets of pictures -> new shards: chosen pictures of any source, as img2dataset would have written them.

A shard is written beside and renamed when it is whole, and stands there with its count and, with polars, its table.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sfumato.train.data.columns import table_library
from sfumato.train.data.decoding import SUFFIXES
from sfumato.train.data.pictures import Pictures, line_of

PER_SHARD = 10_000  # img2dataset's own number


def check_out(out: str | Path) -> Path:
    """A folder to write in; ValueError where it is a file or has something in it, so that no two sets are mixed."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out={str(out)!r}: it is there already; an empty or a new folder is needed")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_shards(
    pictures: Pictures,
    chosen: Iterable[int],
    out: str | Path,
    more: Mapping[int, Mapping[str, Any]] | None = None,
    per_shard: int = PER_SHARD,
) -> int:
    """Copy the `chosen` pictures, bytes as they are, into the folder's 00000.tar, ...; returns how many were written.

    `more` adds facts to pictures. Those that cannot be read are left out and noted in the pictures' report.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard={per_shard}: 1 or more are needed")
    folder, total, number = check_out(out), 0, 0
    readable = _readable(pictures, chosen, more or {})
    while batch := _taken(readable, per_shard):
        total += _write_shard(folder / f"{number:05}.tar", batch, first=total)
        number += 1
    return total


def _readable(
    pictures: Pictures, chosen: Iterable[int], more: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for index in chosen:
        try:
            data, facts = pictures.data(index), pictures.facts(index)
        except (ValueError, OSError) as error:
            pictures.report.note_broken(pictures.name(index), line_of(error))
            continue
        suffix = Path(pictures.name(index)).suffix.lower()
        yield suffix if suffix in SUFFIXES else _suffix_of(data), data, facts | dict(more.get(index, {}))


def _suffix_of(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if data[8:12] == b"WEBP" else ".jpg"


def _taken(
    samples: Iterator[tuple[str, bytes, dict[str, Any]]], count: int
) -> Iterator[tuple[str, bytes, dict[str, Any]]] | None:
    """The next `count` samples one by one, None where there are no more."""
    first = next(samples, None)
    if first is None:
        return None

    def rest() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        yield first
        for _ in range(count - 1):
            sample = next(samples, None)
            if sample is None:
                return
            yield sample

    return rest()


def _write_shard(path: Path, samples: Iterable[tuple[str, bytes, dict[str, Any]]], first: int) -> int:
    beside = path.with_name(f".{path.name}.part")
    rows = []
    try:
        with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, (suffix, data, facts) in enumerate(samples, first):
                key = f"{number:09}"
                facts["key"] = key
                _add(archive, key + suffix, data)
                if isinstance(facts.get("caption"), str):
                    _add(archive, f"{key}.txt", facts["caption"].encode())
                _add(archive, f"{key}.json", json.dumps(facts, ensure_ascii=False, default=str).encode())
                rows.append(facts)
        stats = path.with_name(f"{path.stem}_stats.json")
        stats.write_text(json.dumps({"count": len(rows), "successes": len(rows)}), "utf-8")
        if find_spec("polars"):
            polars = table_library()
            frame = polars.DataFrame(rows, infer_schema_length=None, strict=False)
            frame.write_parquet(path.with_suffix(".parquet"))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(rows)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time and owner stay 0, so that equal sets give equal bytes
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
