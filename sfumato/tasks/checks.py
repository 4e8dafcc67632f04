"""What a job must be, for one family: blanks filled with its defaults, and one clear line where it is wrong."""

from __future__ import annotations

from dataclasses import fields, replace
from types import NoneType
from typing import Any

from sfumato.diffusion.noise import MAX_SEED
from sfumato.diffusion.samplers import find_sampler
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.families import Family
from sfumato.types import Job

MAX_SIDE = 8192  # px; a larger picture is a slip of the keyboard
MAX_COUNT = 10_000
MAX_STEPS = 1000
MAX_GUIDANCE = 1000.0


def _require_number(name: str, value: Any, low: float, high: float, whole: bool) -> None:
    number = not isinstance(value, bool) and isinstance(value, int if whole else (int, float))
    if not number or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}={value!r}: {kind} from {low:g} to {high:g} is needed")


def _require_unicode(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r}: not Unicode text (character {error.start + 1})") from error


def complete(job: Job, family: Family) -> Job:
    """The job with nothing left open. ValueError names the field, its value and what is allowed."""
    for field, kinds in (
        ("prompt", str),
        ("negative", str),
        ("sampler", (str, NoneType)),
        ("schedule", (str, NoneType)),
    ):
        if not isinstance(getattr(job, field), kinds):
            raise ValueError(f"{field}={getattr(job, field)!r}: text is needed")
        _require_unicode(field, getattr(job, field) or "")
    sampler = find_sampler(job.sampler or family.defaults.sampler)
    job = replace(
        job,
        width=family.size if job.width is None else job.width,
        height=family.size if job.height is None else job.height,
        steps=family.defaults.steps if job.steps is None else job.steps,
        guidance=family.defaults.guidance if job.guidance is None else job.guidance,
        sampler=sampler.name,
        schedule=job.schedule or sampler.schedule,
    )
    for side in ("width", "height"):
        _require_number(side, getattr(job, side), family.size_step, MAX_SIDE, whole=True)
        if getattr(job, side) % family.size_step:
            raise ValueError(f"{side}={getattr(job, side)}: a multiple of {family.size_step} is needed")
    _require_number("steps", job.steps, 1, min(MAX_STEPS, family.schedule.num_timesteps - 1), whole=True)
    _require_number("guidance", job.guidance, -MAX_GUIDANCE, MAX_GUIDANCE, whole=False)
    _require_number("seed", job.seed, 0, MAX_SEED - MAX_COUNT, whole=True)
    _require_number("count", job.count, 1, MAX_COUNT, whole=True)
    if job.eta is not None:
        _require_number("eta", job.eta, 0, 1, whole=False)
        if not sampler.takes_eta:
            if job.eta != 0:
                raise ValueError(f"eta={job.eta}: the sampler {sampler.name} has none")
            job = replace(job, eta=None)
    if job.schedule not in SCHEDULES:
        raise ValueError(f"schedule={job.schedule!r}: one of {', '.join(SCHEDULES)}")
    return job


def job_from_dict(values: dict[str, Any]) -> Job:
    """A Job from plain JSON; ValueError for a field that no Job has."""
    known = {field.name for field in fields(Job)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{unknown[0]}: no such field of a job; there are {', '.join(sorted(known))}")
    return Job(**values)
