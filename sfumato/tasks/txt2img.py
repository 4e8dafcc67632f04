"""Text to image: a complete Job -> the run that draws its latents, and the latents -> pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.diffusion.guidance import ClassifierFree
from sfumato.diffusion.noise import SeededNoise
from sfumato.diffusion.samplers import find_sampler
from sfumato.diffusion.schedule import NoiseSchedule, sampling_sigmas
from sfumato.engine import Run, Watch
from sfumato.families import Model
from sfumato.prompts.encode import encode
from sfumato.types import Job


def seeds_of(job: Job) -> tuple[int, ...]:
    """The seed of each picture."""
    return tuple(range(job.seed, job.seed + job.count))


def sigmas_of(job: Job, model: Model) -> list[float]:
    """The noise levels that a complete job visits, falling."""
    return sampling_sigmas(str(job.schedule), NoiseSchedule(model.family.schedule), int(job.steps or 1))


@torch.inference_mode()
def start(job: Job, model: Model, watch: Watch | None = None) -> Run:
    """The run of a complete job, not yet begun; its result is x at the last noise level."""
    family, sampler = model.family, find_sampler(str(job.sampler))
    factor = family.autoencoder.factor
    shape = (family.autoencoder.latent_channels, int(job.height or 0) // factor, int(job.width or 0) // factor)
    noise = SeededNoise(seeds_of(job), shape, model.device)
    sigmas = sigmas_of(job, model)
    options = {} if job.eta is None else {"eta": job.eta}
    x = noise() * sampler.start_scale(sigmas[0])
    scale = float(job.guidance or 0.0)
    texts = [job.prompt] if scale == 1.0 else [job.prompt, job.negative]
    conds = [encode(model.text, model.tokenizer, [text], family.skip_last, family.pad_token) for text in texts]
    guidance = ClassifierFree(conds[0], conds[1] if len(conds) > 1 else None, scale)
    return Run(sampler.run(x, sigmas, noise, **options), guidance, watch)


@torch.inference_mode()
def decode(latents: Tensor, last_sigma: float, model: Model, max_pictures: int = 4) -> Tensor:
    """Final x (B, C, h, w) at `last_sigma` -> images (B, 3, H, W) about [-1, 1], `max_pictures` at a time.

    A schedule that ends above 0 ends in variance-preserving scale, as the original DDIM does. ValueError where a
    number overflowed or the weights hold none.
    """
    z = latents * (1 + last_sigma**2) ** -0.5 / model.family.latent_scale
    z = z.to(model.dtype, memory_format=torch.channels_last)
    images = torch.cat([model.autoencoder.decode(part).float() for part in z.split(max_pictures)])
    if not images.isfinite().all():
        raise ValueError(f"precision={model.precision!r}: the picture is not finite; 'full' may mend it")
    return images
