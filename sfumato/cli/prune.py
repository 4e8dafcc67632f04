"""Write only what drawing needs: no averaged twins, no training rests, half precision unless --dtype says else."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from sfumato.cli.convert import add_source_flags, dtype_of, opened, save

log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato prune`."""
    add_source_flags(parser)
    parser.set_defaults(dtype="fp16")
    parser.add_argument("--ema", action="store_true", help="keep the averaged weights instead of the plain ones")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.weights.writing import in_precision, marks_of, parts_of, surplus_of

    checkpoint = opened(args, args.ema)
    surplus, metadata = surplus_of(checkpoint)
    log.info("%d tensors left out", len(checkpoint.unused))
    save(
        Path(args.out),
        checkpoint,
        in_precision(parts_of(checkpoint), dtype_of(args.dtype)),
        marks_of(surplus),
        metadata,
    )
    return 0
