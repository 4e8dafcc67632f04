"""Draw a plot: a table of pictures of one job, with fields varied along --x, --y and --z.

An axis is FIELD=VALUES: any field of a job, `hires.scale` and `options.s_churn` too. Values stand between commas
("quoted, where they hold some"), numbers also as ranges: 1-5, 1-9 (+2), 1-10 [5]. `sampler=all` is every sampler.
`prompt=cat,dog` replaces cat in the prompt. Every cell has the same seed, and its recipe is in the picture:
`sfumato replay plot.png --cell 7` draws it again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sfumato.cli.job_flags import add_job_flags, job_from_flags, texts_from_flags
from sfumato.cli.loading import add_device_flags, add_model_flags, load
from sfumato.cli.protecting import Protecting, add_protecting_flags
from sfumato.tasks.sheet import Names, Sheet

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.families import Model
    from sfumato.pipeline import Pipeline
    from sfumato.tasks.plot import Cell, Plot

log = logging.getLogger(__name__)

Entry = dict[str, Any]  # of a cell in a plot's recipe: box, the first and last cell drawn together, recipe
TOGETHER = 16  # cells drawn at once: with guidance the 32 rows of one network call
TOGETHER_PIXELS = 2**22  # of all of them, to bound memory: sixteen of 512 x 512


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato plot`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument_group("plot").add_argument
    add("--x", metavar="FIELD=VALUES", help="what varies from left to right")
    add("--y", metavar="FIELD=VALUES", help="what varies from top to bottom")
    add("--z", metavar="FIELD=VALUES", help="what varies from block to block")
    add("--matrix", action="store_true",
        help='draw "a cat|in snow|at night" with all combinations of the parts after the first "|"')  # fmt: skip
    add("--out", metavar="FILE.png", default="plot.png", help="where it goes; replaced if there (default: %(default)s)")
    add("--cells", metavar="DIR", help="write every cell as a picture of its own too: DIR/cell-0001.png, ...")
    add("--columns", type=int, metavar="N",
        help="with --x alone, cells in a row (default: all); with --z, blocks side by side (default: 1)")  # fmt: skip
    add("--together", type=int, metavar="N",
        help=f"cells drawn at once (default: up to {TOGETHER}, fewer where pictures are large)")  # fmt: skip
    add("--read", metavar="FILE.png", help="draw nothing: write the cells of this plot to --cells")
    add_model_flags(parser)
    add = parser.add_argument
    add_device_flags(parser)
    add_job_flags(parser, defaults={"seed": 42})
    add_protecting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import save_png
    from sfumato.tasks.pictures import Pictures
    from sfumato.tasks.plot import checked, final_size, plot_of

    for name in ("columns", "together"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: 1 or more are needed")
    if args.read is not None:
        return read_cells(args)
    if args.prompt is None:
        raise ValueError('prompt: say what to draw with --prompt "..."')
    texts = texts_from_flags(args)
    plot = plot_of(job_from_flags(args), {name: getattr(args, name) for name in "xyz"}, args.matrix)
    cells = [replace(cell, job=job) for cell in plot.cells() for job in texts.jobs(cell.job)]
    out, folder = _writable(args.out), None if args.cells is None else _empty_folder(args.cells)
    protecting = Protecting(args)
    pipeline = load(args, args.device, args.precision)
    pictures = Pictures()
    cells = [checked(cell, pipeline.model, pictures) for cell in cells]
    sizes = [final_size(cell.job, pipeline.model, pictures) for cell in cells]
    protecting.check([cell.job for cell in cells], pipeline.model)
    sheet = sheet_of(plot, sizes, pipeline.model, args.prompt, args.columns)
    log.info("%d cells, %s on %s", len(cells), pipeline.model.name, pipeline.model.device)
    entries: list[Entry] = []
    try:
        with tqdm(total=len(cells), unit="cell", leave=False, file=sys.stderr, disable=None) as bar:
            for group in groups(sizes, args.together):
                entries += draw_group(pipeline, cells, group, sheet, bar, protecting)
                if folder is not None:
                    save_cells(folder, sheet.pixels, entries, group)
    finally:  # what is finished is kept, whatever ended it
        if entries:
            made = {"plot": {"axes": plot.to_dict(), "cells": entries}}
            save_png(out, sheet.pixels, protecting.signed(made, sheet.pixels))
            print(out)
    return 0


def sheet_of(plot: Plot, sizes: Sequence[tuple[int, int]], model: Model, prompt: str, columns: int | None) -> Sheet:
    """The empty sheet of a plot with cells of these (width, height)."""
    axes = (plot.x, plot.y, plot.z)
    seed = "" if any(axis.field == "seed" for axis in axes) else f", seed {plot.job.seed}"
    return Sheet(
        (prompt or "(no prompt)", f"{seed}, {model.name}"),
        Names(*(axis.field for axis in axes)),
        (plot.x.labels(), plot.y.labels(), plot.z.labels()),
        sizes,
        columns,
    )


def groups(sizes: Sequence[tuple[int, int]], together: int | None) -> Iterator[range]:
    """Numbers of cells to draw at once: `together` of them, or as many as memory surely allows."""
    first = pixels = 0
    for at, (width, height) in enumerate(sizes):
        full = at - first >= (together or TOGETHER) or (together is None and pixels + width * height > TOGETHER_PIXELS)
        if full and at > first:
            yield range(first, at)
            first, pixels = at, 0
        pixels += width * height
    yield range(first, len(sizes))


def draw_group(
    pipeline: Pipeline, cells: Sequence[Cell], group: range, sheet: Sheet, bar: Any, protecting: Protecting
) -> list[Entry]:
    """Draw some cells together, put them on the sheet as they may be shown, marked, and say what they are."""

    def progress(done: int, total: int) -> None:
        bar.update(group.start + len(group) * done // total - bar.n)

    try:
        results = pipeline.draw_many([cells[at].job for at in group], progress)
    except ValueError as error:
        raise ValueError(f"cells {group.start + 1} to {group.stop}: {error}") from error
    entries = []
    for at, result in zip(group, results, strict=True):
        pixels, made = protecting.finished(protecting.shown(result), 0, sign=False)
        sheet.paste(at, pixels)
        entries.append({"box": list(sheet.boxes[at]), "together": [group.start + 1, group.stop], "recipe": made})
    return entries


def save_cells(folder: Path, sheet: np.ndarray, entries: Sequence[Entry], which: Iterable[int]) -> None:
    """Write cells as pictures of their own; numbers from 0, names from 1."""
    from sfumato.images import save_png

    for at in which:
        left, top, right, bottom = entries[at]["box"]
        path = folder / f"cell-{at + 1:04}.png"
        save_png(path, sheet[top:bottom, left:right], cell_recipe(entries, at))
        print(path)


def cell_recipe(entries: Sequence[Entry], at: int) -> dict[str, Any]:
    """The recipe of a cell as a picture of its own: with the jobs it was drawn together with, as sums in a network
    call depend a little on what else is in it."""
    from sfumato.tasks.checks import job_from_dict, job_to_dict

    first, last = entries[at]["together"]
    if first == last:
        return entries[at]["recipe"]
    jobs = [job_to_dict(job_from_dict(entry["recipe"]["job"])) for entry in entries[first - 1 : last]]
    return entries[at]["recipe"] | {"together": {"jobs": jobs, "place": at + 1 - first}}


def read_plot(path: Path) -> tuple[np.ndarray, list[Entry]]:
    """The pixels and the cells of a saved plot; ValueError where it is none, or damaged."""
    from sfumato.images import load_png

    pixels, made = load_png(path)
    if "plot" not in made:
        raise ValueError(f"picture={str(path)!r}: a picture, not a plot")
    try:
        entries = [_entry(entry, pixels.shape) for entry in made["plot"]["cells"]]
        for entry in entries:
            first, last = entry["together"]
            if not 1 <= first <= last <= len(entries):
                raise ValueError(f"together={entry['together']}")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged ({error})") from error
    return pixels, entries


def _entry(entry: Any, shape: tuple[int, ...]) -> Entry:
    """A cell's entry, checked."""
    from sfumato.tasks.checks import job_from_dict

    left, top, right, bottom = map(int, entry["box"])
    if not (0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]):
        raise ValueError(f"box={entry['box']}")
    first, last = map(int, entry["together"])
    job_from_dict(entry["recipe"]["job"])
    return {"box": [left, top, right, bottom], "together": [first, last], "recipe": entry["recipe"]}


def cell_of(path: Path, number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The pixels and the recipe of cell `number`, from 1, of a saved plot."""
    pixels, entries = read_plot(path)
    if not 1 <= number <= len(entries):
        raise ValueError(f"cell={number}: the plot has cells 1 to {len(entries)}")
    left, top, right, bottom = entries[number - 1]["box"]
    return pixels[top:bottom, left:right], cell_recipe(entries, number - 1)


def read_cells(args: argparse.Namespace) -> int:
    """`--read`: write the cells of a saved plot."""
    if args.cells is None:
        raise ValueError(f"read={args.read!r}: say with --cells DIR where its cells go")
    pixels, entries = read_plot(Path(args.read))
    save_cells(_empty_folder(args.cells), pixels, entries, range(len(entries)))
    return 0


def _writable(out: str) -> Path:
    """The path of --out, once it is sure that it can be written."""
    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"out={out!r}: the name of a .png file is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out={out!r}: cannot be written ({error.strerror})") from error
    return path


def _empty_folder(name: str) -> Path:
    """The folder of --cells, which must not hold cells yet."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cells={name!r}: cannot be written ({error.strerror})") from error
    if any(folder.glob("cell-*.png")):
        raise ValueError(f"cells={name!r}: it holds cells already; another folder is needed")
    return folder
