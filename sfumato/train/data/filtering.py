"""Which pictures of a set stay: the published recipe of Stable Diffusion v1 as presets, and any SQL expression.

Works on tables of facts (polars): LAION's own lists, lazily and file by file, or the metadata in a set of pictures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sfumato.train.data.columns import NAMES, TEXTS, source_of, table_library
from sfumato.train.data.pictures import Pictures, line_of
from sfumato.train.data.writing import check_out

PIECE = 4096  # rows of a set of pictures that are judged together
STAYS = "stays"
WHY = "why a row went"


@dataclass(frozen=True)
class Preset:
    """Conditions in SQL over the names of columns.NAMES, all of which must hold, and what they are known as.

    Those in `optional` are left out where the table has not their column.
    """

    conditions: tuple[str, ...]
    about: str
    optional: tuple[str, ...] = ()


# The model cards of sd-v1-1 ... v1-4 (CompVis 2022) tell what each stage saw; sizes are those of the original pictures.
IMPROVED = Preset(
    ("aesthetic > 5.0", "width >= 512", "height >= 512", "pwatermark < 0.5"),
    "laion-improved-aesthetics: v1-2 and v1-3",
)
PRESETS: Mapping[str, Preset] = {
    "laion2b-en": Preset(
        ("width >= 256", "height >= 256"), "laion2B-en at 256: the first stage of v1-1", ("language = 'en'",)
    ),
    "high-resolution": Preset(("width >= 1024", "height >= 1024"), "laion-high-resolution: the second stage of v1-1"),
    "improved-aesthetics": IMPROVED,
    "aesthetics-v1": IMPROVED,
    "aesthetics-v2-5": Preset(("aesthetic >= 5.0",), "laion-aesthetics v2 5+: v1-4 and v1-5"),
    "aesthetics-v2-6": Preset(("aesthetic >= 6.0",), "laion-aesthetics v2 6+"),
    "aesthetics-v2-6.5": Preset(("aesthetic >= 6.5",), "laion-aesthetics v2 6.5+"),
}


@dataclass
class Outcome:
    """`stay` of `seen` rows; the others by the first condition that they failed, "no VALUE" where it was missing."""

    seen: int = 0
    stay: int = 0
    went: dict[str, int] | None = None

    def add(self, counts: Mapping[str, int]) -> None:
        """More rows: how many stay (under STAYS) and how many went for which reason."""
        self.went = dict(self.went or {})
        for reason, count in counts.items():
            self.seen += count
            if reason == STAYS:
                self.stay += count
            else:
                self.went[reason] = self.went.get(reason, 0) + count

    def lines(self) -> list[str]:
        """For people."""
        share = 100 * self.stay / self.seen if self.seen else 0.0
        told = [f"{self.stay:,} of {self.seen:,} stay ({share:.1f} %)"]
        ordered = sorted((self.went or {}).items(), key=lambda item: -item[1])
        return told + [f"  {count:,} went: {reason}" for reason, count in ordered]


def conditions_of(presets: Sequence[str], where: Sequence[str], present: Iterable[str]) -> list[str]:
    """All conditions that are asked for, in order. ValueError for an unknown preset, or a fact that nothing tells."""
    there = list(present)
    found: list[str] = []
    for name in presets:
        if name not in PRESETS:
            raise ValueError(f"preset={name!r}: one of {', '.join(PRESETS)}")
        preset = PRESETS[name]
        for condition in preset.conditions:
            fact = condition.split()[0]
            if source_of(fact, there) is None:
                raise ValueError(
                    f"preset={name!r}: {condition} cannot be judged, there is no column {' or '.join(NAMES[fact])}"
                )
        kept = [one for one in preset.optional if source_of(one.split()[0], there) is not None]
        found += [*kept, *preset.conditions]
    found += where
    if not found:
        raise ValueError("where=[]: a preset or an expression is needed")
    return list(dict.fromkeys(found))


def judged(frame: Any, presets: Sequence[str], where: Sequence[str], present: Iterable[str]) -> Any:
    """A polars frame, lazy or not, with a column WHY more: STAYS, or the first condition that a row fails.

    An expression of `where` may use the table's own names and, where it has them not, ours.
    """
    polars = table_library()
    there = list(present)
    answer = polars.lit(STAYS)
    borrowed: dict[str, str] = {}
    for condition in reversed(conditions_of(presets, where, there)):
        text = condition
        if condition not in where:
            fact, _, rest = condition.partition(" ")
            text = f'"{source_of(fact, there)}" {rest}'
        holds = _expression(text)
        for name in set(holds.meta.root_names()) - set(there):
            source = source_of(name, there) if name in NAMES else None
            if source is None:
                raise ValueError(f"where={condition!r}: there is no column {name!r}; there are {', '.join(there)}")
            borrowed[name] = source
        unknown = polars.when(holds.is_null()).then(polars.lit(f"{condition}: no value"))
        answer = unknown.when(~holds).then(polars.lit(condition)).otherwise(answer)
    wider = frame.with_columns(polars.col(source).alias(name) for name, source in borrowed.items())
    return wider.with_columns(answer.alias(WHY)).drop(list(borrowed))


def _expression(text: str) -> Any:
    polars = table_library()
    try:
        return polars.sql_expr(text)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"where={text!r}: not understood ({line_of(error)})") from error


def _collected(frame: Any, where: Sequence[str]) -> Any:
    """The rows of a lazy frame; ValueError where an expression does not fit its columns."""
    polars = table_library()
    try:
        return frame.collect(engine="streaming")
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"where={' AND '.join(where)!r}: {line_of(error)}") from error


def _counts(frame: Any, where: Sequence[str]) -> dict[str, int]:
    polars = table_library()
    counted = _collected(frame.select(WHY).group_by(WHY).agg(polars.len().alias("count")), where)
    return {str(row[WHY]): int(row["count"]) for row in counted.iter_rows(named=True)}


def _columns_of(lazy: Any, path: Path) -> list[str]:
    polars = table_library()
    try:
        return list(lazy.collect_schema().names())
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"data={str(path)!r}: not a readable Parquet file ({line_of(error)})") from error


def tables_of(path: str | Path) -> list[Path]:
    """The Parquet files of a path: itself, or those of a folder in order."""
    path = Path(path)
    return [path] if path.is_file() else sorted(path.glob("*.parquet"))


def filter_tables(
    source: str | Path, out: str | Path, presets: Sequence[str] = (), where: Sequence[str] = ()
) -> Outcome:
    """LAION's lists -> the rows that stay. A file gives a file, a folder a folder with files of the same names.

    Rows pass through in pieces, so a list may be larger than memory. Each file is written beside and renamed.
    """
    polars = table_library()
    tables = tables_of(source)
    if not tables:
        raise ValueError(f"data={str(source)!r}: no Parquet files there")
    single = Path(source).is_file()
    if single and Path(out).exists():
        raise ValueError(f"out={str(out)!r}: it is there already")
    folder = Path(out).parent if single else check_out(out)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    for table in tables:
        target = Path(out) if single else folder / table.name
        beside = target.with_name(f".{target.name}.part")
        try:
            lazy = polars.scan_parquet(table)
            frame = judged(lazy, presets, where, _columns_of(lazy, table))
            outcome.add(_counts(frame, where))
            frame.filter(polars.col(WHY) == STAYS).drop(WHY).sink_parquet(beside)
            beside.replace(target)
        except polars.exceptions.PolarsError as error:
            raise OSError(f"{target}: not written ({line_of(error)})") from error
        finally:
            beside.unlink(missing_ok=True)
    return outcome


def chosen_of(
    pictures: Pictures,
    presets: Sequence[str] = (),
    where: Sequence[str] = (),
    more: Mapping[int, Mapping[str, Any]] | None = None,
) -> tuple[list[int], Outcome]:
    """The numbers of the pictures of a set whose facts hold, and how many went for which reason.

    `more` has facts to add, such as scores. What cannot be read goes, for the reason "unreadable".
    """
    chosen: list[int] = []
    outcome = Outcome()
    names: dict[str, None] = {}  # those of the pieces so far, in order
    for start in tqdm(range(0, len(pictures), PIECE), desc="judging", unit="pieces", leave=False, disable=None):
        piece: list[tuple[int, dict[str, Any]]] = []
        for index in range(start, min(start + PIECE, len(pictures))):
            try:
                piece.append((index, pictures.facts(index) | dict((more or {}).get(index, {}))))
            except (ValueError, OSError) as error:
                pictures.report.note_broken(pictures.name(index), line_of(error))
                outcome.add({"unreadable": 1})
        names |= dict.fromkeys(name for _, facts in piece for name in facts)
        whys = _judged_facts([facts for _, facts in piece], list(names), presets, where)
        outcome.add(Counter(whys))
        chosen += [index for (index, _), why in zip(piece, whys, strict=True) if why == STAYS]
    return chosen, outcome


def _judged_facts(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], presets: Sequence[str], where: Sequence[str]
) -> list[str]:
    """STAYS, or why it goes, of each row; a fact that a row has not is missing."""
    polars = table_library()
    frame = polars.DataFrame({name: _series(name, [row.get(name) for row in rows]) for name in names})
    found: list[str] = _collected(judged(frame.lazy(), presets, where, names).select(WHY), where)[WHY].to_list()
    return found


def _series(name: str, values: list[Any]) -> Any:
    """A column of facts; where kinds are mixed, numbers win for numbers of ours, else all is text."""
    polars = table_library()
    if (name in NAMES and name not in TEXTS) or all(_is_number(value) for value in values):
        numbers = [float(value) if _is_number(value) and value is not None else None for value in values]
        return polars.Series(name, numbers, dtype=polars.Float64)
    plain = [value if value is None or isinstance(value, str) else json.dumps(value, default=str) for value in values]
    return polars.Series(name, plain, dtype=polars.String)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
