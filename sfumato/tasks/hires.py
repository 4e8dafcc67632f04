"""The second pass of a job ("hires fix"): the picture made larger, noised again in part, and drawn on.

Each pass is a list of runs for the engine. Letters: C latent channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.diffusion.noise import SeededNoise
from sfumato.engine import Run, Watch
from sfumato.families import Model
from sfumato.images import from_uint8, resize, to_uint8
from sfumato.tasks.checks import LATENT_UPSCALERS, sampler_of
from sfumato.tasks.decoding import decode
from sfumato.tasks.telling import guidance_of
from sfumato.tasks.txt2img import blank, noise_spec, sampler_options, seeds_of, sigmas_of, size_of, spec_of
from sfumato.types import Hires, Job

MODES = {"latent": "bilinear", "latent bilinear": "bilinear", "latent bicubic": "bicubic", "latent nearest": "nearest"}


def second_job(job: Job, hires: Hires, model: Model) -> Job:
    """The job of the second pass: larger, with its own settings where they are said; its steps are a full schedule's,
    of which the last `wanted_steps` are taken."""
    step = model.family.size_step
    most = model.family.schedule.num_timesteps - 1
    other = hires.sampler is not None or hires.schedule is not None
    return replace(
        job,
        width=round(int(job.width or 0) * hires.scale / step) * step,
        height=round(int(job.height or 0) * hires.scale / step) * step,
        steps=min(most, whole_steps(wanted_steps(job, hires), hires.strength)),
        guidance=job.guidance if hires.guidance is None else hires.guidance,
        sampler=hires.sampler or job.sampler,
        schedule=hires.schedule if other else job.schedule,
        prompt=job.prompt if hires.prompt is None else hires.prompt,
        negative=job.negative if hires.negative is None else hires.negative,
        noise_width=None,
        noise_height=None,
        hires=None,
    )


def wanted_steps(job: Job, hires: Hires) -> int:
    """The steps that the second pass really takes, for the job of the first."""
    return hires.steps or int(job.steps or 1)


def whole_steps(wanted: int, strength: float) -> int:
    """The steps of a full schedule of which the last `wanted` begin at `strength` of the noise, as A1111 counts."""
    return max(wanted, int(wanted / min(max(strength, 1e-3), 0.999)))


@torch.inference_mode()
def larger(latents: Tensor, last_sigma: float, job: Job, model: Model, hires: Hires, tile: int | None = None) -> Tensor:
    """First-pass latents (B, C, h, w) at `last_sigma` -> clean latents of the second pass's size.

    `job` is that of the second pass. The latent upscalers resize latents, the others pixels.
    """
    factor = model.family.autoencoder.factor
    size = (size_of(job)[0] // factor, size_of(job)[1] // factor)
    if hires.upscaler in LATENT_UPSCALERS:
        clean = latents * (1 + last_sigma**2) ** -0.5
        mode = MODES[hires.upscaler]
        corners = {} if mode == "nearest" else {"align_corners": False}
        return F.interpolate(clean, size=size, mode=mode, **corners)
    pixels = resize(
        to_uint8(decode(latents, last_sigma, model, tile=tile)), size[1] * factor, size[0] * factor, hires.upscaler
    )
    images = from_uint8(pixels).to(model.device, model.dtype)
    return torch.cat([model.autoencoder.encode(one[None]).mean.float() for one in images]) * model.family.latent_scale


@torch.inference_mode()
def start(clean: Tensor, job: Job, model: Model, wanted: int, watch: Watch | None = None) -> list[Run]:
    """The runs of the second pass from clean latents (B, C, h, w): the last `wanted` steps of `second_job`'s job."""
    sampler, sigmas = sampler_of(job), sigmas_of(job, model)
    sigmas = sigmas[max(0, len(sigmas) - 1 - wanted) :]
    plan = guidance_of(job, model, blank(model, size_of(job)))
    spec, options = noise_spec(job, model), sampler_options(job, model)
    channels, height, width = clean.shape[1:]
    runs = []
    for index, seed in enumerate(seeds_of(job)):
        noise = SeededNoise([seed], (channels, height, width), model.device, spec_of(spec, index), sigmas)
        x = clean[index : index + 1].float() + noise() * sigmas[0]
        runs.append(Run(sampler.run(x, sigmas, noise, **options), plan, sigmas, watch))
    return runs
