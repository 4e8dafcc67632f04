"""A scene: one drawing of a complete job, as what the engine runs; and the words in which tasks ask for scenes.

A task is a coroutine: it yields scenes and is sent their latents, and returns pictures. So tasks of many jobs are drawn
together, and one that needs several drawings is still one function. Letters: B pictures, C latent channels, h w.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.diffusion.noise import Noise, NoiseSpec, SeededNoise
from sfumato.diffusion.samplers import Steps
from sfumato.diffusion.samplers.tiled import tiled
from sfumato.diffusion.schedule import NoiseSchedule, sampling_sigmas
from sfumato.engine import Run, Watch
from sfumato.families import Model
from sfumato.tasks.checks import sampler_of
from sfumato.tasks.diffusers_scheduler import Scheduler, scheduler_of
from sfumato.tasks.extras import Extras
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.telling import guidance_of
from sfumato.types import Job

Wrap = Callable[[Steps, slice], Steps]  # a sampler's steps and which pictures of the scene they draw


@dataclass(frozen=True)
class Scene:
    """A complete job's pictures, drawn once: x begins as `clean` + `scale` noise and goes through `sigmas`.

    `clean` (1 or B, C, h, w) None is nothing; `scale` None is the first level, and the sampler's own without `clean`.
    `concat` (1, Cc, h, w) is what the U-Net sees beside x and `label` the class that it is told, of families that have
    one; `wrap` goes around the sampler. `noise` is drawn from
    instead of the seeds' own, for all pictures as one. `later` counts the steps of the scenes that the task knows to
    follow. For those who look on: the scene's first picture is the job's picture `first`, and `finished` and `placed`
    are its canvas's (canvas.Canvas).
    """

    job: Job
    sigmas: Sequence[float]
    clean: Tensor | None = None
    scale: float | None = None
    concat: Tensor | None = None
    label: int | None = None
    wrap: Wrap | None = None
    noise: Noise | None = None
    later: int = 0
    first: int = 0
    finished: Callable[[np.ndarray], np.ndarray] = lambda pictures: pictures
    placed: Callable[[np.ndarray], np.ndarray] = lambda plane: plane

    @property
    def steps(self) -> int:
        """Steps of all pictures, and of the scenes that follow."""
        return (len(self.sigmas) - 1 + self.later) * self.job.count


@dataclass(frozen=True)
class Drawn:
    """A scene's latents (B, C, h, w), left at the noise level `last`."""

    latents: Tensor
    last: float


Task = Generator[Scene, Drawn, np.ndarray]  # returns pictures (B, H, W, 3) uint8


def seeds_of(job: Job) -> tuple[int, ...]:
    """The seed of each picture: seed + i, but all the same where their variation seeds differ."""
    if job.variation_strength > 0:
        return (job.seed,) * job.count
    return tuple(range(job.seed, job.seed + job.count))


def size_of(job: Job) -> tuple[int, int]:
    """(height, width) of a complete job, in pixels."""
    return int(job.height or 0), int(job.width or 0)


def latent_shape(job: Job, model: Model) -> tuple[int, int, int]:
    """(C, h, w) of one picture of a complete job."""
    factor = model.family.autoencoder.factor
    height, width = size_of(job)
    return (model.family.autoencoder.latent_channels, height // factor, width // factor)


def sigmas_of(job: Job, model: Model) -> list[float]:
    """The noise levels that a complete job visits from pure noise on, falling."""
    schedule, sampler = NoiseSchedule(model.family.schedule), sampler_of(job)
    if (scheduler := _scheduler_of(job, model)) and (levels := scheduler.levels(schedule, int(job.steps or 1))):
        return levels
    table = "sdxl" if model.family.size_cond else "sd1"
    return sampling_sigmas(str(job.schedule), schedule, int(job.steps or 1), discard=sampler.discard, table=table)


def start_scale(job: Job, model: Model, sigma: float) -> float:
    """What the first noise is multiplied by where nothing else is there, for a job whose first level is sigma."""
    scheduler = _scheduler_of(job, model)
    return sampler_of(job).start_scale(sigma) * (1.0 if scheduler is None else scheduler.start_scale(sigma))


def _scheduler_of(job: Job, model: Model) -> Scheduler | None:
    """diffusers' scheduler, where a job is to be like it and asks for no schedule but the sampler's own."""
    sampler = sampler_of(job)
    if not find_profile(job.like).diffusers_levels or job.schedule != sampler.schedule:
        return None
    return scheduler_of(sampler.name, model.family)


def sampler_options(job: Job, model: Model) -> dict[str, Any]:
    """The keyword arguments of a complete job's sampler."""
    options: dict[str, Any] = dict(job.options)
    if job.eta is not None:
        options["eta"] = job.eta
    theirs = find_profile(job.like).diffusers_levels and model.family.prediction == "v"
    if theirs and "velocity" in sampler_of(job).options:
        options.setdefault("velocity", True)
    if sampler_of(job).takes_schedule:
        options["noise_schedule"] = NoiseSchedule(model.family.schedule)
    return options


class OneGenerator(SeededNoise):
    """Noise of all pictures, (B, C, h, w) a draw, from one generator of one seed, as other programs draw a batch."""

    def __init__(self, seed: int, count: int, shape: tuple[int, int, int], device: torch.device, source: str) -> None:
        channels, height, width = shape
        super().__init__([seed], (count * channels, height, width), device, NoiseSpec(source))
        self._split = (count, *shape)

    def __call__(self) -> Tensor:
        return super().__call__().reshape(self._split)

    def aside(self, shape: tuple[int, ...]) -> Tensor:
        """Noise of another shape, drawn between: other programs sample a picture's latents so."""
        return self._generators[0].randn(shape).to(self.device)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return super().between(sigma, sigma_next).reshape(self._split)


def noise_spec(job: Job, model: Model) -> NoiseSpec:
    """How a complete job's noise is drawn."""
    factor = model.family.autoencoder.factor
    resize_from = None
    if job.noise_width is not None and job.noise_height is not None:
        resize_from = (max(1, job.noise_height // factor), max(1, job.noise_width // factor))
    source = str(job.noise or "cpu")
    return NoiseSpec(source, job.variation_seed, job.variation_strength, resize_from, job.ensd)


def has_one_generator(job: Job, model: Model) -> bool:
    """Whether all pictures of a complete job draw from one generator, and so stay together in one run."""
    return find_profile(job.like).one_generator and not noise_spec(job, model).varies


def noise_of(job: Job, model: Model, sigmas: Sequence[float] | None = None) -> Noise:
    """The noise of all pictures of a complete job: picture i has its own generator, or all have one.

    `sigmas` are the levels of the run where they are not all of the job's.
    """
    shape, spec = latent_shape(job, model), noise_spec(job, model)
    if has_one_generator(job, model):
        return OneGenerator(job.seed, job.count, shape, model.device, spec.source)
    return SeededNoise(seeds_of(job), shape, model.device, spec, sigmas or sigmas_of(job, model))


def _noises(scene: Scene, model: Model) -> list[tuple[slice, Noise]]:
    """Which pictures each run of a scene draws, and from what noise."""
    job = scene.job
    every = slice(0, job.count)
    if scene.noise is not None:
        return [(every, scene.noise)]
    if has_one_generator(job, model):
        return [(every, noise_of(job, model, scene.sigmas))]
    shape, spec = latent_shape(job, model), noise_spec(job, model)
    found: list[tuple[slice, Noise]] = []
    for index, seed in enumerate(seeds_of(job)):
        other = None if spec.variation_seed is None else spec.variation_seed + index
        own = replace(spec, variation_seed=other)
        found.append((slice(index, index + 1), SeededNoise([seed], shape, model.device, own, scene.sigmas)))
    return found


@torch.inference_mode()
def runs_of(scene: Scene, model: Model, watch: Watch | None = None, extras: Extras | None = None) -> list[Run]:
    """The runs of a scene, not yet begun: one for each picture, so that the engine may batch them as it likes."""
    job, sampler = scene.job, sampler_of(scene.job)
    plan = guidance_of(job, model, scene.concat, scene.label, extras)
    options = sampler_options(job, model)
    scale = scene.scale
    if scale is None:
        scale = start_scale(job, model, scene.sigmas[0]) if scene.clean is None else scene.sigmas[0]
    runs = []
    for which, noise in _noises(scene, model):
        x = noise() * scale
        if scene.clean is not None:
            x = x + rows_of(scene.clean, which)
        steps = sampler.run(x, scene.sigmas, noise, **options)
        if scene.wrap is not None:
            steps = scene.wrap(steps, which)
        if job.tile is not None:
            factor = model.family.autoencoder.factor
            steps = tiled(steps, job.tile // factor, overlap_of(job) // factor, seamless_of(job))
        runs.append(Run(steps, plan, scene.sigmas, watch, seeds=seeds_of(job)[which]))
    return runs


def seamless_of(job: Job) -> tuple[bool, bool]:
    """The directions (x, y) in which opposite edges of the pictures meet."""
    return "x" in job.seamless, "y" in job.seamless


def overlap_of(job: Job) -> int:
    """Pixels that neighbouring tiles share, of a complete job with tiles."""
    return int(job.overlap or 0)


def rows_of(x: Tensor, which: slice) -> Tensor:
    """The rows of some pictures; a single row serves all."""
    return x if len(x) == 1 else x[which]
