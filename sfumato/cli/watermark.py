"""Write an invisible mark into a picture, or read it: exit code 1 where none is found.

dwtdct is the original scripts' and read by invisible-watermark; strong survives other sizes, turns, cuts and JPEG.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from sfumato.safety.marks import METHODS, TEXT, Mark, found, marked
from sfumato.safety.provenance import NAME

QUALITY = 95  # of JPEG and WebP that are written


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato watermark`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    write = commands.add_parser("write", help="put a text into a picture")
    write.add_argument("picture", metavar="IN", help="any picture")
    write.add_argument("out", metavar="OUT", help="where it goes: .png, .jpg or .webp")
    write.add_argument("--text", default=TEXT, help="(default: %(default)s)")
    write.add_argument("--method", choices=METHODS, default="strong", help="(default: %(default)s)")
    write.set_defaults(act=run_write)
    read = commands.add_parser("read", help="print the text in a picture")
    read.add_argument("picture", metavar="FILE", help="any picture")
    read.add_argument("--method", choices=METHODS, help="look for this one only (default: for both)")
    read.add_argument("--length", type=int, default=len(TEXT), metavar="N",
                      help="bytes of a dwtdct text, which does not tell (default: %(default)s)")  # fmt: skip
    read.set_defaults(act=run_read)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    return args.act(args)


def run_write(args: argparse.Namespace) -> int:
    """`sfumato watermark write`."""
    from sfumato.images import read_picture, save_png
    from sfumato.images.files import written_beside
    from sfumato.tasks.canvas import flat

    source, out, mark = Path(args.picture), Path(args.out), Mark(args.text, args.method)
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    if out.suffix.lower() not in kinds:
        raise ValueError(f"out={args.out!r}: one of {', '.join(kinds)} is needed")
    pixels = marked(flat(read_picture(source, "picture")), mark)
    if kinds[out.suffix.lower()] == "PNG":
        save_png(out, pixels, _recipe_of(source))
    else:
        with written_beside(out) as beside:
            Image.fromarray(pixels).save(beside, format=kinds[out.suffix.lower()], quality=QUALITY)
    print(out)
    return 0


def run_read(args: argparse.Namespace) -> int:
    """`sfumato watermark read`; 1 where there is no mark."""
    from sfumato.images import read_picture
    from sfumato.tasks.canvas import flat

    mark = found(flat(read_picture(Path(args.picture), "picture")), args.method, args.length)
    if mark is None:
        return 1
    print(mark.text)
    return 0


def _recipe_of(path: Path) -> dict[str, object] | None:
    """The recipe of a picture of ours, less its signature, which a mark breaks; None where there is none to read."""
    from sfumato.images import RECIPE_KEY

    with Image.open(path) as picture:
        picture.load()
        text = getattr(picture, "text", {}).get(RECIPE_KEY)
    if text is None:
        return None
    made = json.loads(text)
    return {name: value for name, value in made.items() if name != NAME}
