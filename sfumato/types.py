"""The words that the rest speaks: Job, Cond, Query, Answer, Result. Data only, no logic.

Letters: B batch, C latent channels, H W pixels, h = H/f and w = W/f latent size, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """The one description of pictures to make: flags, HTTP bodies and the recipe inside a PNG are all a Job.

    None means "the family's own": its native size, steps, guidance and sampler; a schedule of None is the sampler's.
    Picture i of `count` is drawn from seed + i. `width` and `height` are pixels, `eta` in [0, 1] is DDIM's.
    """

    prompt: str = ""
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    eta: float | None = None
    seed: int = 0
    count: int = 1


@dataclass(frozen=True)
class Cond:
    """What a network is told beside x and t: context (B, L, D); vector (B, V) where the family has one."""

    context: Tensor
    vector: Tensor | None = None


@dataclass(frozen=True)
class Query:
    """A sampler's question: x (B, C, h, w) float32 holding noise of level sigma > 0, to be denoised."""

    x: Tensor
    sigma: float


@dataclass(frozen=True)
class Answer:
    """x0, of the query's shape, and the unconditional x0 behind it where guidance computed one."""

    x0: Tensor
    uncond: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """Pictures (B, H, W, 3) uint8 and all that is needed to make them again. `seconds` is wall time of the drawing.

    `made_with` names versions and device: what else decides the last bit.
    """

    images: np.ndarray
    job: Job
    seeds: tuple[int, ...]
    seconds: float
    model_name: str
    model_hash: str
    precision: str
    made_with: dict[str, str]
