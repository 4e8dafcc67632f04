"""What each way to compute less saves, and how far its pictures are from the exact ones: docs/fewer-operations.md.

`python benchmarks/fewer_operations.py` draws 8 prompts with the model in the box, exactly and in every way in turn, in
one process; prints a table, writes JSON to benchmarks/results/ and a figure to docs/. Seconds are the processor's, so
that other programs count little. `--student FILE` adds what `sfumato train consistency` made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sfumato.evaluate.features import Network, open_features
from sfumato.evaluate.resizing import resized
from sfumato.images import grid, save_png
from sfumato.memory.allocator import keep_freed_memory
from sfumato.pipeline import Pipeline
from sfumato.types import Job

HERE = Path(__file__).parent
PROMPTS = (
    "a red apple on a white background", "3d octopus on a blue background", "a cartoon cat on a yellow background",
    "flat rocket on a black background", "a guitar", "3d hamburger on a pink background", "sticker of a sunflower",
    "a cartoon penguin on a light blue background",
)  # fmt: skip


class Way(NamedTuple):
    """A method at one strength: the fields of a Job that it changes."""

    method: str
    strength: str
    fields: dict[str, Any]


EXACT = Way("exact", "", {})
WAYS = (
    *(Way("fewer steps", f"{steps} steps", {"steps": steps}) for steps in (20, 15, 10, 6)),
    *(Way("reuse, depth 1", f"N={every}", {"reuse": f"{every}"}) for every in (2, 3, 5)),
    *(Way("reuse, depth 3", f"N={every}", {"reuse": f"{every}:3"}) for every in (2, 3, 5)),
    *(Way("token merging", f"{ratio:g}", {"tome": ratio}) for ratio in (0.25, 0.5, 0.75)),
    *(Way("guidance ends", f"at {end:g}", {"guidance_end": end}) for end in (0.75, 0.5, 0.25)),
)


def student_ways(student: Path) -> tuple[Way, ...]:
    """A distilled model's, and beside them its teacher in as few steps."""
    taught = {"guidance": 1.0, "behind": f" <lora:{student.stem}:1>"}
    steps = (1, 2, 4, 8)
    return (
        *(Way("distilled, lcm", f"{n} steps", {"sampler": "lcm", "steps": n, **taught}) for n in steps),
        *(Way("distilled, tcd", f"{n} steps", {"sampler": "tcd", "steps": n, **taught}) for n in steps),
        *(Way("teacher, ddim", f"{n} steps", {"sampler": "ddim", "steps": n}) for n in steps[1:]),
    )


def draw(pipe: Pipeline, way: Way, prompt: str, seed: int) -> tuple[np.ndarray, float]:
    """One picture (H, W, 3) uint8 and the seconds of the processor that it took."""
    fields = dict(way.fields)
    job = Job(prompt + fields.pop("behind", ""), seed=seed, **fields)
    began = time.process_time()
    result = pipe.draw(job)
    return result.images[0], time.process_time() - began


def distances(features: Network | None, pictures: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Means over pictures (B, H, W, 3) uint8: levels of difference, and 1 - cosine of the features."""
    found = {"levels": float(np.abs(pictures.astype(np.int16) - exact).mean())}
    if features is not None:
        one, other = (features(resized(list(each), features.size)) for each in (pictures, exact))
        found["features"] = float(1 - torch.cosine_similarity(one, other, dim=1).mean())
    return found


def measured(
    pipe: Pipeline, ways: Sequence[Way], prompts: Sequence[str], features: Network | None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Every way on every prompt, each prompt's exact picture first: a row for each way, and all pictures in order."""
    drawn: list[list[np.ndarray]] = [[] for _ in (EXACT, *ways)]
    seconds: list[list[float]] = [[] for _ in drawn]
    for way in (EXACT, *ways):  # what is only done once is not counted
        draw(pipe, way, prompts[0], 0)
    for seed, prompt in enumerate(tqdm(prompts, disable=None)):
        for number, way in enumerate((EXACT, *ways)):
            picture, taken = draw(pipe, way, prompt, seed)
            drawn[number].append(picture)
            seconds[number].append(taken)
    rows = []
    for number, way in enumerate((EXACT, *ways)):
        ratios = [one / other for one, other in zip(seconds[0], seconds[number], strict=True)]
        row = {
            "method": way.method,
            "strength": way.strength,
            "seconds": statistics.median(seconds[number]),
            "times as fast": statistics.median(ratios),
            "from": min(ratios),
            "to": max(ratios),
        }
        rows.append(row | distances(features, np.stack(drawn[number]), np.stack(drawn[0])))
    return rows, np.stack([picture for row in drawn for picture in row])


def draw_figure(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Distance against speed, a line for each method."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("levels", "features") if kind in rows[0]]
    figure = Figure(figsize=(5.5 * len(kinds), 4.5), layout="constrained")
    labels = {"levels": "mean difference, levels of 255", "features": "1 - cosine of features"}
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows[1:]):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["times as fast"])
            axes.plot([row["times as fast"] for row in own], [row[kind] for row in own], marker="o", label=method)
        axes.set_xlabel("times as fast as exact")
        axes.set_ylabel(labels[kind])
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="another model than the box")
    parser.add_argument("--student", type=Path, help="an adapter that sfumato train consistency made of it")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many (default: %(default)s)")
    parser.add_argument("--features", default="mobilenet-v2", help="what sees differences; none: pixels alone")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "fewer-operations.png")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--sheet", type=Path, help="a PNG of all pictures, a row for each way")
    args = parser.parse_args()
    keep_freed_memory()
    features = None if args.features == "none" else open_features(args.features)
    pipe = Pipeline.from_pretrained(args.ckpt, adapters=None if args.student is None else args.student.parent)
    ways = (*WAYS, *(() if args.student is None else student_ways(args.student)))
    rows, pictures = measured(pipe, ways, PROMPTS[: args.prompts], features)
    for row in rows:
        seen = "".join(f"{row[kind]:10.4f}" for kind in ("levels", "features") if kind in row)
        print(f"{row['method']:18}{row['strength']:10}{row['seconds']:8.2f} s{row['times as fast']:8.2f} x{seen}")
    args.results.mkdir(exist_ok=True, parents=True)
    path = args.results / f"fewer_operations-{date.today().isoformat()}.json"
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    told = {
        "machine": machine,
        "model": pipe.model.hash,
        "prompts": args.prompts,
        "features": args.features,
        "rows": rows,
    }
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    draw_figure(args.figure, rows)
    if args.sheet is not None:
        save_png(args.sheet, grid(pictures, args.prompts))
    print(path, args.figure, file=sys.stderr)


if __name__ == "__main__":
    main()
