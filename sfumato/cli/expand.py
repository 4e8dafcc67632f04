"""Show pictures again that `sfumato compress` wrote as latents: each becomes a PNG. The same model is needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfumato.cli.compress import targets
from sfumato.cli.loading import add_device_flags, add_model_flags, load

ENDING = "-expanded.png"  # never the name of the picture that was compressed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato expand`."""
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE.sfl", help="files of `sfumato compress`")
    add("--any-model", action="store_true", help="also where another model wrote the file, with the same autoencoder")
    add("--outdir", metavar="DIR", help=f"where NAME{ENDING} goes; replaced if there (default: beside the file)")
    add_model_flags(parser)
    add_device_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import save_png
    from sfumato.tasks.latent_file import expand

    paths = targets(args.files, args.outdir, ENDING, "file")
    pipeline = load(args, args.device, args.precision)
    for name, path in zip(args.files, paths, strict=True):
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise ValueError(f"file={name!r}: {error.strerror}") from error
        try:
            pixels = expand(data, pipeline.model, args.any_model, pipeline.tile)
        except ValueError as error:
            raise ValueError(f"file={name!r}: {error}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, pixels)
        print(path, flush=True)
    return 0
