"""What a set is like in numbers: sizes, aspect ratios, lengths of captions, scores; as a table and as plots.

Works on a set of pictures or on LAION's lists (Parquet without pictures).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sfumato.train.data.columns import NAMES, TEXTS, frame_of, plain_facts, source_of
from sfumato.train.data.pictures import Pictures, line_of, size_of

SCORES = ("aesthetic", "similarity", "pwatermark", "punsafe")
MEASURES = ("width", "height", "aspect ratio", "caption characters", "caption words", *SCORES)
PERCENTS = (1, 5, 25, 50, 75, 95, 99)
BINS = 40


def measured(pictures: Pictures) -> dict[str, np.ndarray]:
    """MEASURES of each picture as float64 (n,), NaN where it has none; sizes are those of the stored picture."""
    numbers = tqdm(range(len(pictures)), desc="measuring", unit="pictures", leave=False, disable=None)
    rows = [_measures(pictures, index) for index in numbers]
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64) for name in MEASURES}


def _measures(pictures: Pictures, index: int) -> dict[str, float]:
    try:
        facts, (width, height) = pictures.facts(index), size_of(pictures, index)
    except (ValueError, OSError) as error:
        pictures.report.note_broken(pictures.name(index), line_of(error))
        return {}
    plain = plain_facts(facts)
    found = {"width": width, "height": height, "aspect ratio": width / height}
    if plain["caption"] is not None:
        found |= {"caption characters": len(plain["caption"]), "caption words": len(plain["caption"].split())}
    return found | {name: plain[name] for name in SCORES if plain[name] is not None}


def measured_tables(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """MEASURES of the rows of LAION's lists, as `measured`; sizes are those that the list tells."""
    pieces = [_of_table(path) for path in paths]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in MEASURES}


def _of_table(path: Path) -> dict[str, np.ndarray]:
    frame = frame_of(path)
    found = {name: np.full(len(frame), np.nan) for name in MEASURES}
    for name in NAMES:
        column = source_of(name, frame.columns)
        if column is not None and name in found and name not in TEXTS:
            found[name] = _numbers(frame[column])
    caption = source_of("caption", frame.columns)
    if caption is not None:
        found["caption characters"] = _numbers(frame[caption].str.len_chars())
        found["caption words"] = _numbers(frame[caption].str.strip_chars().str.split(" ").list.len())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found["width"] / found["height"]
    found["aspect ratio"] = np.where(np.isfinite(ratio), ratio, np.nan)
    return found


def _numbers(series: Any) -> np.ndarray:
    """A polars column as float64, NaN where it has no number."""
    return np.array([np.nan if value is None else float(value) for value in series.to_list()], dtype=np.float64)


def summary(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Count, extremes, mean, percentiles and histogram of every measure that some picture has."""
    told: dict[str, Any] = {}
    for name, values in found.items():
        known = values[np.isfinite(values)]
        if not len(known):
            continue
        counts, edges = np.histogram(known, bins=BINS)
        told[name] = {
            "count": len(known),
            "missing": len(values) - len(known),
            "least": float(known.min()),
            "mean": float(known.mean()),
            "most": float(known.max()),
            "percentiles": {str(p): float(v) for p, v in zip(PERCENTS, np.percentile(known, PERCENTS), strict=True)},
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }
    return told


def lines(told: Mapping[str, Any]) -> list[str]:
    """A summary for people, one line a measure."""
    head = f"{'':20}{'count':>12}{'least':>10}{'5 %':>10}{'median':>10}{'95 %':>10}{'most':>10}"
    rows = []
    for name, one in told.items():
        values = (one["least"], *(one["percentiles"][p] for p in ("5", "50", "95")), one["most"])
        rows.append(f"{name:20}{one['count']:>12,}" + "".join(f"{value:>10.4g}" for value in values))
    return [head, *rows]


def write_statistics(found: Mapping[str, np.ndarray], told: Mapping[str, Any], out: str | Path) -> list[Path]:
    """`statistics.json` and, where matplotlib is installed, a PNG for each measure and one for sizes."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "statistics.json"
    table.write_text(json.dumps(told, indent=2), "utf-8")
    return [table, *(_plots(found, told, folder) if can_plot() else ())]


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _plots(found: Mapping[str, np.ndarray], told: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    from matplotlib.figure import Figure

    for name, one in told.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=name, ylabel="pictures")
        edges = one["histogram"]["edges"]
        axes.stairs(one["histogram"]["counts"], edges, fill=True)
        axes.axvline(one["percentiles"]["50"], color="black", linestyle=":", label="median")
        axes.legend()
        path = folder / f"{name.replace(' ', '-')}.png"
        figure.savefig(path, dpi=100)
        yield path
    known = np.isfinite(found["width"]) & np.isfinite(found["height"])
    if known.any():
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="width", ylabel="height")
        *_, drawn = axes.hist2d(found["width"][known], found["height"][known], bins=BINS, cmin=1)
        figure.colorbar(drawn, label="pictures")
        figure.savefig(folder / "sizes.png", dpi=100)
        yield folder / "sizes.png"
