"""Drawing over a picture: image to image (SDEdit), inpainting and what the U-Net sees beside x, all one task.

Meng et al. 2022 (SDEdit): the picture's latents get noise of a level below the first, and are drawn on from there.
Letters: n steps of a whole schedule, k of them taken, sigma_i its levels; C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers import Steps
from sfumato.diffusion.samplers.masked import ended, hard, masked, renoised, soft
from sfumato.families import Model
from sfumato.tasks.canvas import Canvas, canvas_of
from sfumato.tasks.conditions import concat_of
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.scenes import (
    Drawn,
    OneGenerator,
    Scene,
    Task,
    Wrap,
    latent_shape,
    noise_of,
    rows_of,
    sigmas_of,
    size_of,
)
from sfumato.tasks.studio import Draw, Studio
from sfumato.types import Job


class Taken(NamedTuple):
    """Steps of the whole schedule, and how many of them are taken, the last ones."""

    whole: int
    steps: int


def _rounded(strength: float, steps: int) -> Taken:
    return Taken(steps, max(1, round(strength * steps)))


def _a1111(strength: float, steps: int) -> Taken:
    return Taken(steps, int(min(strength, 0.999) * steps) + 1)  # it takes one step more than it says


def _diffusers(strength: float, steps: int) -> Taken:
    return Taken(steps, min(int(steps * strength), steps))


def whole(strength: float, steps: int) -> Taken:
    """All of `steps`, of a schedule so much longer: A1111's "exactly the amount of steps", ComfyUI's denoise."""
    return Taken(max(steps, int(steps / min(max(strength, 1e-3), 0.999))), steps)


# How many steps a strength above 0 means, by the name that profiles have for it.
RULES: Mapping[str, Callable[[float, int], Taken]] = {
    "round": _rounded,
    "a1111": _a1111,
    "diffusers": _diffusers,
    "compvis": lambda strength, steps: Taken(steps, int(strength * steps)),
    "whole": whole,
}


@dataclass(frozen=True)
class Levels:
    """The noise levels taken, falling; x begins as `shrink` times the latents plus `scale` noise. None taken: []."""

    sigmas: list[float]
    scale: float = 0.0
    shrink: float = 1.0


def strength_of(job: Job, model: Model) -> float:
    """A complete job's strength; models that see the picture beside x begin from noise unless told otherwise.

    So does, like diffusers, what a mask frees.
    """
    profile = find_profile(job.like)
    if job.strength is not None:
        return job.strength
    if job.mask is not None and profile.noise_at_full:
        return 1.0  # of diffusers' inpainting pipeline; XL's says 0.9999, a step less
    return 1.0 if model.family.concat in ("inpaint", "picture") else profile.strength


def levels_of(job: Job, model: Model) -> Levels:
    """The levels of a complete job that draws over a picture."""
    strength, profile = strength_of(job, model), find_profile(job.like)
    rule = RULES["whole" if job.exact_steps else profile.strength_rule]
    if strength == 0 and profile.strength_rule != "a1111":  # there one step is taken all the same
        return Levels([])
    most = model.family.schedule.num_timesteps - 1
    found = rule(strength, int(job.steps or 1))
    sigmas = sigmas_of(replace(job, steps=min(found.whole, most)), model)
    if found.steps == 0:
        return Levels([])
    first = max(0, len(sigmas) - 1 - found.steps)
    taken = sigmas[first:]
    if profile.strength_rule != "compvis" or job.exact_steps or first == 0:
        return Levels(taken, taken[0] * job.noise_multiplier)
    # The original img2img.py adds the noise of one level more than its first step then takes away.
    high, low = sigmas[first - 1], taken[0]
    shrink = ((1 + low**2) / (1 + high**2)) ** 0.5
    return Levels(taken, high * shrink * job.noise_multiplier, shrink)


class Begun:
    """Noise whose first draw is `first`, what follows is that of `noise`."""

    def __init__(self, first: Tensor, noise: Noise) -> None:
        self.first: Tensor | None = first
        self._noise = noise

    def __call__(self) -> Tensor:
        found, self.first = self.first, None
        return self._noise() if found is None else found

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return self._noise.between(sigma, sigma_next)


def redraw(job: Job, studio: Studio) -> Task:
    """Draw over the job's image, of it only what is free where there is a mask."""
    return (yield from redraw_on(canvas_of(job, studio.model.family, studio.pictures), job, studio))


@torch.inference_mode()
def redraw_on(
    canvas: Canvas, job: Job, studio: Studio, noise: Noise | None = None, later: int = 0, first: int = 0
) -> Task:
    """Draw over a canvas, from `noise` where it is given; `later` steps of other scenes will follow.

    Its first picture is the whole job's picture `first`.
    """
    model, levels = studio.model, levels_of(job, studio.model)
    draw: Draw | None = None
    if find_profile(job.like).sampled and noise is None:
        noise = noise_of(job, model, levels.sigmas or None)
        draw = noise.aside if isinstance(noise, OneGenerator) else None
    if not levels.sigmas:
        every = _clean(canvas, job, studio, draw).expand(job.count, -1, -1, -1)
        return canvas.finished(studio.decode(Drawn(every, 0.0), job))
    free = None if canvas.mask is None else latent_mask(canvas.mask, model, job)
    keeps, from_noise = free is not None and not _sees_the_mask(job, model), _from_noise_alone(job, model)
    # latents that nothing is made of are not sampled either: what is drawn after them is other noise then
    clean = None if from_noise and not keeps else _clean(canvas, job, studio, draw)
    begun = None if noise is None else Begun(noise(), noise)  # drawn before what is sampled beside it
    concat = concat_of(canvas, job, studio, draw)
    wrap: Wrap | None = None
    if clean is not None and free is not None:
        if job.fill in ("noise", "nothing"):
            clean = _filled(clean, free, job, model)
        if keeps:
            wrap = _keeping(clean, free, job, levels.sigmas, None if begun is None else begun.first)
        if draw is not None and concat is None:
            draw(latent_shape(job, model))  # diffusers samples the masked picture too, and has no use for it
    drawn = yield Scene(
        job,
        levels.sigmas,
        clean=None if from_noise or clean is None else clean * levels.shrink,
        scale=None if from_noise else levels.scale,
        concat=concat,
        wrap=wrap,
        noise=begun,
        later=later,
        first=first,
        finished=canvas.finished,
        placed=canvas.placed,
    )
    return canvas.finished(studio.decode(drawn, job))


def _clean(canvas: Canvas, job: Job, studio: Studio, draw: Draw | None) -> Tensor:
    """The canvas's latents (1, C, h, w); of "latent", stretched to the job's size as latents."""
    latents = studio.encode(canvas.pixels[None], job, draw)
    factor = studio.model.family.autoencoder.factor
    size = tuple(side // factor for side in size_of(job))
    if latents.shape[-2:] != size:
        latents = F.interpolate(latents, size=size, mode="bilinear", align_corners=False)
    return latents


def _from_noise_alone(job: Job, model: Model) -> bool:
    """Whether nothing of the picture is in x: at full strength, models that see it, and masks in diffusers."""
    if strength_of(job, model) < 1 or job.noise_multiplier != 1:
        return False
    return model.family.concat in ("inpaint", "picture") or (
        job.mask is not None and find_profile(job.like).noise_at_full
    )


def _sees_the_mask(job: Job, model: Model) -> bool:
    """Whether the picture around the mask is left to a model that sees it."""
    return model.family.concat == "inpaint" and not find_profile(job.like).blends_inpainting


def latent_mask(mask: np.ndarray, model: Model, job: Job) -> Tensor:
    """A complete job's mask (H, W) of pixels -> (1, 1, h, w): a cell is free where any pixel is, or as its freest.

    Of a mask that was given, like diffusers, a cell is what its first pixel is.
    """
    factor = model.family.autoencoder.factor
    found = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
    if _renoises(job) and job.mask is not None:
        return (found[..., ::factor, ::factor] > 0).float().to(model.device)
    found = F.max_pool2d(found, factor)
    return (found if job.mask_soft else (found > 0).float()).to(model.device)


def _renoises(job: Job) -> bool:
    """Whether what is kept gets the first noise again at every level, as diffusers does it."""
    return find_profile(job.like).noise_at_full and not job.mask_soft


def _keeping(clean: Tensor, free: Tensor, job: Job, sigmas: list[float], first: Tensor | None) -> Wrap:
    """The wrapper that keeps the picture where it is not free; `first` (B, C, h, w) is the noise begun from."""
    rule = soft(free, sigmas) if job.mask_soft else hard(free)

    def wrap(steps: Steps, which: slice) -> Steps:
        kept = rows_of(clean, which)
        steps = masked(steps, kept, rule)
        if first is not None and _renoises(job):
            steps = renoised(steps, kept, free, rows_of(first, which) * job.noise_multiplier)
        return ended(steps, kept, rule, sigmas[-1])

    return wrap


def _filled(clean: Tensor, free: Tensor, job: Job, model: Model) -> Tensor:
    """Latents with noise or nothing where they are free: A1111's "latent noise" and "latent nothing"."""
    if job.fill == "nothing":
        return clean * (1 - free)
    return clean * (1 - free) + noise_of(job, model)() * free
