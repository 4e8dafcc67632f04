"""Draw pictures from a prompt. Without --ckpt the model in the box draws, at its own size."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sfumato.cli.job_flags import add_job_flags, job_from_flags, texts_from_flags
from sfumato.cli.loading import add_model_flags, load
from sfumato.diffusion.samplers import SAMPLERS, find_sampler
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.families import Family
from sfumato.images import grid, save_png
from sfumato.pipeline import Pipeline, recipe
from sfumato.tasks.checks import MAX_COUNT, complete
from sfumato.types import Job, Result

log = logging.getLogger(__name__)

LAION_OUTDIR = "outputs/txt2img-samples-laion400m"
LAION_CKPT = "models/ldm/text2img-large/model.ckpt"
# Fields of a Job whose flags are spelled as in the original script.
OWN_FLAGS = (
    "prompt", "negative", "width", "height", "steps", "guidance", "sampler", "schedule", "eta", "seed", "count",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """The defaults in which `sfumato txt2img` and the original script differ; None is the family's own."""

    prompt: str | None = None
    n_iter: int = 1
    n_samples: int = 1
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    always_grid: bool = False


SFUMATO = Style()
ORIGINAL = Style("a painting of a virus monster playing guitar", 2, 3, 50, 7.5, "ddim", always_grid=True)


def add_flags(parser: argparse.ArgumentParser, style: Style = SFUMATO) -> None:
    """The original txt2img.py's flags with plainer names beside them, and a few more."""

    def own(value: object) -> str:
        return "the model's own" if value is None else str(value)

    add = parser.add_argument
    add("--prompt", default=style.prompt, help="what to draw; empty draws unconditionally")
    add("--negative", default="", metavar="TEXT", help="what to stay away from")
    add("--from-file", metavar="FILE", help="a UTF-8 text file: a picture for every line that is not blank")
    add_model_flags(parser)
    add("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)} (default: {own(style.sampler)})")
    add("--schedule", metavar="NAME", help=f"one of {', '.join(SCHEDULES)} (default: the sampler's own)")
    add("--plms", action="store_true", help="the same as --sampler plms")
    add("--dpm_solver", action="store_true", help="the same as --sampler dpmpp_2m --schedule uniform")
    steps_help = f"sampling steps (default: {own(style.steps)})"
    add("--ddim_steps", "--steps", dest="steps", type=int, default=style.steps, metavar="N", help=steps_help)
    add("--ddim_eta", "--eta", dest="eta", type=float, metavar="ETA", help="0 deterministic to 1 (ddim, euler_a)")
    scale_help = f"guidance; 1 is none (default: {own(style.guidance)})"
    add("--scale", "--guidance", dest="guidance", type=float, default=style.guidance, metavar="G", help=scale_help)
    add("--seed", type=int, default=42, metavar="N", help="picture i is drawn from seed + i (default: 42)")
    count_help = f"pictures drawn at once (default: {style.n_samples})"
    add("--n_samples", "--count", dest="n_samples", type=int, default=style.n_samples, metavar="N", help=count_help)
    add("--n_iter", type=int, default=style.n_iter, metavar="N", help=f"times to do so (default: {style.n_iter})")
    add("--fixed_code", action="store_true", help="start every iteration from the same noise")
    add("--H", "--height", dest="height", type=int, metavar="PX", help="height (default: the model's own)")
    add("--W", "--width", dest="width", type=int, metavar="PX", help="width (default: the model's own)")
    add("--C", dest="channels", type=int, metavar="N", help="latent channels, checked against the model's")
    add("--f", dest="factor", type=int, metavar="N", help="downsampling factor, checked against the model's")
    add("--outdir", metavar="DIR", default="outputs/txt2img-samples", help="(default: %(default)s)")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--skip_grid", action="store_true", help="save no grid of all pictures")
    add("--skip_save", action="store_true", help="save no single pictures")
    add("--laion400m", action="store_true", help="the older LAION-400M model's places of files")
    add("--config", metavar="FILE", help="accepted; the model's shape is read from the checkpoint")
    add("--precision", choices=["full", "autocast"], default="autocast", help="(default: %(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add_job_flags(parser, without=OWN_FLAGS)
    parser.set_defaults(style=style)


def read_prompts(path: str) -> list[str]:
    """The lines of a prompt file that are not blank; ValueError where there are none or it is not UTF-8."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"from-file={path!r}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"from-file={path!r}: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"from-file={path!r}: it holds no prompt")
    return prompts


def _sampling(args: argparse.Namespace) -> dict[str, str | None]:
    """Sampler and schedule; --plms and --dpm_solver are the original script's names of two."""
    wanted = {"plms": args.plms, "dpmpp_2m": args.dpm_solver, args.sampler: args.sampler is not None}
    names = {find_sampler(name).name for name, given in wanted.items() if given}
    if len(names) > 1:
        raise ValueError(f"sampler: one is needed, --plms, --dpm_solver and --sampler ask for {' and '.join(names)}")
    if args.plms and args.eta:
        raise ValueError(f"ddim_eta={args.eta}: 0 is needed with --plms")
    schedule = args.schedule or ("uniform" if args.dpm_solver else None)
    return {"sampler": names.pop() if names else args.style.sampler, "schedule": schedule}


def jobs_of(args: argparse.Namespace) -> Iterator[list[Job]]:
    """The jobs of each iteration: n_samples pictures of the prompt, or one of every line of the prompt file."""
    for name in ("n_iter", "n_samples"):
        if not 1 <= getattr(args, name) <= MAX_COUNT:
            raise ValueError(f"{name}={getattr(args, name)}: 1 to {MAX_COUNT} are allowed")
    if args.n_rows < 0:
        raise ValueError(f"n_rows={args.n_rows}: 0 or more are needed")
    if args.prompt is None and args.from_file is None:
        raise ValueError('prompt: say what to draw with --prompt "..." or --from-file FILE')
    prompts = read_prompts(args.from_file) if args.from_file else [args.prompt]
    common, texts, seed = _sampling(args), texts_from_flags(args), args.seed
    for _ in range(args.n_iter):
        if args.from_file:
            share = args.n_samples if args.fixed_code else len(prompts)  # the original starts every batch alike
            seeds = [seed + index % share for index in range(len(prompts))]
            jobs = [job_from_flags(args, prompt=p, seed=s, **common) for p, s in zip(prompts, seeds, strict=True)]
        else:
            jobs = [job_from_flags(args, prompt=prompts[0], seed=seed, count=args.n_samples, **common)]
        yield [drawn for job in jobs for drawn in texts.jobs(job)]
        if not args.fixed_code:
            seed += len(prompts) if args.from_file else args.n_samples


def _check_family(args: argparse.Namespace, family: Family) -> None:
    for flag, given, actual in (
        ("C", args.channels, family.autoencoder.latent_channels),
        ("f", args.factor, family.autoencoder.factor),
    ):
        if given is not None and given != actual:
            raise ValueError(f"{flag}={given}: the model {family.name} has {actual}")


def _next_number(folder: Path, pattern: str) -> int:
    """One above the highest number that a file of the folder has in the pattern's group."""
    numbers = [int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(pattern, path.name))]
    return max(numbers, default=-1) + 1


class Saver:
    """Writes pictures as samples/00000.png, 00001.png, ... and prints each path.

    Numbers go on above the highest there is; a name that another process took meanwhile is passed over.
    """

    def __init__(self, outdir: Path) -> None:
        self.outdir, self.samples = outdir, outdir / "samples"
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            probe = self.samples / ".sfumato-probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"outdir={str(outdir)!r}: cannot be written ({error.strerror})") from error

    def picture(self, result: Result, index: int) -> None:
        number = _next_number(self.samples, r"(\d{5,})\.png")
        self._save((self.samples / f"{n:05}.png" for n in count(number)), result.images[index], recipe(result, index))

    def grid(self, images: np.ndarray, columns: int) -> None:
        number = _next_number(self.outdir, r"grid-(\d{4,})\.png")
        self._save((self.outdir / f"grid-{n:04}.png" for n in count(number)), grid(images, columns), None)

    def _save(self, names: Iterator[Path], image: np.ndarray, made: dict[str, Any] | None) -> None:
        for path in names:
            try:
                save_png(path, image, made, new=True)
            except FileExistsError:
                continue
            print(path, flush=True)
            return


def draw_with_bar(pipeline: Pipeline, job: Job) -> Result:
    """Draw a job under a progress bar of noise levels on the terminal."""
    with tqdm(unit="step", leave=False, file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipeline.draw(job, progress)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    iterations = list(jobs_of(args))
    outdir = args.outdir
    if args.laion400m:
        outdir, args.ckpt = LAION_OUTDIR, LAION_CKPT
    if args.config:
        log.info("config %s is not read: the model's shape is in the checkpoint", args.config)
    pipeline = load(args, args.device, args.precision)
    saver = Saver(Path(outdir))
    model = pipeline.model
    _check_family(args, model.family)
    iterations = [[complete(job, model.family) for job in jobs] for jobs in iterations]
    log.info("%s on %s in %s", model.name, model.device, model.precision)
    if not all(job.prompt for jobs in iterations for job in jobs):
        log.info("the prompt is empty: drawing unconditionally")
    images: list[np.ndarray] = []
    try:
        for job in (job for jobs in iterations for job in jobs):
            result = draw_with_bar(pipeline, job)
            if not args.skip_grid:
                images.extend(result.images)
            if not args.skip_save:
                for index in range(len(result.images)):
                    saver.picture(result, index)
    finally:  # what is finished is kept, whatever ended it
        if len(images) > 1 or (images and args.style.always_grid):
            columns = args.n_rows or (len(iterations[0]) if args.from_file else args.n_samples)
            saver.grid(np.stack(images), min(columns, len(images)))
    return 0


def original_script(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of the original scripts/txt2img.py, with its defaults."""
    parser = argparse.ArgumentParser(prog="txt2img.py", description=__doc__)
    add_flags(parser, ORIGINAL)
    return parser.parse_args(argv)
