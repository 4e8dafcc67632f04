"""What a job must be, for one family: blanks filled with its defaults, and one clear line where it is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields, replace
from types import NoneType
from typing import Any, NamedTuple

from sfumato.diffusion.noise import MAX_SEED, SOURCES
from sfumato.diffusion.samplers import Sampler, find_sampler, resolve
from sfumato.diffusion.schedule import NoiseSchedule, sampling_sigmas
from sfumato.families import Family
from sfumato.images import UPSCALERS
from sfumato.models.merging import MOST
from sfumato.models.reuse import Deep, reuse_of
from sfumato.prompts.weighting import WEIGHTINGS
from sfumato.tasks.picture_checks import MAX_SIDE, check_fields_together, complete_picture
from sfumato.tasks.profiles import find_profile
from sfumato.types import Control, Hires, Job

MAX_COUNT = 10_000
MAX_STEPS = 1000
MAX_GUIDANCE = 1000.0
CONTROL_MODES = ("balanced", "prompt", "control", "guess")
CONTROL_FITS = ("crop", "stretch", "fill")
LATENT_UPSCALERS = ("latent", "latent bilinear", "latent bicubic", "latent nearest")


class Range(NamedTuple):
    """What a number may be."""

    low: float
    high: float
    whole: bool = False


SIDE = Range(1, MAX_SIDE, whole=True)
FRACTION = Range(0, 1)
# Fields that are a number, or None where the job leaves them open.
RANGES: Mapping[str, Range] = {
    "guidance": Range(0, MAX_GUIDANCE),
    "eta": FRACTION,
    "seed": Range(0, MAX_SEED - MAX_COUNT, whole=True),
    "count": Range(1, MAX_COUNT, whole=True),
    "clip_skip": Range(1, 64, whole=True),
    "variation_seed": Range(0, MAX_SEED - MAX_COUNT, whole=True),
    "variation_strength": FRACTION,
    "noise_width": SIDE,
    "noise_height": SIDE,
    "ensd": Range(0, 2**40, whole=True),
    "guidance_start": FRACTION,
    "guidance_end": FRACTION,
    "guidance_low": Range(0, 1e4),
    "guidance_high": Range(0, 1e4),
    "guidance_thin": Range(0, 1e4),
    "rescale": FRACTION,
    "threshold": FRACTION,
    "mimic": Range(0, MAX_GUIDANCE),
    "pag": Range(0, MAX_GUIDANCE),
    "sag": Range(0, MAX_GUIDANCE),
    "tome": Range(0, MOST),
    "original_width": SIDE,
    "original_height": SIDE,
    "crop_left": Range(0, MAX_SIDE, whole=True),
    "crop_top": Range(0, MAX_SIDE, whole=True),
    "aesthetic": Range(0, 10),
    "negative_aesthetic": Range(0, 10),
    "strength": FRACTION,
    "noise_multiplier": Range(0, 10),
    "mask_blur_x": Range(0, 256),
    "mask_blur_y": Range(0, 256),
    "padding": Range(0, MAX_SIDE, whole=True),
    "left": Range(0, MAX_SIDE, whole=True),
    "right": Range(0, MAX_SIDE, whole=True),
    "up": Range(0, MAX_SIDE, whole=True),
    "down": Range(0, MAX_SIDE, whole=True),
    "falloff": Range(0, 4),
    "colour_variation": FRACTION,
    "image_guidance": Range(0, MAX_GUIDANCE),
    "upscale": Range(1, 16),
    "tile": SIDE,
    "overlap": SIDE,
}
REQUIRED = ("seed", "count", "variation_strength", "ensd", "guidance_start", "guidance_end", "guidance_low",
            "guidance_thin", "rescale", "pag", "sag", "tome", "noise_multiplier", "padding", "left", "right", "up",
            "down", "falloff", "colour_variation")  # fmt: skip
TEXTS = ("prompt", "negative", "seamless")
NAMES = (
    "sampler",
    "schedule",
    "weighting",
    "noise",
    "like",
    "reuse",
    "image",
    "mask",
    "depth",
    "resize",
    "fill",
    "upscaler",
)
SWITCHES = ("exact_steps", "mask_invert", "mask_resize", "from_alpha", "mask_soft", "only_masked")


def require_number(name: str, value: Any, allowed: Range) -> None:
    """ValueError where a value is no number within the range; NaN is none."""
    number = not isinstance(value, bool) and isinstance(value, int if allowed.whole else (int, float))
    if not number or not allowed.low <= value <= allowed.high:
        kind = "a whole number" if allowed.whole else "a number"
        raise ValueError(f"{name}={value!r}: {kind} from {allowed.low:g} to {allowed.high:g} is needed")


def _require_text(owner: Any, name: str, *, needed: bool) -> None:
    value = getattr(owner, name)
    if not isinstance(value, str if needed else (str, NoneType)):
        raise ValueError(f"{name}={value!r}: text is needed")
    try:
        (value or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={value!r}: not Unicode text (character {error.start + 1})") from error


def _require_one_of(name: str, value: str | None, names: tuple[str, ...]) -> None:
    if value is not None and value not in names:
        raise ValueError(f"{name}={value!r}: one of {', '.join(names)}")


def complete(job: Job, family: Family, image_size: tuple[int, int] | None = None) -> Job:
    """The job with nothing left open. ValueError names the field, its value and what is allowed.

    `image_size` is the (height, width) of the job's image; it must be given where there is one.
    """
    for name in TEXTS:
        _require_text(job, name, needed=True)
    for name in NAMES:
        _require_text(job, name, needed=False)
    _require_one_of("weighting", job.weighting, WEIGHTINGS)
    _require_one_of("noise", job.noise, SOURCES)
    for name in SWITCHES:
        if not isinstance(getattr(job, name), bool):
            raise ValueError(f"{name}={getattr(job, name)!r}: true or false is needed")
    profile = find_profile(job.like)
    job = complete_picture(job, family, image_size)
    sampler, schedule = resolve(job.sampler or profile.sampler or family.defaults.sampler, job.schedule)
    if job.schedule is None and profile.schedule is not None and sampler.schedule == "uniform":
        schedule = profile.schedule
    job = replace(
        job,
        width=_first(job.width, family.size),
        height=_first(job.height, family.size),
        steps=_first(job.steps, profile.steps, family.defaults.steps),
        guidance=_first(job.guidance, profile.guidance, family.defaults.guidance),
        sampler=sampler.name,
        schedule=schedule,
        weighting=_first(job.weighting, profile.weighting),
        noise=_first(job.noise, profile.noise),
        hires=None if job.hires is None else _complete_hires(job.hires, sampler),
    )
    _check_numbers(job, family)
    job = replace(job, overlap=_first(job.overlap, _usual_overlap(job, family)))
    check_fields_together(job, family)
    job = _check_options(job, sampler)
    sampling_sigmas(schedule, NoiseSchedule(family.schedule), int(job.steps or 1))  # some schedules allow few steps
    return job


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _check_numbers(job: Job, family: Family) -> None:
    for side in ("width", "height"):
        require_number(side, getattr(job, side), Range(family.size_step, MAX_SIDE, whole=True))
        if getattr(job, side) % family.size_step:
            raise ValueError(f"{side}={getattr(job, side)}: a multiple of {family.size_step} is needed")
    require_number("steps", job.steps, Range(1, min(MAX_STEPS, family.schedule.num_timesteps - 1), whole=True))
    for name, allowed in RANGES.items():
        value = getattr(job, name)
        if value is not None or name in REQUIRED:
            require_number(name, value, allowed)
    _check_tiles(job, family)
    _check_controls(job)
    if job.guidance_start >= job.guidance_end:
        raise ValueError(f"guidance_start={job.guidance_start}: less than guidance_end={job.guidance_end} is needed")
    if job.guidance_high is not None and job.guidance_high <= job.guidance_low:
        raise ValueError(f"guidance_high={job.guidance_high}: more than guidance_low={job.guidance_low} is needed")
    if job.threshold is not None and (job.threshold == 0 or job.mimic is None):
        raise ValueError(f"threshold={job.threshold}: more than 0 is needed, and mimic, the scale whose range is kept")
    if job.freeu is not None:
        if not isinstance(job.freeu, (tuple, list)) or len(job.freeu) != 4:
            raise ValueError(f"freeu={job.freeu!r}: four numbers are needed, b1, b2, s1, s2")
        for value in job.freeu:
            require_number("freeu", value, Range(1e-3, 100))
    if job.reuse is not None:
        Deep(frozenset(reuse_of(job.reuse)[1:])).shallow(family.unet.num_blocks)
    if job.variation_strength and job.variation_seed is None:
        raise ValueError(f"variation_strength={job.variation_strength}: variation_seed is needed too")
    if (job.noise_width is None) != (job.noise_height is None):
        raise ValueError(f"noise_width={job.noise_width}, noise_height={job.noise_height}: both or none are needed")


def _usual_overlap(job: Job, family: Family) -> int | None:
    """A quarter of a tile, an eighth where every tile is drawn over alone (A1111's SD upscale); None without tiles."""
    factor = family.autoencoder.factor
    if job.tile is not None:
        return max(1, job.tile // 4 // factor) * factor
    if job.upscale is not None:
        return max(1, min(int(job.width or 0), int(job.height or 0)) // 8 // factor) * factor
    return None


def _check_tiles(job: Job, family: Family) -> None:
    step = family.size_step
    if job.tile is not None and (job.tile % step or job.tile < 2 * step):
        raise ValueError(f"tile={job.tile}: a multiple of {step} from {2 * step} on is needed")
    if job.overlap is not None:
        factor, most = family.autoencoder.factor, (job.tile or min(int(job.width or 0), int(job.height or 0))) // 2
        if job.tile is None and job.upscale is None:
            raise ValueError(f"overlap={job.overlap}: there are no tiles; tile says how large they are")
        if job.overlap % factor or not factor <= job.overlap <= most:
            raise ValueError(f"overlap={job.overlap}: a multiple of {factor} from {factor} to {most} is needed")


def _check_options(job: Job, sampler: Sampler) -> Job:
    """The sampler's options, eta among them; an eta of 0 is dropped where the sampler has none."""
    if not isinstance(job.options, dict):
        raise ValueError(f"options={job.options!r}: names with numbers are needed")
    for name, value in job.options.items():
        if name not in sampler.options or name == "eta":
            allowed = ", ".join(sorted(sampler.options - {"eta"})) or "none"
            raise ValueError(f"options: {sampler.name} has no {name!r}; it has {allowed}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"options: {name}={value!r}: a number is needed")
    if job.eta is None or sampler.takes_eta:
        return job
    if job.eta != 0:
        raise ValueError(f"eta={job.eta}: the sampler {sampler.name} has none")
    return replace(job, eta=None)


def _complete_hires(hires: Any, sampler: Sampler) -> Hires:
    """The second pass with its numbers and names checked."""
    if not isinstance(hires, Hires):
        raise ValueError(f"hires={hires!r}: a Hires is needed")
    for name in ("prompt", "negative", "sampler", "schedule"):
        _require_text(hires, name, needed=False)
    require_number("hires.scale", hires.scale, Range(1, 8))
    require_number("hires.strength", hires.strength, FRACTION)
    if hires.steps is not None:
        require_number("hires.steps", hires.steps, Range(1, MAX_STEPS, whole=True))
    if hires.guidance is not None:
        require_number("hires.guidance", hires.guidance, Range(0, MAX_GUIDANCE))
    _require_one_of("hires.upscaler", hires.upscaler, (*LATENT_UPSCALERS, *UPSCALERS))
    if hires.sampler is None and hires.schedule is None:
        return hires
    found, schedule = resolve(hires.sampler or sampler.name, hires.schedule)
    return replace(hires, sampler=found.name, schedule=schedule)


def _check_controls(job: Job) -> None:
    """ValueError where one of the controls is wrong in itself."""
    if not isinstance(job.controls, tuple):
        raise ValueError(f"controls={job.controls!r}: a list of controls is needed")
    for number, control in enumerate(job.controls):
        name = f"controls[{number}]"
        if not isinstance(control, Control):
            raise ValueError(f"{name}={control!r}: a control is needed, such as {{'model': ..., 'image': ...}}")
        if not isinstance(control.model, str) or not control.model:
            raise ValueError(f"{name}.model={control.model!r}: the name or file of a network is needed")
        for field in ("image", "annotate"):
            if not isinstance(getattr(control, field), (str, NoneType)):
                raise ValueError(f"{name}.{field}={getattr(control, field)!r}: text is needed")
        if control.image is None and job.image is None:
            raise ValueError(f"{name}.image=None: a picture is needed, here or as the job's image")
        require_number(f"{name}.weight", control.weight, Range(0, 10))
        require_number(f"{name}.start", control.start, FRACTION)
        require_number(f"{name}.end", control.end, FRACTION)
        if control.start >= control.end:
            raise ValueError(f"{name}.start={control.start}: less than end={control.end} is needed")
        if control.mode not in CONTROL_MODES:
            raise ValueError(f"{name}.mode={control.mode!r}: one of {', '.join(CONTROL_MODES)}")
        if control.resize not in CONTROL_FITS:
            raise ValueError(f"{name}.resize={control.resize!r}: one of {', '.join(CONTROL_FITS)}")
        if not isinstance(control.options, dict):
            raise ValueError(f"{name}.options={control.options!r}: names with numbers are needed")


def sampler_of(job: Job) -> Sampler:
    """The sampler of a complete job."""
    return find_sampler(str(job.sampler))


def job_from_dict(values: dict[str, Any]) -> Job:
    """A Job from plain JSON; ValueError for a field that no Job has."""
    _require_fields(values, Job)
    values = dict(values)
    if isinstance(values.get("hires"), dict):
        _require_fields(values["hires"], Hires, "hires.")
        values["hires"] = Hires(**values["hires"])
    if isinstance(values.get("freeu"), list):
        values["freeu"] = tuple(values["freeu"])
    if isinstance(values.get("controls"), (list, tuple)):
        values["controls"] = tuple(_control(each, number) for number, each in enumerate(values["controls"]))
    return Job(**values)


def _control(values: Any, number: int) -> Any:
    """A control from plain JSON; what is no mapping is left for `complete` to refuse."""
    if not isinstance(values, dict):
        return values
    _require_fields(values, Control, f"controls[{number}].")
    return Control(**values)


def _require_fields(values: dict[str, Any], kind: type[Any], prefix: str = "") -> None:
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]}: no such field of a job; there are {', '.join(sorted(known))}")


def job_to_dict(job: Job) -> dict[str, Any]:
    """Plain JSON of a job: its count, and what else differs from an empty one."""
    empty = Job(count=0)
    return {name: value for name, value in dataclasses.asdict(job).items() if value != getattr(empty, name)}
