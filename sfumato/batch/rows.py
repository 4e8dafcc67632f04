"""Rows: what a table's row and the flags beside it ask for, as jobs; each row checked before the first is drawn.

A row's seed depends on its number and the run's seed alone. Knows nothing of how rows are drawn.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sfumato.families import Family
from sfumato.prompts.networks import Hypernet, Lora
from sfumato.tasks.checks import MAX_COUNT, complete, job_from_dict
from sfumato.tasks.pictures import PICTURES, Pictures
from sfumato.tasks.telling import networks_of
from sfumato.types import Job
from sfumato.weights.shelf import Shelf

Plain = tuple[int, Mapping[str, Any]]  # a row's number and what it gives
OWN = ("prompt", "negative", "seed")  # fields that differ from row to row and need no check of the others
FOLDER = 1000  # rows whose pictures share a folder


@dataclass(frozen=True)
class Row:
    """A row's number and its jobs: one, or one for each picture where its texts hold choices."""

    number: int
    jobs: tuple[Job, ...]


def seed_of(number: int, seed: int) -> int:
    """The seed of a row that has none: in [0, 2^32 - MAX_COUNT), from its number and the run's seed alone."""
    return random.Random(f"{seed} {number}").randrange(2**32 - MAX_COUNT)


def mark_of(given: Mapping[str, Any]) -> str:
    """What tells a row from another that gives something else: 16 hexadecimal digits."""
    plain = json.dumps(given, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_name(number: int, index: int, count: int) -> str:
    """Where picture `index` of a row's `count` lies: 00012/00012345.png, or 00012/00012345-0003.png of several."""
    stem = f"{number:08}" if count == 1 else f"{number:08}-{index:04}"
    return f"{number // FOLDER:05}/{stem}.png"


def share(total: int, shard: tuple[int, int] = (1, 1), limit: int | None = None) -> range:
    """The numbers of a run's rows: of the first `limit` of `total` every n-th, from shard i of n on (i from 1)."""
    index, shards = shard
    if not 1 <= index <= shards:
        raise ValueError(f"shard='{index}/{shards}': i/n with i from 1 to n is needed")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: 1 or more are needed")
    return range(index - 1, total if limit is None else min(limit, total), shards)


@dataclass(frozen=True)
class Reader:
    """Reads rows: what a row gives stands instead of the fields of `base`, whose prompt is put behind the row's.

    `texts` is what is done to prompts before they are drawn.
    """

    base: Job
    seed: int
    texts: Callable[[Job], Sequence[Job]]

    def row(self, plain: Plain) -> Row:
        """ValueError names the row, the field, its value and what is allowed."""
        number, given = plain
        try:
            job = self._job(given)
            if "seed" not in given:
                job = replace(job, seed=seed_of(number, self.seed))
            return Row(number, tuple(self.texts(job)))
        except ValueError as error:
            raise ValueError(f"row={number}: {error}") from error

    def _job(self, given: Mapping[str, Any]) -> Job:
        if not isinstance(given.get("prompt"), str):
            raise ValueError(f"prompt={given.get('prompt')!r}: text is needed")
        plain = {name: value for name, value in given.items() if not name.startswith("hires.")}
        second = {name[6:]: value for name, value in given.items() if name.startswith("hires.")}
        if isinstance(plain.get("hires", {}), dict):
            second = plain.pop("hires", {}) | second
            if second and "hires" not in given and "scale" not in second and self.base.hires is None:
                raise ValueError(f"hires.{next(iter(second))}: there is no second pass; hires.scale asks for one")
        if second:
            plain["hires"] = (asdict(self.base.hires) if self.base.hires else {}) | second
        own = job_from_dict(plain)
        job = replace(self.base, **{name: getattr(own, name) for name in plain})
        return replace(job, prompt=own.prompt + self.base.prompt) if self.base.prompt else job


def check_rows(
    rows: Iterable[Plain],
    reader: Reader,
    family: Family,
    shelf: Shelf,
    also: Callable[[Job, Pictures], None] | None = None,
) -> None:
    """ValueError naming the first row that is wrong. `also` is asked about every complete job.

    Rows that differ in nothing but texts and seed are looked at in full once; of the others only what differs.
    """
    alike: dict[str, Job] = {}
    names: set[tuple[str, str]] = set()
    for plain in rows:
        row = reader.row(plain)
        key = json.dumps({name: value for name, value in plain[1].items() if name not in OWN}, default=str)
        try:
            for job in row.jobs:
                pictures = Pictures()
                if key in alike and _is_plain(job):
                    job = replace(alike[key], prompt=job.prompt, negative=job.negative, seed=job.seed)
                else:
                    plain_job, job = job, complete(job, family, pictures.size(job))
                    if _is_plain(plain_job):
                        alike[key] = job
                _check_names(job, shelf, names)
                if also is not None:
                    also(job, pictures)
        except ValueError as error:
            raise ValueError(f"row={row.number}: {error}") from error


def _is_plain(job: Job) -> bool:
    """Whether a job's texts and seed are surely such as are allowed, and it reads no picture."""
    if job.hires is not None or job.controls or any(getattr(job, name) is not None for name in PICTURES):
        return False
    whole = isinstance(job.seed, int) and not isinstance(job.seed, bool) and 0 <= job.seed < 2**32
    return whole and all(isinstance(text, str) and text.isprintable() for text in (job.prompt, job.negative))


def _check_names(job: Job, shelf: Shelf, found: set[tuple[str, str]]) -> None:
    """ValueError where a job names a network that is not there. Those `found` are not looked for again."""
    named = [("control", control.model) for control in job.controls]
    if "<" in job.prompt or job.hires is not None:
        networks = networks_of(job)
        named += [("lora", network.name) for network in networks if isinstance(network, Lora)]
        named += [("hypernet", network.name) for network in networks if isinstance(network, Hypernet)]
    for kind, name in named:
        if (kind, name) not in found:
            shelf.find(kind, name)
            found.add((kind, name))
