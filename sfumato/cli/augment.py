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
from typing import TYPE_CHECKING

from sfumato.cli.beginning import pictures_in
from sfumato.cli.job_flags import GROUPS, Texts, add_job_flags, job_from_flags, texts_from_flags
from sfumato.cli.loading import add_device_flags, add_model_flags, load
from sfumato.cli.protecting import Protecting, add_protecting_flags
from sfumato.cli.saving import draw_with_bar

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.pipeline import Pipeline

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
    add_device_flags(parser)
    add_job_flags(parser, without=WITHOUT)
    add_protecting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import read_picture

    if not 1 <= args.copies <= 1000:
        raise ValueError(f"copies={args.copies}: 1 to 1000 are allowed")
    if len(args.strength) > 2 or not all(0 <= strength <= 1 for strength in args.strength):
        raise ValueError(f"strength={args.strength}: one number from 0 to 1, or two, are needed")
    folder, outdir = Path(args.folder), Path(args.outdir)
    if not folder.is_dir():
        raise ValueError(f"folder={args.folder!r}: no such folder")
    if outdir.exists() and outdir.samefile(folder):
        raise ValueError(f"outdir={args.outdir!r}: variants would be drawn of variants; another folder is needed")
    paths, texts = pictures_in(folder), texts_from_flags(args)
    names = [variant.name for path in paths for variant in variants(path, args.copies, outdir)]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"folder={args.folder!r}: two pictures would both become {twice}; rename one")
    captions = {path: caption_of(path) for path in paths}
    protecting = Protecting(args)
    protecting.check_prompts([caption or "" for caption in captions.values()] if args.prompt is None else [args.prompt])
    pipeline = load(args, args.device, args.precision)
    outdir.mkdir(parents=True, exist_ok=True)
    there = broken = 0
    for path in paths:
        try:
            read_picture(path)
        except ValueError as error:
            log.warning("left out: %s", error)
            broken += 1
            continue
        for target in variants(path, args.copies, outdir):
            if target.exists():
                there += 1
                continue
            draw(target, path, captions[path], args, texts, pipeline, protecting)
    if there:
        log.info("%d variants were there already", there)
    if broken:
        log.warning("%d of %d pictures could not be read", broken, len(paths))
    return 1 if broken else 0


def variants(path: Path, copies: int, outdir: Path) -> list[Path]:
    """Where the variants of a picture go."""
    return [outdir / f"{path.stem}-{copy}.png" for copy in range(1, copies + 1)]


def caption_of(path: Path) -> str | None:
    """The caption beside a picture; None where there is none. ValueError where it is not UTF-8."""
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        return None
    try:
        return caption.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"folder: the caption {str(caption)!r} is not UTF-8 (byte {error.start})") from error


def draw(
    target: Path, path: Path, caption: str | None, args: argparse.Namespace, texts: Texts, pipeline: Pipeline,
    protecting: Protecting,
) -> None:  # fmt: skip
    """Draw one variant, its caption first, so that none is ever without."""
    from sfumato.images import save_png

    own = random.Random(f"{args.seed} {target.name}")  # the same whatever else is in the folder
    job = job_from_flags(
        args, image=str(path), seed=own.randrange(2**32), prompt=caption or "" if args.prompt is None else args.prompt,
        strength=own.uniform(args.strength[0], args.strength[-1]),
    )  # fmt: skip
    job = texts.jobs(job)[0]
    protecting.check([job], pipeline.model)
    shown = protecting.shown(draw_with_bar(pipeline, job))
    if caption is not None:
        shutil.copyfile(path.with_suffix(".txt"), target.with_suffix(".txt"))
    save_png(target, *protecting.finished(shown, 0))
    print(target, flush=True)
