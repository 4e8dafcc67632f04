"""The table of figures in docs/personalising.md, written from the JSON of the reports, so that neither goes stale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path("docs/personalising.md")
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
HEAD = "| | minutes of one core | measured | before | after | at best |\n|---|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Line:
    """A measure's name, and where its figures lie: before, after, and of real pictures where there are such."""

    name: str
    before: str
    after: str
    best: str | None = None


def _character(name: str = "", before: str = "before", after: str = "after") -> list[Line]:
    return [
        Line(f"{name}likeness to held-out pictures", f"{before}/judge/likeness", f"{after}/judge/likeness",
             "real/judge/held-out to held-out"),
        Line(f"{name}recognised among other things", f"{before}/judge/recognised", f"{after}/judge/recognised"),
        Line(f"{name}the same, by EfficientNet", f"{before}/efficientnet-lite0/recognised",
             f"{after}/efficientnet-lite0/recognised"),
    ]  # fmt: skip


def _others(first: str = "other things/right before", then: str = "other things/right after") -> Line:
    return Line("other things right, by the judge", first, then)


def _class(name: str, run: str) -> list[Line]:
    by_judge, same = "class/penguin by the judge", "class/cosine to before, same seeds"
    taken = "class/judge/recognised"
    return [
        *_character(f"{name}: ", "before/subject", f"{run}/subject"),
        Line(f"{name}: the class, by the judge", f"before/{by_judge}", f"{run}/{by_judge}"),
        Line(f"{name}: the class taken for the subject", f"before/{taken}", f"{run}/{taken}"),
        Line(f"{name}: the class's pictures, cosine to before", f"before/{same}", f"{run}/{same}"),
    ]


LINES: Mapping[str, list[Line]] = {
    "lora": [*_character(), _others()],
    "inversion": [*_character(), _others()],
    "dreambooth": [*_class("with the class", "with the class beside"), *_class("alone", "alone")],
    "style": [
        Line("pictures in the style, by the judge", "before/styles/3d", "after/styles/3d"),
        _others("before/things right", "after/things right"),
    ],
    "edges": [
        Line("F1 of edges, within 2 px", "without control/f1", "with control/f1", "autoencoder alone/f1"),
        _others("without control/things right", "with control/things right"),
    ],
}


def figure(found: Mapping[str, Any], path: str | None) -> str:
    """The number at a/b/c, with two digits behind the point; nothing where the path is None."""
    if path is None:
        return ""
    value: Any = found
    for name in path.split("/"):
        value = value[name]
    return f"{value:.2f}"


def table(folder: Path) -> str:
    """Lines of Markdown, of the kinds whose JSON lies in `folder`; behind them their contact sheets."""
    rows = []
    for kind, lines in LINES.items():
        path = folder / f"{kind}.json"
        if not path.exists():
            continue
        told = json.loads(path.read_text("utf-8"))
        minutes = " + ".join(f"{run['core seconds'] / 60:.1f}" for run in told["trained"])
        for number, line in enumerate(lines):
            first = f"{kind} | {minutes}" if number == 0 else " | "
            cells = [figure(told["figures"], each) for each in (line.before, line.after, line.best)]
            rows.append(f"| {first} | {line.name} | {' | '.join(cells)} |\n")
    sheets = [f"\n![{kind}](personal/{kind}.png)\n" for kind in LINES if (folder / f"{kind}.png").exists()]
    return HEAD + "".join(rows + sheets)


def update(page: Path, folder: Path) -> None:
    """Write the table into a page, between its two marks; ValueError where it has none."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"page={str(page)!r}: {BEGIN.strip()} and {END.strip()} are needed once each")
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table(folder) + "\n" + END + rest.split(END)[1], encoding="utf-8")
