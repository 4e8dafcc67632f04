"""The words that the rest speaks: Job, Cond, NetState, Query, Answer, Result. Data only, no logic.

Letters: B batch, C latent channels, H W pixels, h = H/f and w = W/f latent size, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # the command line reads a Job's fields for its help, which needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class Hires:
    """A second pass over the picture made larger ("hires fix"); None is the first pass's own.

    `scale` is the enlargement, `upscaler` one of images.UPSCALERS or "latent" and its kin, `strength` in [0, 1] how
    much of the noise comes back; `steps` are those really taken.
    """

    scale: float = 2.0
    upscaler: str = "latent"
    strength: float = 0.7
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    prompt: str | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Control:
    """A picture that steers a drawing through a network of its own (tasks/extras.py).

    `model` is the network's name or file, `image` the picture (None: the job's own), `annotate` what makes the hint of
    it, such as "canny" with its `options` (None: it is the hint), or for IP-Adapters the image encoder (None: the one
    there is). It works with `weight` in the steps from fraction
    `start` to before `end`. `mode`: "balanced", or what matters more: "prompt", "control"; or "guess".
    """

    model: str = ""
    image: str | None = None
    annotate: str | None = None
    options: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    resize: str = "crop"


@dataclass(frozen=True)
class Job:
    """The one description of pictures to make: flags, HTTP bodies and the recipe inside a PNG are all a Job.

    None means "the family's own", or the profile's where `like` names one: native size, steps, guidance, sampler; a
    schedule of None is the sampler's. Picture i of `count` is drawn from seed + i. Sizes are pixels, fractions are of
    the steps; `eta` in [0, 1] and `options` are the sampler's. What each field allows: tasks/checks.py.
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
    options: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    count: int = 1
    like: str | None = None  # a profile: the program whose pictures the same settings are to give

    # How texts are read.
    weighting: str | None = None
    clip_skip: int | None = None

    # How noise is drawn (diffusion/noise.py).
    noise: str | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0
    noise_width: int | None = None
    noise_height: int | None = None
    ensd: int = 0

    # How guidance works (diffusion/guidance).
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_low: float = 0.0  # sigmas between which guidance works
    guidance_high: float | None = None
    guidance_thin: float = 0.0  # the sigma below which only every second step has guidance
    rescale: float = 0.0
    threshold: float | None = None
    mimic: float | None = None
    pag: float = 0.0
    sag: float = 0.0
    freeu: tuple[float, ...] | None = None

    # Fewer operations, at a distance from the exact picture (docs/fewer-operations.md).
    reuse: str | None = None  # "N" or "N:DEPTH": deep features are computed in every N-th call only
    tome: float = 0.0  # share of the cells that self-attention merges

    # What XL is told of an original (None: the picture's own size, uncropped), its refiner of beauty (6 and 2.5).
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    aesthetic: float | None = None
    negative_aesthetic: float | None = None

    hires: Hires | None = None

    # The picture that is drawn over (tasks/redraw.py): a file's path, or a name that the caller has a picture for.
    image: str | None = None
    strength: float | None = None  # in [0, 1], how much of the noise comes back
    exact_steps: bool = False  # take all of `steps` whatever the strength
    resize: str | None = None  # how a picture of another size becomes width x height
    noise_multiplier: float = 1.0

    # Of it only what the mask shows (tasks/canvas.py): white is drawn anew.
    mask: str | None = None
    mask_blur_x: float | None = None  # px, standard deviation
    mask_blur_y: float | None = None
    mask_invert: bool = False
    mask_resize: bool = False  # stretch a mask of another size over the picture
    from_alpha: bool = False  # without a mask: what is transparent is drawn anew
    mask_soft: bool = False  # grey is changed in part (Levin & Fried 2023)
    fill: str | None = None  # what is under the mask to begin with
    only_masked: bool = False  # draw the mask's surroundings alone, at width x height
    padding: int = 32  # px around them

    # What is put on at each side, in px (tasks/outpaint.py).
    left: int = 0
    right: int = 0
    up: int = 0
    down: int = 0
    falloff: float = 1.0
    colour_variation: float = 0.05

    controls: tuple[Control, ...] = ()  # what steers the drawing

    # What else is made of it.
    depth: str | None = None  # its depth map, bright is near, or a network's file that finds it
    image_guidance: float | None = None  # how hard the picture pulls, of models that edit by instruction
    upscale: float | None = None
    upscaler: str | None = None
    tile: int | None = None  # px; larger pictures are drawn, encoded and decoded in tiles
    overlap: int | None = None  # px of neighbouring tiles
    seamless: str = ""  # "x", "y", "xy": edges that meet


@dataclass(frozen=True)
class NetState:
    """How a U-Net is changed, or looked into, for a row. Rows of different states never share a network call.

    In the blocks named in `perturbed` self-attention is the identity; `freeu` is (b1, b2, s1, s2); of the first
    self-attention in the block `probe` the map comes back with the row's answer, and with `cross` those of all
    attentions to the context. In the directions `seamless` opposite edges meet: left and right (x), top and bottom (y).
    With `reuse` (every, depth) the deep part is computed in every so many-th call of a row (models/reuse.py), with
    `tome` that share of cells is merged in self-attention (models/merging.py).
    """

    perturbed: tuple[str, ...] = ()
    freeu: tuple[float, float, float, float] | None = None
    probe: str | None = None
    seamless: tuple[bool, bool] = (False, False)
    cross: bool = False
    reuse: tuple[int, int] | None = None
    tome: float = 0.0


@dataclass(frozen=True)
class Garment:
    """An adapter on a U-Net in the steps from fraction `start` to before `end`: `what` says which, and how strongly.

    What that may be is known to whoever puts it on. Rows with different adapters never share a network call.
    """

    what: Hashable
    start: float = 0.0
    end: float = 1.0


class Steering(Protocol):
    """A network beside the U-Net. Letters as in Steer; `hint` and what comes back have a row for each of x."""

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None, hint: Tensor) -> Any:
        """What is added inside the U-Net (models.residuals.Residuals); None: nothing."""

    def around(self, unet: Any, hint: Tensor, weight: float | tuple[float, ...]) -> AbstractContextManager[None]:
        """Inside, the U-Net is changed; afterwards it is as it was."""


@dataclass(frozen=True, eq=False)
class Steer:
    """A network that steers the U-Net by a picture in the steps from fraction `start` to before `end`.

    The `hint` is (1, 3, H, W) in [0, 1], as large as the pictures drawn, or tokens (1, N, D) that stand for a picture.
    `weight` is one number, or one for each layer.
    """

    network: Steering
    hint: Tensor
    weight: float | tuple[float, ...] = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Cond:
    """What a network is told beside x and t: context (B, L, D); vector (B, V) where the family has one.

    `concat` (B, Cc, h, w) is what the network sees beside x in its input, where the family wants it (inpainting).
    A `state` of None is the network as it is; `worn` are adapters on it, `steered` what steers it.
    """

    context: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None
    state: NetState | None = None
    worn: tuple[Garment, ...] = ()
    steered: tuple[Steer, ...] = ()


@dataclass(frozen=True)
class Query:
    """A sampler's question: x (B, C, h, w) float32 holding noise of level sigma > 0, to be denoised.

    Where x is a tile, `window` is where it lies in the whole picture: (top, left, height, width) in latent cells, and
    `cut` are the directions (x, y) in which it is less than the whole, so that its own edges do not meet.
    """

    x: Tensor
    sigma: float
    window: tuple[int, int, int, int] | None = None
    cut: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Answer:
    """x0, of the query's shape; behind it, where guidance computed them, the unconditional x0 and that of scale 1."""

    x0: Tensor
    uncond: Tensor | None = None
    cond: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """Pictures (B, H, W, 3) uint8 and all that is needed to make them again. `seconds` is wall time of the drawing.

    `made_with` names versions and device: what else decides the last bit. `pictures` are the SHA-256 of the pixels that
    the job's fields name, `adapters` those of the files that its prompts and controls name. `model_facts` say how the
    model's file was read, where a person asked for it.
    """

    images: np.ndarray
    job: Job
    seeds: tuple[int, ...]
    seconds: float
    model_name: str
    model_hash: str
    precision: str
    made_with: dict[str, str]
    pictures: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    model_facts: dict[str, Any] = field(default_factory=dict)
