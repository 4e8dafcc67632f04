"""The names under which LAION, img2dataset and imagefolder keep the same facts, and tables of them (polars).

polars is read when it is first needed, so that training without tables does without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILES = ("file_name", "image_path", "path", "image", "file", "filename")  # imagefolder's first

# Our name -> those in use, the best first: img2dataset's `width` is that of the stored picture, LAION's `WIDTH` and
# img2dataset's `original_width` are those before it was made smaller, which is what SD's sets were chosen by.
NAMES: Mapping[str, tuple[str, ...]] = {
    "url": ("url", "URL"),
    "caption": ("caption", "TEXT", "text"),
    "width": ("original_width", "WIDTH", "width"),
    "height": ("original_height", "HEIGHT", "height"),
    "similarity": ("similarity", "SIMILARITY"),
    "punsafe": ("punsafe", "PUNSAFE"),
    "pwatermark": ("pwatermark", "PWATERMARK"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "AESTHETIC"),
    "language": ("language", "LANGUAGE"),
}
TEXTS = ("url", "caption", "language")


def table_library() -> Any:
    """The module polars; ValueError where it is not installed."""
    try:
        import polars
    except ImportError as error:
        raise ValueError('polars is needed for tables: pip install "sfumato[data]"') from error
    return polars


def frame_of(path: str | Path) -> Any:
    """A Parquet file's rows as a polars frame; ValueError names a file that is none."""
    polars = table_library()
    try:
        return polars.read_parquet(path)
    except (polars.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"data={str(path)!r}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def source_of(name: str, present: Iterable[str]) -> str | None:
    """Which of the columns that are there holds the fact `name` of NAMES; None where none does."""
    there = set(present)
    return next((column for column in NAMES[name] if column in there), None)


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of one picture by the names of NAMES; numbers as float, None where there is none."""
    found: dict[str, Any] = {}
    for name in NAMES:
        column = source_of(name, facts)
        value = None if column is None else facts[column]
        if name in TEXTS:
            found[name] = value if isinstance(value, str) else None
        else:
            found[name] = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return found
