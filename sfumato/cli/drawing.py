"""What every command that draws has in common: its flags, its jobs, its pictures. A command is a Style.

The flags are those of the original scripts with plainer names beside them, and those of every field of a Job.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sfumato.cli.asked import Asked, DrawingError, drawn_apart, sound
from sfumato.cli.beginning import images_of
from sfumato.cli.job_flags import add_job_flags, job_from_flags, texts_from_flags
from sfumato.cli.loading import add_device_flags, add_model_flags, load
from sfumato.cli.names import SAMPLERS, SCHEDULES
from sfumato.cli.protecting import Protecting, add_protecting_flags
from sfumato.cli.saving import Saver, step_bar
from sfumato.cli.seeing import Seeing, add_seeing_flags
from sfumato.types import Job, Result

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.families import Family, Model
    from sfumato.pipeline import Pipeline

log = logging.getLogger(__name__)

FAILED = 1
MAX_GRID = 2**29  # bytes of the pictures of a grid
LAION_OUTDIR = "outputs/txt2img-samples-laion400m"
LAION_CKPT = "models/ldm/text2img-large/model.ckpt"
# Fields of a Job whose flags are spelled as in the original script.
OWN_FLAGS = (
    "prompt", "negative", "width", "height", "steps", "guidance", "sampler", "schedule", "eta", "seed", "count",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """A command: its name, and the defaults in which it differs from others; None is the family's own.

    `takes_image`: there are pictures to begin from. `without` are fields of a Job that it has no flags for, `check` is
    asked about each job before anything is loaded, `suited` fits it to the family of the model that was.
    """

    name: str
    prompt: str | None = None
    n_iter: int = 1
    n_samples: int = 1
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    strength: float | None = None
    always_grid: bool = False
    size: str = ""  # what width and height are where nobody says
    takes_image: bool = False
    without: tuple[str, ...] = ()
    check: Callable[[Job], Job] | None = None
    suited: Callable[[Job, Family], Job] | None = None

    @property
    def outdir(self) -> str:
        """Where pictures go unless --outdir says otherwise."""
        return f"outputs/{self.name}-samples"


def add_flags(parser: argparse.ArgumentParser, style: Style, original: bool = False) -> None:
    """The flags of a command; `original`: pictures are looked at and marked as by the original scripts."""

    def own(value: object) -> str:
        return "the model's own" if value is None else str(value)

    add = parser.add_argument
    if style.takes_image:
        _add_image_flags(add, style)
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
    size = style.size or ("the image's own" if style.takes_image else "the model's own")
    add("--H", "--height", dest="height", type=int, metavar="PX", help=f"height (default: {size})")
    add("--W", "--width", dest="width", type=int, metavar="PX", help=f"width (default: {size})")
    add("--C", dest="channels", type=int, metavar="N", help="latent channels, checked against the model's")
    add("--f", dest="factor", type=int, metavar="N", help="downsampling factor, checked against the model's")
    add("--outdir", metavar="DIR", default=style.outdir, help="(default: %(default)s)")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--skip_grid", action="store_true", help="save no grid of all pictures")
    add("--skip_save", action="store_true", help="save no single pictures")
    add("--laion400m", action="store_true", help="the older LAION-400M model's places of files")
    add("--config", metavar="FILE", help="accepted; the model's shape is read from the checkpoint")
    add_device_flags(parser)
    more = ("image", "strength", "mask") if style.takes_image else ()
    add_job_flags(parser, without=(*OWN_FLAGS, *style.without, *more))
    add_seeing_flags(parser)
    add_protecting_flags(parser, original)
    parser.set_defaults(style=style)


def _add_image_flags(add: Callable[..., object], style: Style) -> None:
    add("--image", "--init-img", dest="images", action="append", metavar="PATH",
        help="the picture to begin from, or a folder of them; may be repeated")  # fmt: skip
    if "mask" not in style.without:
        add("--mask", metavar="PATH", help="draw only where this picture is white; or a folder with one for each "
            "picture, of its name or with _mask behind it")  # fmt: skip
    usual = "the task's own" if style.strength is None else f"{style.strength:g}"
    add("--strength", type=float, default=style.strength, metavar="X",
        help=f"how much of it may change: 0 nothing, 1 all (default: {usual})")  # fmt: skip
    add("--loopback", type=int, default=1, metavar="N", help="draw N times, each time over what was drawn before")
    add("--loopback-strength", type=float, metavar="X", help="the last time's strength; those between in even steps")


def read_prompts(path: str) -> list[tuple[int, str]]:
    """A prompt file's lines that are not blank, each with its number; ValueError where it has none or is not UTF-8."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"from-file={path!r}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"from-file={path!r}: {error.strerror}") from error
    prompts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"from-file={path!r}: it holds no prompt")
    return prompts


def _sampling(args: argparse.Namespace) -> dict[str, str | None]:
    """Sampler and schedule; --plms and --dpm_solver are the original script's names of two."""
    from sfumato.diffusion.samplers import find_sampler

    wanted = {"plms": args.plms, "dpmpp_2m": args.dpm_solver, args.sampler: args.sampler is not None}
    names = {find_sampler(name).name for name, given in wanted.items() if given}
    if len(names) > 1:
        raise ValueError(f"sampler: one is needed, --plms, --dpm_solver and --sampler ask for {' and '.join(names)}")
    if args.plms and args.eta:
        raise ValueError(f"ddim_eta={args.eta}: 0 is needed with --plms")
    schedule = args.schedule or ("uniform" if args.dpm_solver else None)
    return {"sampler": names.pop() if names else args.style.sampler, "schedule": schedule}


def asked_of(args: argparse.Namespace) -> Iterator[list[Asked]]:
    """What each iteration asks for: n_samples pictures of the prompt, or one of every line of the prompt file.

    Each of them for every picture that there is to begin from. ValueError for flags that are wrong; what is wrong with
    a line is its own error.
    """
    from sfumato.tasks.checks import MAX_COUNT

    for name in ("n_iter", "n_samples", *(["loopback"] if args.style.takes_image else [])):
        if not 1 <= getattr(args, name) <= MAX_COUNT:
            raise ValueError(f"{name}={getattr(args, name)}: 1 to {MAX_COUNT} are allowed")
    if args.n_rows < 0:
        raise ValueError(f"n_rows={args.n_rows}: 0 or more are needed")
    if args.prompt is None and args.from_file is None:
        raise ValueError('prompt: say what to draw with --prompt "..." or --from-file FILE')
    prompts = read_prompts(args.from_file) if args.from_file else [(None, args.prompt)]
    common, texts, seed = _sampling(args), texts_from_flags(args), args.seed
    begun: Sequence[tuple[str | None, str | None]] = images_of(args) if args.style.takes_image else [(None, None)]
    for _ in range(args.n_iter):
        share = args.n_samples if args.fixed_code else len(prompts)  # the original starts every batch alike
        count = 1 if args.from_file else args.n_samples
        asked: list[Asked] = []
        for image, mask in begun:
            for index, (line, prompt) in enumerate(prompts):
                job = job_from_flags(args, prompt=prompt, seed=seed + index % share, count=count, **common)
                job = replace(job, image=image, mask=mask)
                if args.style.check is not None:
                    job = args.style.check(job)
                if args.style.takes_image:
                    _check_loopback(args, job)
                asked.append(Asked(line))
                with asked[-1].apart():
                    asked[-1].jobs = texts.jobs(job)
        yield asked
        if not args.fixed_code:
            seed += len(prompts) if args.from_file else args.n_samples


def _check_family(args: argparse.Namespace, family: Family) -> None:
    for flag, given, actual in (
        ("C", args.channels, family.autoencoder.latent_channels),
        ("f", args.factor, family.autoencoder.factor),
    ):
        if given is not None and given != actual:
            raise ValueError(f"{flag}={given}: the model {family.name} has {actual}")


def _check_loopback(args: argparse.Namespace, job: Job) -> None:
    """ValueError where a job cannot be drawn again and again as --loopback asks."""
    from sfumato.tasks.checks import RANGES, require_number

    last = args.loopback_strength
    if args.loopback == 1:
        if last is not None:
            raise ValueError(f"loopback_strength={last:g}: it is drawn once; --loopback says how many times")
        return
    if args.skip_save:
        raise ValueError("loopback: each time begins from a saved picture; it does not go with --skip_save")
    if last is not None:
        require_number("loopback_strength", last, RANGES["strength"])
        if job.strength is None:
            raise ValueError(f"loopback_strength={last:g}: --strength is needed too, the first time's")
    if job.from_alpha and job.mask is None:
        raise ValueError("loopback: what was drawn is nowhere transparent, so a mask is needed")
    if job.mask is not None and job.resize in ("crop", "fill"):
        raise ValueError(f"resize={job.resize!r}: of a mask and --loopback, stretch or keep is needed")


def looped(
    pipeline: Pipeline, job: Job, args: argparse.Namespace, saver: Saver, seeing: Seeing, protecting: Protecting
) -> Iterator[np.ndarray]:
    """Draw a job, save what comes out, and draw over that as often as --loopback says; gives every picture.

    Each time's picture is a file, and the next one's recipe names it. DrawingError where one cannot be drawn.
    """
    if not args.style.takes_image or args.loopback == 1:
        result = _drawn(pipeline, job, seeing)
        shown = protecting.shown(result)
        for index, image in enumerate(shown.result.images):
            if not args.skip_save:
                path = saver.picture(*protecting.finished(shown, index))
                if not protecting.is_hidden(shown, index):
                    seeing.save(result, index, path)
            yield image
        return
    last = job.strength if args.loopback_strength is None else args.loopback_strength
    for seed in range(job.seed, job.seed + job.count):
        one = replace(job, seed=seed, count=1)
        for turn in range(args.loopback):
            if job.strength is not None and last is not None:
                one = replace(one, strength=job.strength + (last - job.strength) * turn / (args.loopback - 1))
            result = _drawn(pipeline, one, seeing)
            shown = protecting.shown(result)
            path = saver.picture(*protecting.finished(shown, 0))
            if not protecting.is_hidden(shown, 0):
                seeing.save(result, 0, path)
            yield shown.result.images[0]
            # the picture has the job's size now, which its mask need not have
            one = replace(one, image=str(path), seed=one.seed + job.count, mask_resize=job.mask is not None)


def _drawn(pipeline: Pipeline, job: Job, seeing: Seeing) -> Result:
    """A job drawn, what it can show seen. DrawingError where it cannot be; what saves it is not tried then."""
    with step_bar() as progress:
        [found] = pipeline.draw_each([job], progress, observe=seeing.begin())
    if isinstance(found, Exception):
        raise DrawingError from found
    return found


def check_all(asked: Sequence[Asked], model: Model, seeing: Seeing, protecting: Protecting) -> None:
    """See what is wrong with jobs, or with pictures that they name, before the first is drawn.

    It is a line's own error; without a file ValueError.
    """
    from sfumato.tasks.canvas import read_free
    from sfumato.tasks.checks import complete
    from sfumato.tasks.pictures import Pictures

    pictures = Pictures()
    held: tuple[str | None, str | None] = (None, None)  # of a folder, no more than one picture
    for each in asked:
        with each.apart():
            for job in each.jobs:
                names = (job.image, job.mask)
                if is_new := names != held:
                    pictures, held = Pictures(), (None, None)
                seeing.check(job, pictures)
                complete(job, model.family, pictures.size(job))
                if is_new and job.image is not None:
                    read_free(job, pictures.picture(job.image, "image"), pictures)
                held = names
            protecting.check(each.jobs, model)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import grid

    iterations = list(asked_of(args))
    outdir = args.outdir
    if args.laion400m:
        outdir, args.ckpt = LAION_OUTDIR, LAION_CKPT
    if args.config:
        log.info("config %s is not read: the model's shape is in the checkpoint", args.config)
    protecting = Protecting(args)
    pipeline = load(args, args.device, args.precision)
    saver = Saver(Path(outdir))
    model = pipeline.model
    _check_family(args, model.family)
    seeing = Seeing(args, model, pipeline.extras.embeddings)
    if args.skip_save and (args.film or args.where):
        raise ValueError("film, where: they are saved beside the pictures, which --skip_save leaves out")
    asked = [each for iteration in iterations for each in iteration]
    if (suited := args.style.suited) is not None:
        for each in asked:
            each.jobs = [suited(job, model.family) for job in each.jobs]
    check_all(asked, model, seeing, protecting)
    ready = sound(asked)
    log.info("%s on %s in %s", model.name, model.device, model.precision)
    if any(not job.prompt and (job.upscale is None or job.strength) for each in ready for job in each.jobs):
        log.info("the prompt is empty: drawing unconditionally")
    images: list[np.ndarray] = []
    alike = True
    try:
        for image in drawn_apart(ready, lambda job: looped(pipeline, job, args, saver, seeing, protecting)):
            if not args.skip_grid and alike:
                images.append(image)
                alike = image.shape == images[0].shape and len(images) * image.size <= MAX_GRID
                images = images if alike else []  # a grid is of pictures of one size, and must be in memory
    finally:  # what is finished is kept, whatever ended it
        if len(images) > 1 or (images and args.style.always_grid):
            columns = args.n_rows or (
                sum(len(each.jobs) for each in iterations[0]) if args.from_file else args.n_samples
            )
            saver.grid(protecting.grid(grid(np.stack(images), min(columns, len(images)))))
    if failed := sum(each.error is not None for each in asked):
        log.warning("%d of %d were not drawn, or not all of their pictures", failed, len(asked))
    return FAILED if failed else 0


def original_script(style: Style, prog: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of one of the original scripts, with its defaults."""
    parser = argparse.ArgumentParser(prog=prog, description=f"{prog} of the original scripts, flag for flag.")
    add_flags(parser, style, original=True)
    return parser.parse_args(argv)
