"""Text to image: a complete Job -> runs of the engine, whose results are the pictures' latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.guidance import Guidance
from sfumato.diffusion.noise import Noise, NoiseSpec, SeededNoise
from sfumato.diffusion.schedule import NoiseSchedule, sampling_sigmas
from sfumato.engine import Run, Watch
from sfumato.families import Model
from sfumato.tasks.checks import sampler_of
from sfumato.tasks.diffusers_scheduler import Scheduler, scheduler_of
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.telling import guidance_of
from sfumato.types import Job


def noise_spec(job: Job, model: Model) -> NoiseSpec:
    """How a complete job's noise is drawn."""
    factor = model.family.autoencoder.factor
    resize_from = None
    if job.noise_width is not None and job.noise_height is not None:
        resize_from = (max(1, job.noise_height // factor), max(1, job.noise_width // factor))
    source = str(job.noise or "cpu")
    return NoiseSpec(source, job.variation_seed, job.variation_strength, resize_from, job.ensd)


def seeds_of(job: Job) -> tuple[int, ...]:
    """The seed of each picture: seed + i, but all the same where their variation seeds differ."""
    if job.variation_strength > 0:
        return (job.seed,) * job.count
    return tuple(range(job.seed, job.seed + job.count))


def sigmas_of(job: Job, model: Model) -> list[float]:
    """The noise levels that a complete job visits, falling."""
    schedule, sampler = NoiseSchedule(model.family.schedule), sampler_of(job)
    if (scheduler := _scheduler_of(job, model)) and (levels := scheduler.levels(schedule, int(job.steps or 1))):
        return levels
    table = "sdxl" if model.family.size_cond else "sd1"
    return sampling_sigmas(str(job.schedule), schedule, int(job.steps or 1), discard=sampler.discard, table=table)


def start_scale(job: Job, model: Model, sigma: float) -> float:
    """What the first noise is multiplied by, for a complete job whose first level is sigma."""
    scheduler = _scheduler_of(job, model)
    return sampler_of(job).start_scale(sigma) * (1.0 if scheduler is None else scheduler.start_scale(sigma))


def _scheduler_of(job: Job, model: Model) -> Scheduler | None:
    """diffusers' scheduler, where a job is to be like it and asks for no schedule but the sampler's own."""
    sampler = sampler_of(job)
    if not find_profile(job.like).diffusers_levels or job.schedule != sampler.schedule:
        return None
    return scheduler_of(sampler.name, model.family)


def latent_shape(job: Job, model: Model) -> tuple[int, int, int]:
    """(C, h, w) of one picture of a complete job."""
    factor = model.family.autoencoder.factor
    height, width = size_of(job)
    return (model.family.autoencoder.latent_channels, height // factor, width // factor)


class OneGenerator(SeededNoise):
    """Noise of all pictures, (B, C, h, w) a draw, from one generator of one seed, as other programs draw a batch."""

    def __init__(self, seed: int, count: int, shape: tuple[int, int, int], device: torch.device, source: str) -> None:
        channels, height, width = shape
        super().__init__([seed], (count * channels, height, width), device, NoiseSpec(source))
        self._split = (count, *shape)

    def __call__(self) -> Tensor:
        return super().__call__().reshape(self._split)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return super().between(sigma, sigma_next).reshape(self._split)


def spec_of(spec: NoiseSpec, index: int) -> NoiseSpec:
    """The spec of picture `index` alone: its own variation seed."""
    if spec.variation_seed is None:
        return spec
    return NoiseSpec(spec.source, spec.variation_seed + index, spec.variation_strength, spec.resize_from, spec.ensd)


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


def run_of(
    job: Job,
    model: Model,
    plan: Guidance,
    noise: Noise,
    watch: Watch | None = None,
    sigmas: Sequence[float] | None = None,
    scale: float | None = None,
) -> Run:
    """One run of all the pictures that `noise` is for, on the job's levels and from its scale where none are given."""
    sampler, sigmas = sampler_of(job), sigmas_of(job, model) if sigmas is None else sigmas
    x = noise() * (start_scale(job, model, sigmas[0]) if scale is None else scale)
    return Run(sampler.run(x, sigmas, noise, **sampler_options(job, model)), plan, sigmas, watch)


@torch.inference_mode()
def start(
    job: Job,
    model: Model,
    watch: Watch | None = None,
    *,
    noise: Noise | None = None,
    sigmas: Sequence[float] | None = None,
    scale: float | None = None,
) -> Run:
    """The run of all pictures of a complete job, not yet begun; its result is x (B, C, h, w) at the last noise level.

    `noise`, for as many pictures as the job has, replaces that of its seeds, `sigmas` the levels that it visits, and
    `scale` what the first noise is multiplied by.
    """
    plan = guidance_of(job, model, blank(model, size_of(job)))
    return run_of(job, model, plan, noise_of(job, model) if noise is None else noise, watch, sigmas, scale)


def noise_of(job: Job, model: Model) -> Noise:
    """The noise of all pictures of a complete job: picture i has its own generator, or all have one."""
    shape, spec = latent_shape(job, model), noise_spec(job, model)
    if find_profile(job.like).one_generator and not spec.varies:
        return OneGenerator(job.seed, job.count, shape, model.device, spec.source)
    return SeededNoise(seeds_of(job), shape, model.device, spec, sigmas_of(job, model))


@torch.inference_mode()
def starts(job: Job, model: Model, watch: Watch | None = None) -> list[Run]:
    """A run for each picture of a complete job, so that the engine may batch them as it likes.

    Pictures of one generator stay together in one run.
    """
    plan = guidance_of(job, model, blank(model, size_of(job)))
    shape, spec = latent_shape(job, model), noise_spec(job, model)
    if find_profile(job.like).one_generator and not spec.varies:
        return [run_of(job, model, plan, noise_of(job, model), watch)]
    runs = []
    for index, seed in enumerate(seeds_of(job)):
        noise = SeededNoise([seed], shape, model.device, spec_of(spec, index), sigmas_of(job, model))
        runs.append(run_of(job, model, plan, noise, watch))
    return runs


def size_of(job: Job) -> tuple[int, int]:
    """(height, width) of a complete job, in pixels."""
    return int(job.height or 0), int(job.width or 0)


def blank(model: Model, size: tuple[int, int]) -> Tensor | None:
    """What an inpainting U-Net sees beside x where all (height, width) is to be drawn; None for most families.

    A mask of ones, then the latents of a grey picture. ValueError where a family cannot draw from words alone.
    """
    family = model.family
    if family.concat is None:
        return None
    if family.concat != "inpaint":
        raise ValueError(f"ckpt: {model.name!r} ({family.name}) draws from a picture, not from words alone")
    grey = torch.zeros(1, 3, *size, device=model.device, dtype=model.dtype)
    latents = model.autoencoder.encode(grey).mean * family.latent_scale
    return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1)
