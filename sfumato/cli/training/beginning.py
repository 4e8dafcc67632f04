"""`sfumato train new` and `sfumato train clip`: the beginning of a model that no one has trained before."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfumato.cli.loading import load
from sfumato.cli.names import FAMILIES
from sfumato.cli.training.runs import add_run_flags, config_of, device_of, done, shown_of


def add_new_flags(parser: argparse.ArgumentParser) -> None:
    """Of a checkpoint of random weights."""
    add = parser.add_argument
    add("--config", required=True, metavar="NAME", help=f"tiny, which is trained in minutes, or {', '.join(FAMILIES)}")
    add("--out", required=True, type=Path, metavar="FILE.safetensors", help="where it goes")
    add("--seed", type=int, default=0, metavar="N", help="of the weights (default: %(default)s)")


def run_new(args: argparse.Namespace) -> int:
    """`sfumato train new`."""
    from sfumato.train.beginning import family_to_begin, write_new

    family = family_to_begin(args.config)
    if args.out.suffix != ".safetensors":
        raise ValueError(f"out={str(args.out)!r}: the name of a .safetensors file is needed")
    if args.out.exists():
        raise ValueError(f"out={str(args.out)!r}: it is there already")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_new(args.out, family, args.seed)
    print(args.out)
    return 0


def add_clip_flags(parser: argparse.ArgumentParser) -> None:
    """Of the text encoder and the image tower beside it."""
    add_run_flags(parser, 1e-3, 0.99, 32, text=False)


def run_clip(args: argparse.Namespace) -> int:
    """`sfumato train clip`."""
    from sfumato.train.beginning import train_clip
    from sfumato.train.data import open_pictures

    config = config_of(args)
    pictures, model = open_pictures(*args.data), load(args, device_of(args), "full").model
    return done(train_clip(model, pictures, args.out, shown_of(args, model), config), pictures)
