"""Seconds from the command to the saved picture with the model in the box, and where they go.

`python benchmarks/picture_seconds.py` prints a table and writes JSON to benchmarks/results/. Whole processes are timed
from outside, five times; the median counts, and the spread is shown because machines are noisy.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from sfumato.pipeline import Pipeline

RUNS = 5
PROMPT = "a red apple on a white background"
RESULTS = Path(__file__).parent / "results"


def seconds_of(command: list[str]) -> list[float]:
    """Wall seconds of RUNS whole processes, after one that is not counted."""
    taken = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return taken[1:]


def inside() -> dict[str, list[float]]:
    """Seconds of loading and of drawing in this process."""
    figures: dict[str, list[float]] = {"load": [], "draw 1": [], "draw 8": []}
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        pipe = Pipeline.from_pretrained()
        figures["load"].append(time.perf_counter() - began)
        for count in (1, 8):
            figures[f"draw {count}"].append(pipe(PROMPT, count=count).seconds)
    return {name: values[1:] for name, values in figures.items()}


def main() -> None:
    """Measure, print, keep."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sfumato.cli.main", "txt2img", "--prompt", PROMPT, "--outdir", folder]
        figures = {"command to picture": seconds_of(command)} | inside()
    rows = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }
    for name, row in rows.items():
        print(f"{name:20} {row['median']:6.2f} s   ({row['min']:.2f} to {row['max']:.2f})")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"picture_seconds-{date.today().isoformat()}.json"
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    path.write_text(json.dumps({"machine": machine, "seconds": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
