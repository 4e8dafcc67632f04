"""Write pictures as small files of latents, which `sfumato expand` shows again with the same model.

Beside each path printed stand its bytes and what is lost, as PSNR in dB.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.loading import add_device_flags, add_model_flags, load

ENDING = ".sfl"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato compress`."""
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="any picture's file")
    add("--quality", type=float, default=50, metavar="Q", help="0 to 100: how finely (default: %(default)s)")
    add("--refine", type=int, default=0, metavar="N",
        help="steps towards the best latents: slow, nearer to the picture, larger (default: %(default)s)")  # fmt: skip
    add("--outdir", metavar="DIR", help=f"where NAME{ENDING} goes; replaced if there (default: beside the picture)")
    add_model_flags(parser)
    add_device_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.evaluate.quality import psnr
    from sfumato.images import read_picture
    from sfumato.tasks.canvas import flat
    from sfumato.tasks.latent_file import compress, expand

    paths = targets(args.pictures, args.outdir, ENDING, "picture")
    pipeline = load(args, args.device, args.precision)
    for name, path in zip(args.pictures, paths, strict=True):
        pixels = flat(read_picture(name, "picture"))
        data = compress(pixels, pipeline.model, args.quality, args.refine, pipeline.tile)
        save_bytes(path, data)
        lost = psnr(expand(data, pipeline.model, tile=pipeline.tile), pixels)
        print(f"{path}\t{len(data)} bytes\t{lost:.1f} dB", flush=True)
    return 0


def targets(names: Sequence[str], outdir: str | None, ending: str, field: str) -> list[Path]:
    """Where each file's result goes; ValueError where two would go to one place."""
    found: dict[Path, str] = {}
    for name in names:
        path = Path(outdir or Path(name).parent) / f"{Path(name).stem}{ending}"
        if path in found:
            raise ValueError(f"{field}={name!r}: {found[path]!r} would be written to {str(path)!r} as well")
        found[path] = name
    return list(found)


def save_bytes(path: Path, data: bytes) -> None:
    """Write beside, then rename; ValueError where the place cannot be written."""
    from sfumato.images.files import written_beside

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_bytes(data)
    except OSError as error:
        raise ValueError(f"outdir={str(path.parent)!r}: cannot be written ({error.strerror})") from error
