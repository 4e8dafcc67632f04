"""The second pass of a job ("hires fix"): the picture made larger, noised again in part, and drawn on.

Letters: B pictures, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.families import Model
from sfumato.tasks.checks import LATENT_UPSCALERS, complete
from sfumato.tasks.conditions import blank
from sfumato.tasks.redraw import whole
from sfumato.tasks.scenes import Drawn, Scene, sigmas_of, size_of
from sfumato.tasks.studio import Studio
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
        steps=min(most, whole(hires.strength, wanted_steps(job, hires)).whole),
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


def steps_of(job: Job, hires: Hires) -> int:
    """The steps that the second pass adds."""
    return 0 if hires.strength == 0 else wanted_steps(job, hires)


def second_pass(job: Job, hires: Hires, drawn: Drawn, studio: Studio) -> Generator[Scene, Drawn, tuple[Job, Drawn]]:
    """Yields the scene of the second pass over what the first drew; returns its job and its latents."""
    model = studio.model
    second = complete(second_job(job, hires, model), model.family)
    clean = larger(drawn, second, studio, hires)
    if hires.strength == 0:
        return second, Drawn(clean, 0.0)
    sigmas = sigmas_of(second, model)
    sigmas = sigmas[max(0, len(sigmas) - 1 - wanted_steps(job, hires)) :]
    return second, (yield Scene(second, sigmas, clean=clean, concat=blank(model, size_of(second))))


@torch.inference_mode()
def larger(drawn: Drawn, job: Job, studio: Studio, hires: Hires) -> Tensor:
    """What the first pass drew -> clean latents (B, C, h, w) of the second pass's size, whose job is `job`.

    The latent upscalers resize latents, the others pixels.
    """
    factor = studio.model.family.autoencoder.factor
    height, width = size_of(job)
    if hires.upscaler in LATENT_UPSCALERS:
        clean = drawn.latents * (1 + drawn.last**2) ** -0.5
        mode = MODES[hires.upscaler]
        corners = {} if mode == "nearest" else {"align_corners": False}
        return F.interpolate(clean, size=(height // factor, width // factor), mode=mode, **corners).float()
    pixels = studio.decode(drawn, job)
    return studio.encode(studio.enlarged(pixels, width, height, hires.upscaler), job)
