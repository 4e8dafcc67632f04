"""Make hints for ControlNets and T2I-Adapters from pictures: edges, lines, depth, blocks of colour.

OUT is a .png file for one picture, and a folder for several. A picture that cannot be read is told in a line, and the
others are done; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sfumato.cli.beginning import pictures_in
from sfumato.cli.names import ANNOTATOR_OPTIONS, ANNOTATORS

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.images.annotate import Network

MAX_SIDE = 16384


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato annotate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("annotator", metavar="NAME", help=", ".join(ANNOTATORS))
    add("paths", nargs="+", metavar="PATH", help="one or more pictures, or a folder of them, and at last OUT")
    for option_name, text in ANNOTATOR_OPTIONS.items():
        add(f"--{option_name}", type=float, metavar="X", help=text)
    add("--size", metavar="WxH", help="the hint's size in pixels; the picture is cut to its shape")
    add("--weights", metavar="PATH", help="the network: HED's .pth, .safetensors or .h5, or a depth network's .onnx")
    add("--device", default="cpu", metavar="NAME", help="where HED computes (default: %(default)s)")
    parser.set_defaults(option_names=list(ANNOTATOR_OPTIONS))


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import read_picture, save_png
    from sfumato.images.annotate import annotate, find_annotator
    from sfumato.images.fitting import fitted
    from sfumato.tasks.canvas import flat

    find_annotator(args.annotator)
    if len(args.paths) < 2:
        raise ValueError("out=None: a picture or a folder, and where the hint goes, are needed")
    *inputs, out = map(Path, args.paths)
    options = {name: value for name in args.option_names if (value := getattr(args, name)) is not None}
    options = {name: int(value) if value.is_integer() else value for name, value in options.items()}
    size = None if args.size is None else size_of(args.size)
    targets = targets_of(inputs, out)
    network = network_of(args)
    bad = 0
    for path, target in targets.items():
        try:
            pixels = flat(read_picture(path, "picture"))
            if size is not None:
                pixels = np.ascontiguousarray(fitted(pixels, *size, "crop"))
            hint = annotate(pixels, args.annotator, network, **options)
        except ValueError as error:
            print(f"{args.name}: error: {' '.join(str(error).split())}", file=sys.stderr)
            bad += 1
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        save_png(target, hint)
        print(target, flush=True)
    return 2 if bad else 0


def size_of(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    size = tuple(map(int, found.groups())) if found else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"size={text!r}: width x height in pixels, such as 512x768, is needed")
    return size[0], size[1]


def targets_of(inputs: list[Path], out: Path) -> dict[Path, Path]:
    """Each picture with where its hint goes; ValueError where that is itself, or two go to one place."""
    paths = [path for each in inputs for path in (pictures_in(each) if each.is_dir() else [each])]
    single = len(inputs) == 1 and not inputs[0].is_dir() and not out.is_dir()
    if single and out.suffix.lower() != ".png":
        raise ValueError(f"out={str(out)!r}: a .png file, or a folder that is there, is needed")
    if not single and out.is_file():
        raise ValueError(f"out={str(out)!r}: a folder is needed for several pictures, this is a file")
    found: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for path in paths:
        target = out if single else out / f"{path.stem}.png"
        if target.exists() and path.exists() and target.samefile(path):
            raise ValueError(f"out={str(out)!r}: the hint would replace the picture {path.name}")
        if target in taken:
            raise ValueError(f"out={str(out)!r}: {taken[target].name} and {path.name} would both become {target.name}")
        found[path], taken[target] = target, path
    return found


def network_of(args: argparse.Namespace) -> Network | None:
    """The network that the annotator needs; ValueError where one is missing or not wanted."""
    from sfumato.images.annotate import find_annotator
    from sfumato.weights.controls.hed import load_hed, soft_edges

    kind = find_annotator(args.annotator).network
    if kind is None and args.weights is not None:
        raise ValueError(f"weights={args.weights!r}: {args.annotator} needs none")
    if kind == "edges":
        return partial(soft_edges, load_hed(args.weights, args.device))
    if kind == "depth":
        if args.weights is None:
            raise ValueError("weights=None: a depth network's .onnx file is needed")
        return partial(_depth, args.weights)
    return None


def _depth(path: str, pixels: np.ndarray) -> np.ndarray:
    from sfumato.tasks.depth import estimated

    return estimated(pixels, path)
