"""Write the averaged (EMA) weights of a full training checkpoint as a plain one, in the file's own precision."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfumato.cli.convert import add_source_flags, dtype_of, opened, save


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato extract-ema`."""
    add_source_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.weights.writing import in_precision, marks_of, parts_of, surplus_of

    checkpoint = opened(args, use_ema=True)
    surplus, metadata = surplus_of(checkpoint)
    save(
        Path(args.out),
        checkpoint,
        in_precision(parts_of(checkpoint), dtype_of(args.dtype)),
        marks_of(surplus),
        metadata,
    )
    return 0
