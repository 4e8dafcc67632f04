"""Merge checkpoints: A + share (B - A), or with --minus C: A + share (B - C). --vae bakes another autoencoder in."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.convert import dtype_of, save
from sfumato.cli.names import PRECISIONS
from sfumato.weights.hub import resolve

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.weights.parts import Checkpoint


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato merge`."""
    add = parser.add_argument
    add("ckpt", metavar="A", help="the checkpoint that the others are merged into")
    add("other", metavar="B", nargs="?", help="the second checkpoint (none: only --vae is baked in)")
    add("out", metavar="OUT", help="a new .safetensors file, or a new folder for the diffusers layout")
    add("--share", type=float, default=0.5, metavar="S", help="B's share; outside 0 to 1 it exaggerates (default: 0.5)")
    add("--minus", metavar="C", help="add share (B - C) to A: what B learned over C")
    add("--vae", metavar="PATH", help="bake in the autoencoder of this file or folder")
    add("--dtype", choices=PRECISIONS, help="store in this precision (default: A's)")


def _opened(path: str, vae: str | None = None) -> Checkpoint:
    from sfumato.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(resolve(path), vae=vae)
    if problems := checkpoint.problems():
        raise ValueError(f"ckpt={path!r}: as {checkpoint.family.name}, {problems[0]}")
    return checkpoint


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.weights.merging import add_difference, weighted_sum, with_autoencoder
    from sfumato.weights.writing import in_precision, parts_of

    if not math.isfinite(args.share) or abs(args.share) > 10:
        raise ValueError(f"share={args.share}: a number from -10 to 10 is needed")
    if args.other is None and args.vae is None:
        raise ValueError("other: a second checkpoint or --vae is needed")
    if args.minus and args.other is None:
        raise ValueError(f"minus={args.minus!r}: a second checkpoint is needed to subtract it from")
    a = _opened(args.ckpt)
    parts = parts_of(a)
    if args.other is not None:
        b = _opened(args.other)
        parts = add_difference(a, b, _opened(args.minus), args.share) if args.minus else weighted_sum(a, b, args.share)
    if args.vae:
        parts = with_autoencoder(parts, _opened(args.ckpt, args.vae))
    merged_of = " + ".join(Path(path).name for path in (args.ckpt, args.other, args.minus, args.vae) if path)
    save(Path(args.out), a, in_precision(parts, dtype_of(args.dtype)), {}, {**_header(a), "sfumato.merged": merged_of})
    return 0


def _header(checkpoint: Checkpoint) -> dict[str, str]:
    """The header of a merged file: its family in full, so that nobody has to guess."""
    return {"format": "pt", "sfumato.family": checkpoint.family.to_json()}
