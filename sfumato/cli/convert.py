"""Write a checkpoint in another layout or precision. OUT ending in .safetensors is a single file, else a folder.

What the new layout has no place for is kept beside, so that there and back is the identity, bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sfumato.cli.loading import family_flag
from sfumato.cli.names import PRECISIONS
from sfumato.weights.hub import resolve

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    import torch

    from sfumato.weights.parts import Checkpoint
    from sfumato.weights.writing import Parts


def dtype_of(name: str | None) -> torch.dtype | None:
    """The precision of a name in PRECISIONS; None of None."""
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return None if name is None else dtypes[name]


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """The source, the target and the precision."""
    add = parser.add_argument
    add("ckpt", metavar="PATH", help="a checkpoint file, a diffusers folder or a hub id")
    add("out", metavar="OUT", help="a new .safetensors file, or a new folder for the diffusers layout")
    add("--dtype", choices=PRECISIONS, help="store in this precision (default: as it is)")
    add("--family", metavar="NAME", help="read it as this family")
    add("--variant", metavar="NAME", help="a folder's files of this variant, such as fp16")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato convert`."""
    add_source_flags(parser)
    parser.add_argument("--vae", metavar="PATH", help="take the autoencoder from this file or folder")


def opened(args: argparse.Namespace, use_ema: bool = False) -> Checkpoint:
    """The source of the flags, without problems."""
    from sfumato.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(
        resolve(args.ckpt), family_flag(args), use_ema, getattr(args, "vae", None), args.variant
    )
    if problems := checkpoint.problems():
        raise ValueError(f"ckpt={args.ckpt!r}: as {checkpoint.family.name}, {problems[0]}{checkpoint.hint}")
    if args.out and Path(args.out).exists() and Path(args.out).resolve() == Path(args.ckpt).resolve():
        raise ValueError(f"out={args.out!r}: the source itself; name another file")
    return checkpoint


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.weights.writing import averages_in, in_precision, parts_of, surplus_of

    checkpoint = opened(args)
    surplus, metadata = surplus_of(checkpoint)
    dtype = dtype_of(args.dtype)
    save(Path(args.out), checkpoint, in_precision(parts_of(checkpoint), dtype), averages_in(surplus, dtype), metadata)
    return 0


def save(target: Path, checkpoint: Checkpoint, parts: Parts, surplus: dict, metadata: dict[str, str]) -> None:  # type: ignore[type-arg]
    """Write with a bar, then print the target. A file that is there already is left alone."""
    import torch

    from sfumato.weights.writing import write

    if target.is_file():
        raise ValueError(f"out={str(target)!r}: it is there already; name another file")
    total = sum(
        torch.Size(lazy.shape).numel() * lazy.dtype.itemsize for part in parts.values() for lazy in part.values()
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar:
        write(target, checkpoint.family, parts, surplus, metadata, bar.update)
    print(target)
