"""Loading Stable Diffusion 1.5, side by side with diffusers: seconds to ready and memory, each in a fresh process.

Both read random fp32 weights of true size (4.3 GB, written once into --dir). Processes take turns (A B A B); the median
counts. `resident` is the process's resident memory when loaded, `own` what of it is not a shared map of the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.random_weights import write_random
from sfumato.families import find_family

SFUMATO = """
began = now()
from sfumato.weights.checkpoint import load_model
from sfumato.families import find_family
imported = now()
model = load_model(PATH)
"""
DIFFUSERS = """
began = now()
import torch
from diffusers import StableDiffusionPipeline
imported = now()
model = StableDiffusionPipeline.from_pretrained(PATH, torch_dtype=torch.float32, safety_checker=None)
"""
FRAME = """
import json, resource, sys
from time import perf_counter as now
PATH = sys.argv[1]
{body}
loaded = now()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
kb = lambda name: int(status[name].split()[0])
print(json.dumps({{"import_s": imported - began, "load_s": loaded - imported, "ready_s": loaded - began,
    "resident_gb": kb("VmRSS") / 1e6, "own_gb": kb("RssAnon") / 1e6, "peak_gb": kb("VmHWM") / 1e6}}))
"""


def measure(body: str, path: Path) -> dict[str, float]:
    """One fresh process; its last line is its figures."""
    done = subprocess.run(
        [sys.executable, "-c", FRAME.format(body=body), str(path)], capture_output=True, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure, print a table, write benchmarks/results/loading.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep the weights here (default: a temporary folder)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = args.dir or Path(temporary)
        single, folder = base / "sd1.safetensors", base / "sd1"
        for target in (single, folder):
            write_random(target, find_family("sd1"), torch.float32)
        subjects = {
            "sfumato, single file": (SFUMATO, single),
            "sfumato, folder": (SFUMATO, folder),
            "diffusers, folder": (DIFFUSERS, folder),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
        for _ in range(args.runs + 1):  # the first warms the disk's cache and is not counted
            for name, subject in subjects.items():
                runs[name].append(measure(*subject))
    median = {
        name: {figure: round(statistics.median(run[figure] for run in some[1:]), 3) for figure in some[0]}
        for name, some in runs.items()
    }
    peer = median["diffusers, folder"]
    ratios = {name: {f: round(one[f] / peer[f], 3) for f in peer} for name, one in median.items()}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "runs": args.runs,
        "median": median,
        "ratio to diffusers": ratios,
        "at": time.strftime("%H:%M"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, one in median.items():
        print(f"{name:24}", "  ".join(f"{figure} {value:.2f}" for figure, value in one.items()))


if __name__ == "__main__":
    main()
