"""The flags of every command that loads a checkpoint, and the loading itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sfumato.cli.names import COMPUTED, COMPUTED_HELP, FAMILIES
from sfumato.weights.shelf import USUAL, VARIABLE

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.families import Family
    from sfumato.pipeline import Memory, Pipeline


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--ckpt and what tells how to read it."""
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="a file, a diffusers folder or a hub id (default: the model in the box)")
    names = ", ".join(FAMILIES)
    add("--family", metavar="NAME", help=f"what it is, if taken for something else: {names}; remembered (auto: forget)")
    add("--vae", metavar="PATH", help="take the autoencoder from this file or folder")
    add("--ema", action="store_true", help="use the averaged weights of a full training checkpoint")
    add("--variant", metavar="NAME", help="a folder's files of this variant, such as fp16")
    add(
        "--adapters",
        action="append",
        metavar="DIR",
        help="a folder of LoRAs, embeddings, hypernetworks, ControlNets, "
        f"by whose names prompts call them; may be repeated (default: ${VARIABLE}, else {' and '.join(USUAL)})",
    )
    add("--vram", nargs="?", const="free", metavar="GIB", help="fit into so much memory of the device (no number: what "
        "is free) by half precision, slices, tiles, moving networks; the plan is told first")  # fmt: skip
    add("--fast", action="store_true", help="on a CPU: each layer in its fastest way, which takes memory and rounds "
        "otherwise")  # fmt: skip


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """--precision and --device, of every command that draws, encodes or decodes."""
    add = parser.add_argument
    add("--precision", choices=COMPUTED, default="autocast", help=COMPUTED_HELP)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--compile", action="store_true", help="compile the U-Net's blocks when they are first needed: a slow first "
        "step, faster ones after it; needs a C++ compiler on a CPU, Triton on a GPU")  # fmt: skip
    add("--graphs", action="store_true", help="on a CUDA card: repeat whole U-Net calls as CUDA graphs")
    add("--weights", choices=["full", "int8", "fp8"], default="full", help="how the U-Net's weights are kept; with 8 "
        "bits in half of the memory or less, slightly off, and LoRAs are refused (default: %(default)s)")  # fmt: skip


def speed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What --compile, --graphs and --weights ask for; nothing for a command that has none of them."""
    return {name: getattr(args, name) for name in ("compile", "graphs", "weights") if hasattr(args, name)}


def family_flag(args: argparse.Namespace) -> Family | None:
    """The family that --family names; "auto" forgets what was remembered for the file."""
    from sfumato.families import find_family
    from sfumato.weights.overrides import remember

    if args.family is None:
        return None
    if args.family == "auto":
        if args.ckpt and Path(args.ckpt).is_file():
            remember(Path(args.ckpt), None)
        return None
    return find_family(args.family)


def memory_flag(args: argparse.Namespace) -> Memory | None:
    """What --vram asks for, for pictures of the size and count of the other flags."""
    from sfumato.pipeline import Memory

    if args.vram is None:
        return None
    try:
        vram = None if args.vram == "free" else float(args.vram)
    except ValueError as error:
        raise ValueError(f"vram={args.vram!r}: a number of GiB is needed") from error
    count = getattr(args, "n_samples", 1)
    if getattr(args, "images", None) and args.width is None and args.height is None and not hasattr(args, "left"):
        sizes = [_size_of(Path(name)) for name in args.images if Path(name).is_file()]
        if sizes:  # the largest is what must fit
            width, height = max(sizes, key=lambda size: size[0] * size[1])
            return Memory(vram, width, height, count)
    return Memory(vram, getattr(args, "width", None), getattr(args, "height", None), count)


def _size_of(path: Path) -> tuple[int, int]:
    """(width, height) of a picture's file, read from its header."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image={str(path)!r}: not a readable picture ({error})") from error


def load(args: argparse.Namespace, device: str | None, precision: str) -> Pipeline:
    """The pipeline that the flags ask for. A family given by hand is remembered once the file has loaded as such."""
    from sfumato.pipeline import box_path
    from sfumato.weights.overrides import remember

    family = family_flag(args)
    pipeline = load_as(args, family, device, precision)
    path = Path(args.ckpt or box_path())
    if family is not None and path.is_file():
        remember(path, family)
    return pipeline


def load_as(args: argparse.Namespace, family: Family | None, device: str | None, precision: str) -> Pipeline:
    """The pipeline that the flags ask for but --family, read as of this family (None: found out); nothing remembered.

    The process keeps the memory that drawing frees: what is drawn next needs as much again.
    """
    from sfumato.memory.allocator import keep_freed_memory
    from sfumato.pipeline import Pipeline

    keep_freed_memory()
    return Pipeline.from_pretrained(
        args.ckpt, device, precision, family=family, use_ema=args.ema, vae=args.vae, variant=args.variant,
        memory=memory_flag(args), adapters=args.adapters, fast=args.fast, **speed_flags(args),
    )  # fmt: skip
