"""Text to image: a complete job's scene, and where it has a second pass, that of the picture made larger."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfumato.diffusion.noise import Noise
from sfumato.engine import Run, Watch
from sfumato.families import Model
from sfumato.tasks import hires
from sfumato.tasks.conditions import blank
from sfumato.tasks.scenes import Drawn, Scene, Task, noise_of, runs_of, sigmas_of, size_of
from sfumato.tasks.studio import Studio
from sfumato.types import Job


def txt2img(job: Job, studio: Studio) -> Task:
    """Draw a job's pictures from noise, and once more at a larger size where it asks for that."""
    later = 0 if job.hires is None else hires.steps_of(job, job.hires)
    drawn: Drawn = yield scene_of(job, studio.model, later=later)
    if job.hires is not None:
        job, drawn = yield from hires.second_pass(job, job.hires, drawn, studio)
    return studio.decode(drawn, job)


@torch.inference_mode()
def scene_of(job: Job, model: Model, noise: Noise | None = None, later: int = 0) -> Scene:
    """The scene of a complete job that draws from noise."""
    return Scene(job, sigmas_of(job, model), concat=blank(model, size_of(job)), noise=noise, later=later)


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
    """One run of all pictures of a complete job, not yet begun; its result is x (B, C, h, w) at the last noise level.

    `noise`, for as many pictures as the job has, replaces that of its seeds, `sigmas` the levels that it visits, and
    `scale` what the first noise is multiplied by.
    """
    noise = noise_of(job, model) if noise is None else noise
    levels = sigmas_of(job, model) if sigmas is None else sigmas
    scene = Scene(job, levels, scale=scale, concat=blank(model, size_of(job)), noise=noise)
    return runs_of(scene, model, watch)[0]
