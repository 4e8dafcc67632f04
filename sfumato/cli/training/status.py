"""`sfumato train status`: how far a run is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.train.logs import Status


def add_status_flags(parser: argparse.ArgumentParser) -> None:
    """The run, and how to tell."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def show_status(args: argparse.Namespace) -> int:
    """`sfumato train status`."""
    from sfumato.train.logs import status_of

    status = status_of(args.run)
    print(json.dumps(asdict(status), default=str) if args.json else told(status))
    return 0


def told(status: Status) -> str:
    """A status as lines for people."""
    owner = f"process {status.owner.get('pid', '?')} on {status.owner.get('host', '?')}"
    rest = f" (was killed: {owner})" if status.owner else ""
    share = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    lines = {
        "run": f"{status.folder}: {f'running, {owner}' if status.running else f'not running{rest}'}",
        "step": f"{status.step:,}{share}",
        "loss of late": None if status.loss is None else f"{status.loss:.5g}",
        "samples/s": None if status.per_second is None else f"{status.per_second:g}",
        "ETA": None if status.eta is None or not status.running else duration(status.eta),
        "last checkpoint": "none yet",
        "skipped steps": f"{status.skipped:,} not finite, {status.overflows:,} overflows of float16",
    }
    if status.checkpoint is not None and status.checkpoint_age is not None:
        lines["last checkpoint"] = (
            f"{status.checkpoint}, step {status.checkpoint_step:,}, {duration(status.checkpoint_age)} ago"
        )
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items() if value is not None)


def duration(seconds: float) -> str:
    """Such as 2 d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour:02}:{minute:02}:{second:02}"
