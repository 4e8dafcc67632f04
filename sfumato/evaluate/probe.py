"""A probe of bias and limits: prompts that leave something open, or ask for it, and counts of what was drawn.

Owns the questions, the drawing, which goes on where it was stopped, and the counting. Knows no flags and no network
that reads pictures. Letters: N pictures of a prompt, K options of an attribute.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.evaluate.readers import Reader
from sfumato.images import load_png, save_png
from sfumato.pipeline import Pipeline, recipe
from sfumato.tasks.checks import complete, job_to_dict
from sfumato.types import Job

log = logging.getLogger(__name__)

Z = 1.959964  # the normal deviate of 95 %
Advance = Callable[[int], None]  # told how many pictures more are done


@dataclass(frozen=True)
class Asked:
    """A prompt; the attributes that are read (None: all), the options that it asks for, what it is counted with."""

    prompt: str
    reads: tuple[str, ...] | None = None
    asks: Mapping[str, str] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Probe:
    """Prompts, and attribute -> its options' names. ValueError names what does not fit together."""

    prompts: tuple[Asked, ...]
    attributes: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: one or more are needed")
        for name, options in self.attributes.items():
            if len(options) < 2:
                raise ValueError(f"attributes.{name}: two options or more are needed")
        seen: set[str] = set()
        for asked in self.prompts:
            if asked.prompt in seen:
                raise ValueError(f"prompts: {asked.prompt!r} comes twice")
            seen.add(asked.prompt)
            for name in (*self.read_of(asked), *asked.asks):
                if name not in self.attributes:
                    known = ", ".join(self.attributes) or "none"
                    raise ValueError(f"prompts: {asked.prompt!r} names the attribute {name!r}; there are: {known}")
            for name, option in asked.asks.items():
                if option not in self.attributes[name]:
                    allowed = ", ".join(self.attributes[name])
                    raise ValueError(f"prompts: {asked.prompt!r} asks for {name}={option!r}; one of {allowed}")

    def read_of(self, asked: Asked) -> tuple[str, ...]:
        """The attributes that are read of a prompt's pictures: those it names and those it asks for."""
        named = tuple(self.attributes) if asked.reads is None else asked.reads
        return tuple(dict.fromkeys((*named, *asked.asks)))


@dataclass(frozen=True)
class Drawing:
    """How a probe's pictures are drawn; None is the model's own. `samples` of each prompt, `batch` at once."""

    samples: int = 32
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: 1 or more is needed")

    def jobs(self, prompt: str, numbers: range) -> list[Job]:
        """Jobs of some pictures of a prompt, whose noise is its own whatever else is asked."""
        first = random.Random(f"{self.seed} {prompt}").randrange(2**31)
        return [
            Job(prompt=prompt, seed=first + number, guidance=self.guidance, steps=self.steps, sampler=self.sampler)
            for number in numbers
        ]


@dataclass(frozen=True)
class Tally:
    """What was read of one prompt's pictures or of a group's: attribute -> (N, K) probabilities.

    `asked` are attribute -> (N,), the number of the option that each picture's prompt asks for.
    """

    name: str
    pictures: int
    read: Mapping[str, Tensor]
    asked: Mapping[str, Tensor] = field(default_factory=dict)
    group: str = ""


def folder_name(prompt: str) -> str:
    """A folder's name for a prompt: its letters, and the beginning of its hash."""
    letters = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{letters or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def pictures_of(
    folder: Path, pipeline: Pipeline, prompt: str, drawing: Drawing, advance: Advance
) -> list[np.ndarray]:  # fmt: skip
    """N pictures (H, W, 3) uint8 of a prompt, drawn where they are not kept yet as FOLDER/0000000.png with recipes.

    A damaged one is drawn again. ValueError where the folder holds pictures of another model or other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[np.ndarray] = []
    for start in range(0, drawing.samples, drawing.batch):
        numbers = range(start, min(start + drawing.batch, drawing.samples))
        jobs = drawing.jobs(prompt, numbers)
        paths = [folder / f"{number:07}.png" for number in numbers]
        kept = [_kept(path, job, pipeline) for path, job in zip(paths, jobs, strict=True)]
        if any(picture is None for picture in kept):
            results = pipeline.draw_many(jobs)  # all of them: a picture's last bits depend on those beside it
            for place, (path, result) in enumerate(zip(paths, results, strict=True)):
                if kept[place] is None:
                    save_png(path, result.images[0], recipe(result, 0))
                    kept[place] = result.images[0]
        found += [picture for picture in kept if picture is not None]
        advance(len(numbers))
    return found


def _kept(path: Path, job: Job, pipeline: Pipeline) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        pixels, made = load_png(path)
    except ValueError as error:
        log.warning("drawn again: %s", error)
        return None
    wanted, model = job_to_dict(complete(job, pipeline.model.family)), pipeline.model.hash
    if made.get("job") != wanted or made.get("model", {}).get("hash") != model:
        raise ValueError(f"out={str(path)!r}: it is of another model or other settings; another folder is needed")
    return pixels


def probed(
    folder: Path, pipeline: Pipeline, probe: Probe, drawing: Drawing, reader: Reader, advance: Advance, shown: int = 8
) -> Iterator[tuple[Tally, list[np.ndarray]]]:
    """For each prompt what the reader says of its pictures, and the first `shown` of them."""
    for asked in probe.prompts:
        pictures = pictures_of(folder / folder_name(asked.prompt), pipeline, asked.prompt, drawing, advance)
        read = reader.read(pictures)
        own = {name: _checked(name, read, len(pictures), len(probe.attributes[name])) for name in probe.read_of(asked)}
        wanted = {
            name: torch.full((len(pictures),), probe.attributes[name].index(option))
            for name, option in asked.asks.items()
        }
        yield Tally(asked.prompt, len(pictures), own, wanted, asked.group), pictures[:shown]


def _checked(name: str, read: Mapping[str, Tensor], pictures: int, options: int) -> Tensor:
    found = read.get(name)
    if found is None or found.shape != (pictures, options):
        told = "nothing" if found is None else tuple(found.shape)
        raise ValueError(f"attributes.{name}: the reader gave {told}; {(pictures, options)} is needed")
    return found


def pooled(tallies: Sequence[Tally]) -> list[Tally]:
    """The prompts of each group as one, of the attributes that all of them have."""
    groups: dict[str, list[Tally]] = {}
    for tally in tallies:
        if tally.group:
            groups.setdefault(tally.group, []).append(tally)
    found = []
    for name, own in groups.items():
        shared = [key for key in own[0].read if all(key in tally.read for tally in own)]
        read = {key: torch.cat([tally.read[key] for tally in own]) for key in shared}
        asking = [key for key in own[0].asked if all(key in tally.asked for tally in own)]
        asked = {key: torch.cat([tally.asked[key] for tally in own]) for key in asking}
        found.append(Tally(name, sum(tally.pictures for tally in own), read, asked))
    return found


def wilson(hits: int, total: int, z: float = Z) -> tuple[float, float]:
    """The interval of a share that was counted `hits` times in `total`: Wilson 1927; (0, 1) of nothing."""
    if not 0 <= hits <= total:
        raise ValueError(f"hits={hits}: 0 to {total} are possible")
    if total == 0:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Share:
    """How often an option was read: its count, its share, the share's 95 % interval, and its mean probability."""

    count: int
    share: float
    low: float
    high: float
    mean: float


def share_of(count: int, total: int, mean: float) -> Share:
    """A count as a share with its interval."""
    return Share(count, count / total if total else 0.0, *wilson(count, total), mean)


def told(tally: Tally, attributes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A tally as JSON has it: for each attribute its options' shares, their evenness, and how often what was asked.

    Evenness is the entropy of the shares over that of equal ones: 1 where all options came alike, 0 where only one did.
    """
    found: dict[str, Any] = {"name": tally.name, "pictures": tally.pictures, "attributes": {}}
    for name, probs in tally.read.items():
        options = attributes[name]
        best, total = probs.argmax(-1), len(probs)
        counts = [int((best == place).sum()) for place in range(len(options))]
        shares = {
            option: asdict(share_of(counts[place], total, float(probs[:, place].mean()) if total else 0.0))
            for place, option in enumerate(options)
        }
        entry: dict[str, Any] = {"options": shares, "evenness": evenness(counts)}
        if name in tally.asked:
            hits = int((best == tally.asked[name]).sum())
            low, high = wilson(hits, total)
            wanted = {options[place] for place in tally.asked[name].tolist()}
            option = wanted.pop() if len(wanted) == 1 else None  # None: another one in each prompt
            entry["asked"] = {"option": option, "count": hits, "share": hits / max(1, total), "low": low, "high": high}
        found["attributes"][name] = entry
    return found


def evenness(counts: Sequence[int]) -> float:
    """Entropy of counts over log K, in [0, 1] (Pielou 1966)."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return sum(share * math.log(1 / share) for share in shares) / math.log(len(counts)) if shares else 0.0
