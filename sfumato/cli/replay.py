"""Draw a saved picture again from its recipe. Exit code 0 if every pixel is equal, 1 with the difference if not."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.cli import names
from sfumato.cli.loading import add_model_flags, load, load_as
from sfumato.cli.plot import cell_of
from sfumato.cli.protecting import Protecting, add_protecting_flags, carried, redone
from sfumato.cli.saving import draw_with_bar, step_bar
from sfumato.safety.checking import prompts_of
from sfumato.types import Job, Result

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.memory import Bounds
    from sfumato.pipeline import Pipeline

log = logging.getLogger(__name__)

FACTS: dict[str, type] = {"family": str, "ema": bool, "variant": str, "vae": dict}  # of `Model.facts`


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato replay`."""
    add = parser.add_argument
    add("picture", metavar="FILE.png", help="a picture that sfumato saved")
    add("--cell", type=int, metavar="N", help="of a plot, the cell to draw: from 1, left to right, then down")
    for name in names.PICTURES:
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
    bounds: Bounds  # how much was computed at once
    together: tuple[Job, ...] = ()
    place: int = 0  # of the job in them
    pictures: dict[str, str] = field(default_factory=dict)  # SHA-256 of those that the job names
    adapters: dict[str, str] = field(default_factory=dict)  # and of the files that its prompts and controls name
    model_facts: dict[str, Any] = field(default_factory=dict)  # `Model.facts`


def read_recipe(path: Path, made: dict[str, Any]) -> Recipe:
    """A recipe from a PNG's JSON; ValueError names the picture and what is wrong."""
    from sfumato.memory import bounds_of
    from sfumato.tasks.checks import job_from_dict

    def part(owner: Any, name: str, kind: type[Any]) -> Any:
        value = owner.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"picture={str(path)!r}: its recipe is damaged ({name}={value!r})")
        return value

    model, job = part(made, "model", dict), job_from_dict(part(made, "job", dict))
    count = part(made["job"], "count", int)
    index = part(made, "index", int)
    if not 0 <= index < count:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged (index {index} of {count})")
    made_with = {str(key): str(value) for key, value in part(made, "made with", dict).items()}
    try:
        bounds = bounds_of(made_with)
    except ValueError as error:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged ({error})") from error
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
    facts = {key: part(model, key, kind) for key, kind in FACTS.items() if key in model}
    for key in ("name", "hash"):
        part(facts.get("vae", {key: ""}), key, str)
    return Recipe(job, index, name, digest, precision, made_with, bounds, tuple(jobs), place, pictures, adapters, facts)


def as_drawn(args: argparse.Namespace, old: Recipe) -> argparse.Namespace:
    """The flags, and where they say nothing, what the recipe says of how its model was read and drew.

    What --vram plans for are the recipe's own pictures. ValueError where the autoencoder was another file's and none is
    given.
    """
    told = old.model_facts
    if "vae" in told and args.vae is None:
        raise ValueError(
            f"vae=None: {args.picture!r} was drawn with the autoencoder {_named(told['vae'])}; name its file or folder "
            "with --vae"
        )
    again = {
        "family": args.family or told.get("family"),
        "ema": args.ema or told.get("ema", False),
        "variant": args.variant or told.get("variant"),
        "fast": args.fast or old.made_with.get("fast") == "yes",
        "compile": old.made_with.get("compiled") == "yes",
        "weights": old.made_with.get("weights", "full"),
        "width": old.job.width,
        "height": old.job.height,
        "n_samples": sum(job.count for job in old.together or (old.job,)),
    }
    return argparse.Namespace(**vars(args) | again)


def _named(vae: dict[str, str]) -> str:
    return f"{vae['name']} ({vae['hash']})"


def opened(args: argparse.Namespace, old: Recipe) -> Pipeline:
    """The model that drew a picture, computing as much at once as it did then, or less where --vram asks for that.

    ValueError where the weights are others. A family is remembered for the file only where a person names it now.
    """
    from sfumato.families import find_family

    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(old.precision, old.precision)
    flags, device = as_drawn(args, old), args.device or old.made_with.get("device")
    if args.family is not None or flags.family is None:
        pipeline = load(flags, device, precision)
    else:
        pipeline = load_as(flags, find_family(flags.family), device, precision)
    model = pipeline.model
    if model.hash != old.model_hash:
        raise ValueError(
            f"ckpt: {args.picture!r} was drawn by {old.model_name} ({old.model_hash}), this is {model.name} "
            f"({model.hash}); name the right file with --ckpt"
        )
    wanted = old.model_facts.get("vae")
    if wanted is not None and (given := model.facts["vae"])["hash"] != wanted["hash"]:
        raise ValueError(
            f"vae: {args.picture!r} was drawn with the autoencoder {_named(wanted)}, this is {_named(given)}; name the "
            "right file with --vae"
        )
    pipeline.bound(old.bounds if args.vram is None else old.bounds.within(pipeline.bounds))
    return pipeline


def draw(pipeline: Pipeline, old: Recipe) -> Result:
    """The job of a recipe drawn again, alone or together with others."""
    if len(old.together) <= 1:
        return draw_with_bar(pipeline, old.job)
    with step_bar() as progress:
        return pipeline.draw_many(old.together, progress)[old.place]


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import load_png, save_png
    from sfumato.tasks.pictures import PICTURES

    path = Path(args.picture)
    pixels, made = load_png(path) if args.cell is None else cell_of(path, args.cell)
    if "edit" in made:
        raise ValueError(f"picture={str(path)!r}: made by `sfumato edit`; its recipe says how, replay draws jobs")
    if "plot" in made:
        raise ValueError(f"cell: {str(path)!r} is a plot; say which of its cells with --cell N")
    old = read_recipe(path, made)
    protecting = Protecting(args)
    protecting.check_prompts(prompts_of(old.job))
    pipeline = opened(args, old)
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
    for name in {**old.made_with, **result.made_with}:
        if old.made_with.get(name) != result.made_with.get(name):
            print(f"made with {name} {old.made_with.get(name)}, now {result.made_with.get(name)}")
    for name in {**old.model_facts, **result.model_facts}:
        if old.model_facts.get(name) != result.model_facts.get(name):
            print(f"model read with {name} {old.model_facts.get(name)}, now {result.model_facts.get(name)}")
    return 1


def saved_again(
    result: Result, index: int, made: dict[str, Any], protecting: Protecting
) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture (H, W, 3) that was drawn again, and its recipe: treated and marked as the flags ask, else as it was."""
    from sfumato.pipeline import recipe

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
