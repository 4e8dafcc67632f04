"""The Python door: `Pipeline.from_pretrained(path)`, then `pipe("a red apple")` gives a Result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato import __version__
from sfumato.engine import Engine, Run, Watch
from sfumato.families import Family, Model, find_family
from sfumato.images import to_uint8
from sfumato.memory import apply, budget, describe, plan
from sfumato.tasks import hires as second_pass
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete, job_to_dict
from sfumato.tasks.decoding import decode
from sfumato.types import Answer, Hires, Job, Query, Result
from sfumato.weights.checkpoint import model_of, open_whole
from sfumato.weights.hub import resolve
from sfumato.weights.parts import Checkpoint
from sfumato.weights.placing import place

log = logging.getLogger(__name__)

PRECISIONS = {"full": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_PICTURES = 4  # decoded at once
Progress = Callable[[int, int], None]


def box_path() -> Path:
    """The checkpoint inside the package."""
    return Path(str(resources.files("sfumato").joinpath("box.safetensors")))


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else the fastest there is; ValueError where it is unknown or absent."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r}: not available here ({str(error).splitlines()[0]})") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`full` is float32; `autocast` is half precision on a GPU and float32 on a CPU, where half is slower."""
    if precision == "autocast":
        return torch.float32 if device.type == "cpu" else torch.float16
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: one of autocast, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def moved(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """The model on another device, in another precision. Its networks move: the model given is of no use after."""
    for network in model.networks.values():
        place(network, device, dtype)
    return replace(model, device=device, dtype=dtype)


@dataclass(frozen=True)
class Memory:
    """What pictures must fit into: `vram` GiB, or what is free (None). Sizes of None are the family's own."""

    vram: float | None = None
    width: int | None = None
    height: int | None = None
    count: int = 1


class Pipeline:
    """A loaded model ready to draw. Holds no state between calls.

    `max_rows` bounds the rows of a network call, `max_pictures` the pictures decoded at once; `tile` is the side of
    decoded tiles in pixels.
    """

    def __init__(
        self, model: Model, max_rows: int = 32, tile: int | None = None, max_pictures: int = MAX_PICTURES
    ) -> None:
        self.model = model
        self.tile, self.max_pictures = tile, max_pictures
        self.engine = Engine(model, max_rows)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        device: str | None = None,
        precision: str = "autocast",
        *,
        family: str | Family | None = None,
        use_ema: bool = False,
        vae: str | Path | None = None,
        variant: str | None = None,
        memory: Memory | None = None,
    ) -> Pipeline:
        """Load a single file, a diffusers folder, or a model of the Hugging Face hub ("owner/name"); None is the box.

        `family` overrides what is detected, `use_ema` takes the averaged U-Net, `vae` is a file, folder or hub name
        to take the autoencoder from, `variant` names a folder's files ("fp16"). `memory` is what must be enough; the
        plan for it is logged before anything is loaded.
        """
        chosen = choose_device(device)
        dtype = choose_dtype(precision, chosen)
        path = box_path() if path_or_id is None else resolve(path_or_id, variant=variant)
        family = find_family(family) if isinstance(family, str) else family
        other = None if vae is None else resolve(vae, variant=variant, field="vae")
        checkpoint = open_whole(path, family, use_ema, other, variant)
        if memory is None:
            return cls(model_of(checkpoint, chosen, dtype))
        return cls._within(memory, checkpoint, chosen, None if precision == "autocast" else dtype)

    @classmethod
    def _within(
        cls, memory: Memory, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
    ) -> Pipeline:
        """Plan, say the plan, load and set what it asks for."""
        family = checkpoint.family
        width, height = memory.width or family.size, memory.height or family.size
        if min(width, height) < family.size_step:
            raise ValueError(f"width={width}, height={height}: {family.size_step} px or more are needed")
        found = plan(family, width, height, memory.count, budget(memory.vram, device), device, dtype)
        log.info("%s", describe(found))
        model = model_of(checkpoint, torch.device("cpu") if found.offload else device, found.dtype)
        model = replace(model, device=device)
        apply(found, model)
        return cls(model, found.max_rows, found.tile, found.max_pictures)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move the model, and compute in another precision; None leaves as it is. Returns the pipeline itself."""
        there = self.model.device if device is None else choose_device(str(device))
        then = self.model.dtype if dtype is None else dtype
        if (there, then) != (self.model.device, self.model.dtype):
            self.model = moved(self.model, there, then)
            self.engine = Engine(self.model, self.engine.max_rows)
        return self

    def __call__(self, prompt: str = "", progress: Progress | None = None, **fields: Any) -> Result:
        """Draw `prompt`; further keyword arguments are fields of Job."""
        return self.draw(Job(prompt=prompt, **fields), progress)

    def draw(self, job: Job, progress: Progress | None = None) -> Result:
        """Draw a job. `progress(done, total)` is called after each network call with steps done, of both passes."""
        return self.draw_many([job], progress)[0]

    def draw_many(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[Result]:
        """Draw jobs together, their rows in shared network calls. `progress` counts the steps of all pictures."""
        began = time.perf_counter()
        jobs = [complete(job, self.model.family) for job in jobs]
        bar = _Bar(jobs, self.model, progress)
        latents, sigmas = self._first_pass(jobs, bar)
        for index, job in enumerate(jobs):
            if job.hires is not None:
                latents[index], sigmas[index] = self._second_pass(job, job.hires, latents[index], sigmas[index], bar)
        images = [
            to_uint8(decode(x, last, self.model, self.max_pictures, self.tile))
            for x, last in zip(latents, sigmas, strict=True)
        ]
        seconds = time.perf_counter() - began
        return [self._result(job, image, seconds) for job, image in zip(jobs, images, strict=True)]

    def _first_pass(self, jobs: Sequence[Job], bar: _Bar) -> tuple[list[Tensor], list[float]]:
        """Each job's latents (B, C, h, w) and the noise level that they are left at."""
        groups = [txt2img.starts(job, self.model) for job in jobs]
        self.engine.drive(bar.follow([run for group in groups for run in group]))
        latents = [torch.cat([_result_of(run) for run in group]) for group in groups]
        return latents, [group[0].sigmas[-1] for group in groups]

    def _second_pass(self, job: Job, hires: Hires, latents: Tensor, last: float, bar: _Bar) -> tuple[Tensor, float]:
        """The same after the pass over the larger picture."""
        second = complete(second_pass.second_job(job, hires, self.model), self.model.family)
        clean = second_pass.larger(latents, last, second, self.model, hires, self.tile)
        if hires.strength == 0:
            return clean, 0.0
        runs = second_pass.start(clean, second, self.model, second_pass.wanted_steps(job, hires))
        self.engine.drive(bar.follow(runs))
        return torch.cat([_result_of(run) for run in runs]), runs[0].sigmas[-1]

    def _result(self, job: Job, images: np.ndarray, seconds: float) -> Result:
        return Result(
            images=images,
            job=job,
            seeds=txt2img.seeds_of(job),
            seconds=seconds,
            model_name=self.model.name,
            model_hash=self.model.hash,
            precision=self.model.precision,
            made_with=made_with(self.model.device),
        )


def _result_of(run: Run) -> Tensor:
    assert run.result is not None, "nobody cancels these runs"
    return run.result


class _Bar:
    """Counts the steps that runs have left behind, each for as many pictures as the run has."""

    def __init__(self, jobs: Sequence[Job], model: Model, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0
        self.total = sum(job.count * self._steps(job, model) for job in jobs)

    def _steps(self, job: Job, model: Model) -> int:
        second = 0 if job.hires is None or job.hires.strength == 0 else second_pass.wanted_steps(job, job.hires)
        return len(txt2img.sigmas_of(job, model)) - 1 + second

    def follow(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Watch runs that are about to begin."""
        for run in runs:
            run.watch = self._watch_of(run)
        return runs

    def _watch_of(self, run: Run) -> Watch:
        seen = 0

        def watch(query: Query, answer: Answer) -> None:
            nonlocal seen
            assert run.at is not None
            step = run.at.step + 1
            self.done += max(0, step - seen) * len(query.x)
            seen = max(seen, step)
            if self.progress is not None:
                self.progress(min(self.done, self.total), self.total)

        return watch


def made_with(device: torch.device) -> dict[str, str]:
    """What else than the job decides the last bit of a picture."""
    return {"sfumato": __version__, "torch": torch.__version__.partition("+")[0], "device": device.type}


def recipe(result: Result, index: int) -> dict[str, Any]:
    """What picture `index` of a result carries in its PNG, enough for `sfumato replay` to draw it again."""
    return {
        "job": job_to_dict(result.job),
        "index": index,
        "seed": result.seeds[index],
        "model": {"name": result.model_name, "hash": result.model_hash},
        "precision": result.precision,
        "made with": result.made_with,
    }
