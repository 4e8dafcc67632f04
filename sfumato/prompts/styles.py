"""Styles: named pieces of prompt in a styles.csv of A1111's form, put around a prompt by name.

Knows no grammar but comments, which run from a `#` to the end of their line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

FIELDS = ("name", "prompt", "negative_prompt")
PLACE = "{prompt}"
COMMENT = re.compile(r"^#[^\n]*\n?|#[^\n]*", re.MULTILINE)


@dataclass(frozen=True)
class Style:
    """What a style adds to a prompt and to a negative prompt; `{prompt}` in it is where the user's own text goes."""

    name: str
    prompt: str = ""
    negative: str = ""


def strip_comments(text: str) -> str:
    """The text without its comments. A line that is all comment goes with its line break."""
    return COMMENT.sub("", text)


def read_styles(path: Path) -> dict[str, Style]:
    """The styles of a CSV file by name, in order; of equal names the last. Rows without a name or with `#` are skipped.

    The first line names the columns: name, prompt (or `text`, as in old files), negative_prompt. ValueError: others.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"styles={path}: not a CSV file of UTF-8 text ({error})") from None
    styles: dict[str, Style] = {}
    for row in rows:
        if "name" not in row or not ("prompt" in row or "text" in row):
            raise ValueError(f"styles={path}: its first line must name the columns {', '.join(FIELDS)}")
        name = (row["name"] or "").strip()
        if name and not name.startswith("#"):
            prompt = row["prompt"] if "prompt" in row else row["text"]
            styles[name] = Style(name, prompt or "", row.get("negative_prompt") or "")
    return styles


def write_styles(path: Path, styles: Iterable[Style]) -> None:
    """Writes a file that A1111 reads too: UTF-8 with a mark in front, quotes where needed. Never half a file."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows((style.name, style.prompt, style.negative) for style in styles)
    partial.replace(path)


def find_styles(names: Sequence[str], styles: Mapping[str, Style]) -> list[Style]:
    """The named styles in order. ValueError: a name that is not there, with the nearest that are."""
    for name in names:
        if name not in styles:
            near = get_close_matches(name, styles, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(styles)} styles"
            raise ValueError(f"styles={name}: no such style; {hint}")
    return [styles[name] for name in names]


def apply_styles(text: str, additions: Iterable[str]) -> str:
    """A prompt with the styles' own texts in turn: put in at `{prompt}`, else joined with ", ". Comments go first."""
    text = strip_comments(text).strip()
    for addition in additions:
        addition = strip_comments(addition).strip()
        if PLACE in addition:
            text = addition.replace(PLACE, text)
        else:
            text = ", ".join(part for part in (text, addition) if part)
    return text
