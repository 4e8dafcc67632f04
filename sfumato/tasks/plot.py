"""Plots: the cells of a table of pictures, one job with fields varied along up to three axes.

Reads axes as people write them (`steps=5-20 (+5)`, `sampler=euler,ddim`). Draws nothing: tasks/sheet.py lays out.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import combinations, product
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from sfumato.diffusion.noise import SOURCES
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.families import Model
from sfumato.images import UPSCALERS
from sfumato.images.fitting import FITS
from sfumato.prompts.weighting import WEIGHTINGS
from sfumato.tasks.checks import LATENT_UPSCALERS, complete
from sfumato.tasks.hires import second_job
from sfumato.tasks.picture_checks import FILLS
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.profiles import PROFILES
from sfumato.tasks.scenes import sigmas_of, size_of
from sfumato.types import Hires, Job

MAX_CELLS = 10_000
MATRIX = "matrix"
SWITCHES = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}
MAX_PARTS = 12  # of a prompt matrix; each doubles the cells
NAMES: Mapping[str, tuple[str, ...]] = {  # what "all" stands for
    "sampler": tuple(SAMPLERS),
    "schedule": tuple(SCHEDULES),
    "weighting": WEIGHTINGS,
    "noise": SOURCES,
    "like": tuple(PROFILES),
    "hires.upscaler": (*LATENT_UPSCALERS, *UPSCALERS),
    "hires.sampler": tuple(SAMPLERS),
    "hires.schedule": tuple(SCHEDULES),
    "resize": FITS,
    "fill": FILLS,
    "upscaler": tuple(UPSCALERS),
    "seamless": ("", "x", "y", "xy"),
}
NUMBER = r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,3})?"
RANGE = re.compile(rf"({NUMBER})\s*-\s*({NUMBER})\s*(?:\(\s*({NUMBER})\s*\)|\[\s*(\d{{1,6}})\s*\])?")


class Kind(NamedTuple):
    """The type of a field (str, int, float, tuple, dict), and whether it may be None."""

    type: type[Any]
    optional: bool


def field_kinds() -> dict[str, Kind]:
    """Every field of a Job, those of its second pass as `hires.scale`."""
    found = {}
    for owner, prefix in ((Job, ""), (Hires, "hires.")):
        for name, hint in get_type_hints(owner).items():
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            kind = next(part for part in parts if part is not NoneType)
            found[prefix + name] = Kind(get_origin(kind) or kind, NoneType in parts)
    del found["hires"]
    return found


def with_field(job: Job, name: str, value: Any) -> Job:
    """The job with a field set, `hires.scale` or `options.s_churn` as well."""
    owner, _, rest = name.partition(".")
    if owner == "hires":
        if job.hires is None:
            raise ValueError(f"{name}={value!r}: it is the second pass's, which the job has not (hires.scale)")
        return replace(job, hires=replace(job.hires, **{rest: value}))
    if owner == "options":
        return replace(job, options=job.options | {rest: value})
    return replace(job, **{name: value})


@dataclass(frozen=True)
class Axis:
    """A field and the values that it takes along one side of the plot. As it is, the axis that nothing varies along.

    For `prompt` the first value is what the others replace; for `matrix` a value is the parts put behind the prompt.
    """

    field: str = ""
    values: tuple[Any, ...] = (None,)

    def labels(self) -> list[str]:
        """What stands beside the cells."""
        return [label(value) if self.field else "" for value in self.values]

    def applied(self, job: Job, index: int) -> Job:
        """The job of a cell at this place."""
        value = self.values[index]
        if not self.field:
            return job
        if self.field == MATRIX:
            return replace(job, prompt=", ".join(part for part in (job.prompt, *value) if part))
        if self.field == "prompt":
            return replace(job, prompt=job.prompt.replace(self.values[0], value))
        return with_field(job, self.field, value)


def label(value: Any) -> str:
    """A value as it stands on a plot."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(label, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value) or "(empty)"


def read_axis(flag: str, text: str) -> Axis:
    """The axis of `FIELD=VALUES`. ValueError names the flag, what is wrong and what is allowed."""
    name, equals, values = text.partition("=")
    if not equals:
        raise ValueError(f"{flag}={text!r}: FIELD=VALUES is needed, as in steps=5,10,20")
    field, kind = find_field(flag, name)
    try:
        rows = list(csv.reader(io.StringIO(values, newline=""), skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f"{flag}: {field}={values!r}: not a list of values ({error})") from error
    words = [word.strip() for row in rows for word in row]
    if not any(words) and len(words) < 2:
        raise ValueError(f"{flag}: {field}={values!r}: it has no values")
    if [word.lower() for word in words] == ["all"] and field in NAMES:
        return Axis(field, NAMES[field])
    try:
        found = tuple(value for word in words for value in read_values(word, kind))
    except ValueError as error:
        raise ValueError(f"{flag}: {field}={error}") from error
    return Axis(field, found)


def find_field(flag: str, name: str) -> tuple[str, Kind]:
    """The field of a name as people write it ("clip-skip", "options.s_churn"); ValueError with the nearest."""
    kinds = field_kinds()
    key = name.strip().lower().replace("-", "_")
    if key.startswith("hires_"):
        key = key.replace("_", ".", 1)
    if key == "count":
        raise ValueError(f"{flag}={name!r}: every cell is one picture; vary the seed instead")
    if key == "options":
        raise ValueError(f"{flag}={name!r}: name one of the sampler's options, as in options.s_churn=0,10")
    if key.startswith("options.") and key != "options.":
        return key, Kind(float, False)
    if key not in kinds:
        known = [*(kind for kind in kinds if kind not in ("count", "options")), "options.NAME"]
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"{flag}={name!r}: no such field of a job; {hint}")
    return key, kinds[key]


def read_values(word: str, kind: Kind) -> list[Any]:
    """The value of a word, or the values of a range of numbers. ValueError begins with the word."""
    if kind.type is str:
        return [word]
    if kind.type is bool:
        if word.lower() not in SWITCHES:
            raise ValueError(f"{word!r}: one of {', '.join(SWITCHES)} is needed")
        return [SWITCHES[word.lower()]]
    if kind.optional and word.lower() == "none":
        return [None]
    if kind.type is tuple:
        return [read_numbers(word)]
    whole = kind.type is int
    if re.fullmatch(r"[+-]?\d{1,20}" if whole else NUMBER, word):
        return [int(word) if whole else float(word)]
    found = RANGE.fullmatch(word)
    if found is None:
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{word!r}: {what} is needed, or a range such as 1-5, 1-9 (+2) or 1-10 [5]")
    values = list(_range(word, *found.groups(), whole=whole))
    return list(dict.fromkeys(map(int, values))) if whole else list(map(float, values))


def read_numbers(word: str) -> tuple[float, ...]:
    """Numbers between commas. ValueError begins with the word."""
    try:
        return tuple(float(part) for part in word.split(","))
    except ValueError:
        raise ValueError(f"{word!r}: numbers between commas are needed") from None


def _range(word: str, first: str, last: str, by: str | None, count: str | None, *, whole: bool) -> Iterator[Decimal]:
    """Numbers from first to last: in steps of 1 or `by`, or `count` of them evenly, as in A1111."""
    start, stop = Decimal(first), Decimal(last)
    if count is not None:
        gaps = int(count) - 1
        if not 0 <= gaps < MAX_CELLS:
            raise ValueError(f"{word!r}: 1 to {MAX_CELLS} values are allowed")
        return (start + (stop - start) * index / max(gaps, 1) for index in range(gaps + 1))
    step = Decimal(by) if by is not None else Decimal(1 if stop >= start else -1)
    if step == 0 or (stop - start) * step < 0:
        raise ValueError(f"{word!r}: steps of {step} do not lead from {first} to {last}")
    if whole and any(number % 1 for number in (start, step)):
        raise ValueError(f"{word!r}: whole numbers are needed")
    if (stop - start) / step >= MAX_CELLS:
        raise ValueError(f"{word!r}: 1 to {MAX_CELLS} values are allowed")
    if by is None and (stop - start) % 1:
        raise ValueError(f"{word!r}: say its steps, as in {word} (+0.1), or their number, as in {word} [5]")
    return (start + step * index for index in range(int((stop - start) / step) + 1))


def split_prompt(prompt: str) -> list[str]:
    """The parts of a prompt between bars, of those that stand in no bracket."""
    parts, depth = [""], 0
    for token in re.findall(r"\\.|.", prompt, re.DOTALL):
        depth = max(0, depth + (token in "([{") - (token in ")]}"))
        if token == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def matrix_axes(parts: Sequence[str], free: Sequence[str]) -> dict[str, Axis]:
    """All combinations of the parts on the first free axis; where x and y are, half of the parts on each."""
    if not free:
        raise ValueError("matrix: x, y and z are taken; leave one of them out")
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(
            f'matrix: the prompt has {len(parts)} parts after its first "|"; 1 to {MAX_PARTS} are needed, '
            'as in "a cat|in snow|at night"'
        )

    def axis(some: Sequence[str]) -> Axis:
        return Axis(MATRIX, tuple(taken for num in range(len(some) + 1) for taken in combinations(some, num)))

    if "x" in free and "y" in free and len(parts) > 1:
        half = (len(parts) + 1) // 2
        return {"x": axis(parts[:half]), "y": axis(parts[half:])}
    return {free[0]: axis(parts)}


@dataclass(frozen=True)
class Cell:
    """The job of one cell, and in words what is its own."""

    job: Job
    words: str


@dataclass(frozen=True)
class Plot:
    """A job and what varies. Cells go left to right along x, then down along y, then through z."""

    job: Job
    x: Axis = Axis()
    y: Axis = Axis()
    z: Axis = Axis()

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes along which something varies, by name."""
        return {name: axis for name in "xyz" if (axis := getattr(self, name)).field}

    def cells(self) -> list[Cell]:
        """Every cell in order."""
        found = []
        names = sorted(self.axes, key=lambda name: self.axes[name].field != MATRIX)  # whose texts are then replaced in
        for z, y, x in product(*(range(len(axis.values)) for axis in (self.z, self.y, self.x))):
            place, job = {"x": x, "y": y, "z": z}, self.job
            for name in names:
                job = self.axes[name].applied(job, place[name])
            words = [f"{axis.field}={label(axis.values[place[name]])}" for name, axis in self.axes.items()]
            found.append(Cell(job, ", ".join(words)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of the axes."""
        return {name: {"field": axis.field, "values": list(axis.values)} for name, axis in self.axes.items()}


def plot_of(job: Job, texts: Mapping[str, str | None], matrix: bool = False) -> Plot:
    """The plot of a job along axes given as texts under "x", "y" and "z". ValueError where they do not fit."""
    if job.count != 1:
        raise ValueError(f"count={job.count}: a cell shows one picture, count must be 1; vary the seed instead")
    axes = {name: read_axis(name, text) for name, text in texts.items() if text is not None}
    whole = job.prompt
    if matrix:
        first, *parts = split_prompt(job.prompt)
        whole, job = " ".join((first, *parts)), replace(job, prompt=first)
        axes |= matrix_axes(parts, [name for name in "xyz" if name not in axes])
    if not axes:
        raise ValueError("x: say what varies, as in --x steps=5,10,20")
    _check_axes(axes, whole)
    if job.hires is None and any(axis.field == "hires.scale" for axis in axes.values()):
        job = replace(job, hires=Hires())
    return Plot(job, **axes)


def _check_axes(axes: Mapping[str, Axis], prompt: str) -> None:
    """ValueError where two axes vary the same, a replaced text is not in the prompt, or there are too many cells."""
    seen: dict[Any, str] = {}
    cells = 1
    for name, axis in axes.items():
        is_prompt = axis.field == "prompt"
        other = seen.setdefault((axis.field, axis.values[0]) if is_prompt or axis.field == MATRIX else axis.field, name)
        if other != name and axis.field != MATRIX:
            raise ValueError(f"{name}: {axis.field} varies along {other} already; name another field")
        if is_prompt and (not axis.values[0] or axis.values[0] not in prompt):
            raise ValueError(f"{name}: prompt={axis.values[0]!r}: the first value must occur in the prompt {prompt!r}")
        cells *= len(axis.values)
    if cells > MAX_CELLS:
        raise ValueError(f"{', '.join(axes)}: {cells} cells; {MAX_CELLS} are allowed")


def checked(cell: Cell, model: Model, pictures: Pictures) -> Cell:
    """The cell with a complete job; ValueError names the cell."""
    try:
        job = complete(cell.job, model.family, pictures.size(cell.job))
        sigmas_of(job, model)
        if job.hires is not None:
            complete(second_job(job, job.hires, model), model.family)
    except ValueError as error:
        raise ValueError(f"cell {cell.words}: {error}") from error
    return replace(cell, job=job)


def final_size(job: Job, model: Model, pictures: Pictures) -> tuple[int, int]:
    """(width, height) in pixels of what a complete job draws."""
    size = pictures.size(job)
    if size is None:
        height, width = size_of(job if job.hires is None else second_job(job, job.hires, model))
        return width, height
    tall, wide = size
    if job.upscale is not None:
        return round(wide * job.upscale), round(tall * job.upscale)
    if job.resize == "keep" or (job.only_masked and (job.mask is not None or job.from_alpha)):
        return wide + job.left + job.right, tall + job.up + job.down
    height, width = size_of(job)
    return width, height
