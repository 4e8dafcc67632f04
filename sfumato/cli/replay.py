"""Draw a saved picture again from its recipe. Exit code 0 if every pixel is equal, 1 with the difference if not."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sfumato.cli.loading import add_model_flags, load
from sfumato.cli.plot import cell_of
from sfumato.cli.protecting import Protecting, add_protecting_flags, carried, redone
from sfumato.cli.saving import draw_with_bar
from sfumato.images import load_png, save_png
from sfumato.pipeline import Pipeline, recipe
from sfumato.safety.checking import prompts_of
from sfumato.tasks.checks import job_from_dict
from sfumato.tasks.pictures import PICTURES
from sfumato.types import Job, Result

log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato replay`."""
    add = parser.add_argument
    add("picture", metavar="FILE.png", help="a picture that sfumato saved")
    add("--cell", type=int, metavar="N", help="of a plot, the cell to draw: from 1, left to right, then down")
    for name in PICTURES:
        add(f"--{name}", metavar="PATH", help=f"where its {name} is now (default: where it was)")
    add_model_flags(parser)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the kind that drew it)")
    add("--out", metavar="FILE.png", help="save the new drawing here")
    add_protecting_flags(parser)


@dataclass(frozen=True)
class Recipe:
    """What a saved picture says of itself. A plot's cell is drawn again with the jobs it was drawn `together` with."""

    job: Job
    index: int
    model_name: str
    model_hash: str
    precision: str
    made_with: dict[str, str]
    together: tuple[Job, ...] = ()
    place: int = 0  # of the job in them
    pictures: dict[str, str] = field(default_factory=dict)  # SHA-256 of those that the job names
    adapters: dict[str, str] = field(default_factory=dict)  # and of the files that its prompts and controls name


def read_recipe(path: Path, made: dict[str, Any]) -> Recipe:
    """A recipe from a PNG's JSON; ValueError names the picture and what is wrong."""

    def part(owner: Any, name: str, kind: type[Any]) -> Any:
        value = owner.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"picture={str(path)!r}: its recipe is damaged ({name}={value!r})")
        return value

    model, job = part(made, "model", dict), job_from_dict(part(made, "job", dict))
    count = part(made["job"], "count", int)
    index = part(made, "index", int)
    if not 0 <= index < count:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged (index {index} of {count})")
    made_with = {str(key): str(value) for key, value in part(made, "made with", dict).items()}
    name, digest = part(model, "name", str), part(model, "hash", str)
    jobs, place = [job], 0
    if "together" in made:
        together = part(made, "together", dict)
        jobs, place = [job_from_dict(each) for each in part(together, "jobs", list)], part(together, "place", int)
        if not 0 <= place < len(jobs) or jobs[place] != job:
            raise ValueError(f"picture={str(path)!r}: its recipe is damaged (together, place {place})")
    pictures = {str(key): str(value) for key, value in part({"pictures": {}} | made, "pictures", dict).items()}
    adapters = {str(key): str(value) for key, value in part({"adapters": {}} | made, "adapters", dict).items()}
    precision = part(made, "precision", str)
    return Recipe(job, index, name, digest, precision, made_with, tuple(jobs), place, pictures, adapters)


def draw(pipeline: Pipeline, old: Recipe) -> Result:
    """The job of a recipe drawn again, alone or together with others."""
    if len(old.together) <= 1:
        return draw_with_bar(pipeline, old.job)
    with tqdm(unit="step", leave=False, file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipeline.draw_many(old.together, progress)[old.place]


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    path = Path(args.picture)
    pixels, made = load_png(path) if args.cell is None else cell_of(path, args.cell)
    if "edit" in made:
        raise ValueError(f"picture={str(path)!r}: made by `sfumato edit`; its recipe says how, replay draws jobs")
    if "plot" in made:
        raise ValueError(f"cell: {str(path)!r} is a plot; say which of its cells with --cell N")
    old = read_recipe(path, made)
    protecting = Protecting(args)
    protecting.check_prompts(prompts_of(old.job))
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(old.precision, old.precision)
    pipeline = load(args, args.device or old.made_with.get("device"), precision)
    model = pipeline.model
    if model.hash != old.model_hash:
        raise ValueError(
            f"ckpt: {str(path)!r} was drawn by {old.model_name} ({old.model_hash}), this is {model.name} "
            f"({model.hash}); name the right file with --ckpt"
        )
    moved = {name: getattr(args, name) for name in PICTURES if getattr(args, name) is not None}
    if moved:
        old = replace(old, job=replace(old.job, **moved), together=())
    result = draw(pipeline, old)
    for name, digest in old.pictures.items():
        if result.pictures.get(name) != digest:
            log.warning("%s: %r is not the picture that this was drawn from", name, getattr(old.job, name))
    for name, digest in old.adapters.items():
        if result.adapters.get(name) != digest:
            log.warning("%s is not the file that this was drawn with", name)
    again = redone(result.images[old.index], made)
    if args.out:
        save_png(Path(args.out), *saved_again(result, old.index, made, protecting))
        print(args.out)
    if again.shape == pixels.shape and np.array_equal(again, pixels):
        print("equal: every pixel")
        return 0
    print(f"different: {difference(again, pixels)}")
    for name, now in result.made_with.items():
        if old.made_with.get(name) != now:
            print(f"made with {name} {old.made_with.get(name)}, now {now}")
    return 1


def saved_again(
    result: Result, index: int, made: dict[str, Any], protecting: Protecting
) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture (H, W, 3) that was drawn again, and its recipe: treated and marked as the flags ask, else as it was."""
    given = {"safety": protecting.policy != "off", "watermark": protecting.mark is not None}
    kept = {name: part for name, part in carried(made).items() if not given[name]}
    one = replace(result, images=redone(result.images[index], {"safety": kept.get("safety")})[None])
    pixels, own = protecting.finished(protecting.shown(one), 0, sign=False)
    pixels = redone(pixels, {"watermark": kept.get("watermark")})
    return pixels, protecting.signed({**recipe(result, index), **kept, **carried(own)}, pixels)


def difference(new: np.ndarray, old: np.ndarray) -> str:
    """How two pictures (H, W, 3) uint8 differ, in words."""
    if new.shape != old.shape:
        return f"{new.shape[1]} x {new.shape[0]}, saved {old.shape[1]} x {old.shape[0]}"
    apart = np.abs(new.astype(int) - old.astype(int)).max(axis=2)
    return f"{np.count_nonzero(apart)} of {apart.size} pixels, by {apart.max()} of 255 at most"
