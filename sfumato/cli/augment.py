"""Draw over every picture of a folder, to augment a set or to make its people and places unknown.

Each picture gets --copies variants under its own name (NAME-1.png, NAME-2.png, ...), and its caption NAME.txt is copied
to each; without --prompt the caption is the prompt. What is there already is not drawn again, so a run that was cut
goes on. About 0.2 to 0.4 of --strength varies a picture; from 0.6 on single faces are others.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
from pathlib import Path

from sfumato.cli.drawing import pictures_in
from sfumato.cli.job_flags import GROUPS, add_job_flags, job_from_flags
from sfumato.cli.loading import add_model_flags, load
from sfumato.cli.saving import draw_with_bar
from sfumato.images import save_png
from sfumato.pipeline import recipe

log = logging.getLogger(__name__)

OWN = ("prompt", "image", "strength", "count", "seed")
WITHOUT = (*GROUPS["second pass"], *GROUPS["mask"], *GROUPS["new ground"], "upscale", "upscaler", "depth", *OWN)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato augment`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", metavar="DIR", help="the pictures")
    add("outdir", metavar="OUTDIR", help="where the variants go")
    add("--copies", type=int, default=1, metavar="N", help="variants of each picture (default: %(default)s)")
    add("--strength", type=float, nargs="+", default=[0.3], metavar="X",
        help="how much may change, or two numbers between which each variant's is drawn (default: 0.3)")  # fmt: skip
    add("--prompt", metavar="TEXT", help="what all of them show (default: each one's caption, or nothing)")
    add("--seed", type=int, default=42, metavar="N", help="where the noise of all comes from (default: %(default)s)")
    add_model_flags(parser)
    add("--precision", choices=["full", "autocast"], default="autocast", help="(default: %(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add_job_flags(parser, without=WITHOUT)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if not 1 <= args.copies <= 1000:
        raise ValueError(f"copies={args.copies}: 1 to 1000 are allowed")
    if len(args.strength) > 2 or not all(0 <= strength <= 1 for strength in args.strength):
        raise ValueError(f"strength={args.strength}: one number from 0 to 1, or two, are needed")
    folder, outdir = Path(args.folder), Path(args.outdir)
    if not folder.is_dir():
        raise ValueError(f"folder={args.folder!r}: no such folder")
    paths = pictures_in(folder)
    pipeline = load(args, args.device, args.precision)
    outdir.mkdir(parents=True, exist_ok=True)
    done = 0
    for path in paths:
        caption = path.with_suffix(".txt")
        said = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        for copy in range(1, args.copies + 1):
            target = outdir / f"{path.stem}-{copy}.png"
            if target.exists():
                done += 1
                continue
            own = random.Random(f"{args.seed} {path.stem} {copy}")  # the same whatever else is in the folder
            job = job_from_flags(
                args, image=str(path), seed=own.randrange(2**32), prompt=said if args.prompt is None else args.prompt,
                strength=own.uniform(args.strength[0], args.strength[-1]),
            )  # fmt: skip
            result = draw_with_bar(pipeline, job)
            save_png(target, result.images[0], recipe(result, 0))
            if caption.is_file():
                shutil.copyfile(caption, target.with_suffix(".txt"))
            print(target, flush=True)
    if done:
        log.info("%d variants were there already", done)
    return 0
