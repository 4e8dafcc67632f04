"""What measurements share: paired runs, their ratio and its spread, what the machine can do meanwhile, the record.

Other work on a machine slows both of a pair; so two things are run in turn, and the ratio of each pair is what counts,
of wall time and of the process's own processor time. Letters: A B the things compared, G rates in 1e9 a second.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Taken:
    """Seconds of one run: on the wall's clock, and of the processor."""

    wall: float
    processor: float


@dataclass(frozen=True)
class Ratio:
    """The median of the pairs' ratios, and the least and the most of them."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.most:.3f})"


def once(function: Callable[[], object]) -> Taken:
    """What one run takes."""
    began, used = time.perf_counter(), time.process_time()
    function()
    return Taken(time.perf_counter() - began, time.process_time() - used)


def paired(functions: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[Taken]]:
    """Run each in turn, A B A B ..., `turns` times; the caller has run each once before."""
    taken: dict[str, list[Taken]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            taken[name].append(once(function))
    return taken


def ratio(ours: Sequence[Taken], theirs: Sequence[Taken], clock: str = "processor") -> Ratio:
    """How much of their time ours takes, pair by pair; `clock` is "processor" or "wall"."""
    found = [getattr(a, clock) / getattr(b, clock) for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


def median(taken: Sequence[Taken], clock: str = "processor") -> float:
    """Seconds, in the middle of all runs."""
    return statistics.median(getattr(each, clock) for each in taken)


def roofline(turns: int = 5) -> dict[str, float]:
    """What the machine can do just now: float32 matrix products in Gflop/s, copies in Gbyte/s, of processor time."""
    a, b, out = (torch.rand(768, 768) for _ in range(3))
    source, target = torch.rand(2, 2**23)
    torch.mm(a, b, out=out)
    products = median([once(lambda: torch.mm(a, b, out=out)) for _ in range(turns)])
    copies = median([once(lambda: target.copy_(source)) for _ in range(turns)])
    return {"sgemm": 2 * 768**3 / products / 1e9, "copy": 2 * 4 * 2**23 / copies / 1e9}


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two answers."""
    return (ours.float() - theirs.float()).abs().max().item()


def machine() -> dict[str, Any]:
    """What a figure belongs to."""
    kind = platform.processor() or platform.machine()
    return {"processor": kind, "threads": torch.get_num_threads(), "torch": torch.__version__}


def keep(name: str, figures: Mapping[str, Any]) -> Path:
    """Write the figures to benchmarks/results/NAME-DATE.json, with the machine that they belong to."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{date.today().isoformat()}.json"
    whole = {"machine": machine(), **figures}
    path.write_text(json.dumps(whole, indent=1, default=asdict) + "\n", encoding="utf-8")
    return path
