"""Tables of jobs: Parquet, CSV or JSON lines -> one plain mapping a row, its values of the types that a Job has.

A column is a field of a Job, `hires.scale` and its kin as well. Cells that are empty are not given. Knows no model.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.tasks.plot import SWITCHES, Kind, field_kinds

READERS = (".parquet", ".csv", ".jsonl")
INSTALL = 'pip install "sfumato[data]"'
NESTED = ("hires",)  # fields that hold fields, as JSON
MAX_CELL = 1 << 24  # characters of a cell of CSV
MAX_DEPTH = 16  # lists and objects of JSON within one another
MAX_DIGITS = 300  # of a whole number; what has more is infinite, as it is among fractions
PARTS = re.compile(r'"(?:\\.|[^"\\])*"|[\[\]{}]')


def table_library() -> Any:
    """The module polars; ValueError where it is not installed."""
    try:
        import polars
    except ImportError as error:
        raise ValueError(f"table: Parquet needs polars ({INSTALL})") from error
    return polars


def read_table(path: Path) -> list[dict[str, Any]]:
    """Every row of a table as what it gives, by field. Rows count from 0; a line of names is none.

    ValueError names the file, or the row, field and value that is wrong.
    """
    if path.suffix.lower() not in READERS:
        raise ValueError(f"table={str(path)!r}: a file {', '.join(READERS)} is needed")
    if not path.is_file():
        raise ValueError(f"table={str(path)!r}: {'a folder' if path.is_dir() else 'no such file'}")
    reader = {".parquet": _parquet, ".csv": _csv, ".jsonl": _lines}[path.suffix.lower()]
    kinds = field_kinds()
    rows = [_typed(row, number, kinds) for number, row in enumerate(reader(path))]
    if not rows:
        raise ValueError(f"table={str(path)!r}: it holds no row")
    if "prompt" not in rows[0] and not any("prompt" in row for row in rows):
        raise ValueError(f"table={str(path)!r}: it has no column prompt")
    return rows


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    polars = table_library()
    try:
        frame = polars.read_parquet(path)
    except (OSError, polars.exceptions.PolarsError) as error:
        raise ValueError(f"table={str(path)!r}: not a Parquet file ({str(error).splitlines()[0]})") from error
    yield from frame.iter_rows(named=True)


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            twice = [name for name, times in Counter(reader.fieldnames or ()).items() if name and times > 1]
            if twice:
                raise ValueError(f"table={str(path)!r}: two columns are named {twice[0]!r}")
            for number, row in enumerate(reader):
                if None in row or None in row.values():
                    raise ValueError(f"row={number}: {len(reader.fieldnames or ())} cells are needed, as in line 1")
                yield {name: value for name, value in row.items() if value or name == "prompt"}
    except UnicodeDecodeError as error:
        raise ValueError(f"table={str(path)!r}: not UTF-8 (byte {error.start})") from error
    except csv.Error as error:
        raise ValueError(f"table={str(path)!r}: not CSV ({error})") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"table={str(path)!r}: not UTF-8 (byte {error.start})") from error
    number = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        if (column := _too_deep(line)) is not None:
            raise ValueError(f"row={number}: {column}: more than {MAX_DEPTH} lists and objects within one another")
        try:
            row = json.loads(line, parse_int=_whole)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"row={number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"row={number}: {line[:60]!r}: an object of a job's fields is needed")
        yield row
        number += 1


def _typed(row: Mapping[str, Any], number: int, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """What a row gives, with texts as the types of their fields. ValueError names row, field and value."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if value is None:
            continue
        kind = dict if name in NESTED else kinds[name].type if name in kinds else str
        if kind in (dict, tuple) and isinstance(value, str) and _too_deep(value) is not None:
            raise ValueError(f"row={number}: {name}: more than {MAX_DEPTH} lists and objects within one another")
        try:
            found[name] = _value(value, kind)
        except ValueError:
            what = {dict: "an object as JSON", tuple: "a list as JSON", bool: "true or false"}.get(kind, "a number")
            raise ValueError(f"row={number}: {name}={str(value)[:60]!r}: {what} is needed") from None
    return found


def _value(value: Any, kind: type[Any]) -> Any:
    """A cell as its field has it; ValueError where a text does not stand for such."""
    if isinstance(value, dict):
        return {key: _value(inner, type(inner)) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_value(inner, type(inner)) for inner in value]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # a column of whole numbers with gaps comes as fractions
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        if value.strip().lower() not in SWITCHES:
            raise ValueError(value)
        return SWITCHES[value.strip().lower()]
    if kind is int:
        return int(value)
    if kind is float:
        return float(value)
    found = json.loads(value, parse_int=_whole)  # its error is a ValueError
    if not isinstance(found, dict if kind is dict else list):
        raise ValueError(value)
    return found


def _too_deep(text: str) -> str | None:
    """Where JSON goes too deep, so that nobody reads it: the name before, of the outermost object; else None."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return None
    depth, name = 0, ""
    for part in PARTS.findall(text):
        if part in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return name
        elif part in "]}":
            depth -= 1
        elif depth == 1:
            name = part[1:-1]
    return None


def _whole(digits: str) -> int | float:
    """A whole number of JSON, of any length."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)
