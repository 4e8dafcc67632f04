"""The register of samplers: their names in every program's spelling, their options, and how one is driven.

A sampler is a coroutine: it yields a Query, is sent its Answer, and returns the final x. It never calls a network.
To add one, write a function `(x, sigmas, noise)` under `@sampler(...)`; its keyword-only arguments become options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.diffusion.names import plain, unknown
from sfumato.diffusion.schedule import AUTOMATIC, find_schedule, schedule_names
from sfumato.types import Answer, Query

Steps = Generator[Query, Answer, Tensor]


@dataclass(frozen=True)
class Sampler:
    """A registered sampler: its function, the schedule it is used with unless another is asked for, and how x starts.

    `start` is "sigma" for x = sigma noise (k-diffusion) or "prior" for sqrt(1 + sigma^2) noise, the unit variance in
    variance-preserving scale that the original DDIM and PLMS start from. `options` are the keyword arguments of `run`
    that a person may set; `discard` asks for levels without the next to last, `sampling_sigmas(..., discard=True)`.
    `alone` means that each picture takes steps of its own: a run of several pictures is computed one after another,
    so give each picture a run of its own and let the engine batch them. `labels` are its names in other programs.
    """

    name: str
    run: Callable[..., Steps]
    schedule: str
    start: str
    options: frozenset[str]
    discard: bool = False
    alone: bool = False
    labels: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name that web interfaces show, "DPM++ 2M" for dpmpp_2m."""
        return self.labels[0] if self.labels else self.name

    @property
    def takes_eta(self) -> bool:
        """Whether eta, the share of fresh noise, is one of its options."""
        return "eta" in self.options

    @property
    def takes_schedule(self) -> bool:
        """Whether `run` wants the NoiseSchedule of the model too, as `noise_schedule=`."""
        return "noise_schedule" in inspect.signature(self.run).parameters

    def start_scale(self, sigma: float) -> float:
        """The factor of unit noise that x begins as, at the first level sigma > 0."""
        return math.sqrt(1 + sigma**2) if self.start == "prior" else sigma


SAMPLERS: dict[str, Sampler] = {}
_ALIASES: dict[str, str] = {}


def sampler(
    *labels: str, schedule: str = "uniform", start: str = "sigma", discard: bool = False, alone: bool = False
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register the decorated function under its own name and the labels that other programs use."""

    def register(function: Callable[..., Steps]) -> Callable[..., Steps]:
        name: str = getattr(function, "__name__")  # noqa: B009 - a Callable need not have one, a function has
        parameters = inspect.signature(function).parameters.values()
        options = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY) - {"noise_schedule"}
        SAMPLERS[name] = Sampler(name, function, schedule, start, options, discard, alone, labels)
        for label in (name, *labels):
            known = _ALIASES.setdefault(_key(label), name)
            if known != name:
                raise ValueError(f"sampler={label!r}: a name of both {known} and {name}")
        return function

    return register


def _key(name: str) -> str:
    """One spelling of a name: "DPM2 a", "dpm_2_ancestral" and "DPM2_a_gpu" all become dpm2a."""
    return plain(name).removesuffix("gpu").replace("ancestral", "a")


def _lookup(name: str) -> Sampler | None:
    """The sampler of a name in any spelling; "k_" and "sample_", k-diffusion's, may stand before it."""
    key = _key(name)
    for form in (key, key.removeprefix("sample"), key.removeprefix("k")):
        if form in _ALIASES:
            return SAMPLERS[_ALIASES[form]]
    return None


def find_sampler(name: str) -> Sampler:
    """The sampler of a name or label in any spelling ("DPM++ 2M", "k_dpmpp_2m", "DPMSolverMultistepScheduler").

    ValueError names the nearest ones, or all of them where none is near.
    """
    found = _lookup(name)
    if found is None:
        raise unknown("sampler", name, _key(name), _ALIASES)
    return found


def resolve(name: str, schedule: str | None = None) -> tuple[Sampler, str]:
    """Sampler and schedule of what a person wrote: ("DPM++ 2M Karras", None) -> dpmpp_2m, "karras".

    A schedule of None or "Automatic" is the one in the name, or else the sampler's own. ValueError for an unknown
    name, and where the name holds one schedule and `schedule` is another.
    """
    asked = AUTOMATIC if schedule is None else find_schedule(schedule)
    found = _lookup(name)
    if found is not None:
        return found, found.schedule if asked == AUTOMATIC else asked
    key = plain(name)
    for ending, known in sorted(schedule_names().items(), key=lambda pair: -len(pair[0])):
        head = _lookup(key.removesuffix(ending)) if key.endswith(ending) else None
        if head is None:
            continue
        chosen = {asked, known} - {AUTOMATIC}
        if len(chosen) > 1:
            raise ValueError(f"schedule={schedule!r}: the sampler {name!r} asks for {known}")
        return head, chosen.pop() if chosen else head.schedule
    raise unknown("sampler", name, _key(name), _ALIASES)


def drive(steps: Steps, denoise: Callable[[Query], Answer]) -> Tensor:
    """Run one sampler to its end with a function that answers its queries; returns the final x."""
    reply: Any = None
    while True:
        try:
            query = steps.send(reply)
        except StopIteration as stop:
            return stop.value
        reply = denoise(query)


def passed_through(steps: Steps, ask: Callable[[Query], Generator[Query, Answer, Answer]]) -> Steps:
    """The sampler `steps` with each of its queries answered by `ask`, which may edit or split it; closed with it."""
    try:
        query = next(steps)
        while True:
            answer = yield from ask(query)
            query = steps.send(answer)
    except StopIteration as stop:
        return stop.value
    finally:
        steps.close()
