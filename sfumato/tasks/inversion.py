"""DDIM inversion: a picture's latents back to the noise that draws them, and editing by drawing on with other words.

Null-text inversion finds, for each step, an unconditional context with which guided steps stay on the way found.
Knows no flags and no files. Letters: B pictures, C latent channels, h w latent size, L tokens, D width; x = x0 + sigma
noise; d = (x - x0) / sigma is dx/dsigma, the noise that the network sees in x; n steps, levels sigmas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import ClassifierFree, Guidance, Moment
from sfumato.diffusion.samplers import Steps
from sfumato.diffusion.samplers.euler import ddim
from sfumato.diffusion.schedule import NoiseSchedule, sampling_sigmas
from sfumato.engine import Engine, Run, Watch
from sfumato.families import Model
from sfumato.tasks.checks import MAX_GUIDANCE, Range, complete, require_number
from sfumato.tasks.decoding import weights_in
from sfumato.tasks.telling import guidance_of
from sfumato.types import Cond, Job, Query

log = logging.getLogger(__name__)

SCHEDULE = "ddim"  # it ends at the smallest trained level, where the network can be asked, not at 0
MAX_ROUNDS = 100


@dataclass(frozen=True)
class Inversion:
    """The way of pictures from their latents to noise: `path` holds x (B, C, h, w) at each of `sigmas`, which rise.

    `job` says in which words and at which size it was found.
    """

    job: Job
    sigmas: tuple[float, ...]
    path: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        """x (B, C, h, w) at the last level: what to draw from."""
        return self.path[-1]


def invert(x: Tensor, sigmas: Sequence[float], rounds: int = 0, keep: Callable[[Tensor], None] | None = None) -> Steps:
    """Song et al. 2021, equation 14 read upwards: x (B, C, h, w) at sigmas[0] to x at the last of rising `sigmas`.

    DDIM's step down from b to a is x_a = x_b + (a - b) d(x_b); its inverse needs d where the step has not yet been.
    The first guess takes d(x_a) for it (at a level of 0 the network is asked about b); each of `rounds` puts the guess
    into x_b = x_a + (b - a) d(x_b) once more (Pan et al. 2023, equation 8), whose fixed point is the exact inverse.
    (1 + rounds) (n - 1) evaluations for n levels. `keep` is given x at every level.
    """
    _check_rising(sigmas)
    if keep:
        keep(x)
    for sigma, sigma_next in pairwise(sigmas):
        asked = sigma or sigma_next
        guess = x + (sigma_next - sigma) * (x - (yield Query(x, asked)).x0) / asked
        for _ in range(rounds):
            guess = x + (sigma_next - sigma) * (guess - (yield Query(guess, sigma_next)).x0) / sigma_next
        x = guess
        if keep:
            keep(x)
    return x


def _check_rising(sigmas: Sequence[float]) -> None:
    if len(sigmas) < 2 or sigmas[0] < 0 or any(b <= a for a, b in pairwise(sigmas)):
        raise ValueError(f"sigmas={tuple(sigmas)}: two levels or more are needed, rising from 0 or above")


def rising(model: Model, steps: int, strength: float = 1.0) -> list[float]:
    """The levels of inversion: those of DDIM's schedule of `steps`, upwards, the lowest `strength` of the way."""
    require_number("steps", steps, Range(1, model.family.schedule.num_timesteps - 1, whole=True))
    require_number("strength", strength, Range(0, 1))
    levels = sorted(set(sampling_sigmas(SCHEDULE, NoiseSchedule(model.family.schedule), steps)))
    return levels[: max(1, round(strength * (len(levels) - 1))) + 1]


def inverted(
    latents: Tensor,
    prompt: str,
    model: Model,
    steps: int = 50,
    rounds: int = 0,
    strength: float = 1.0,
    watch: Watch | None = None,
) -> Inversion:
    """Pictures' latents (B, C, h, w) in diffusion's scale -> their way up to noise, found with guidance 1.

    `prompt` describes what they show, "" claims nothing. `rounds` of refinement a step make `redrawn` return to them
    more exactly; `strength` below 1 ends the way earlier, so that an edit keeps more. ValueError names field and value.
    """
    require_number("rounds", rounds, Range(0, MAX_ROUNDS, whole=True))
    sigmas, job = rising(model, steps, strength), _job(latents, prompt, model, steps)
    path: list[Tensor] = []
    start = latents.to(model.device, torch.float32) * (1 + sigmas[0] ** 2) ** 0.5  # as the original's first level is
    run = Run(invert(start, sigmas, rounds, path.append), _plan(job, model), sigmas[::-1], watch)
    Engine(model).drive([run])
    return Inversion(job, tuple(sigmas), tuple(path))


def _job(latents: Tensor, prompt: str, model: Model, steps: int) -> Job:
    """The complete job whose pictures have latents of this size. ValueError where they are not the model's."""
    channels, factor = model.family.autoencoder.latent_channels, model.family.autoencoder.factor
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents: their shape is {tuple(latents.shape)}, (B, {channels}, h, w) is needed")
    height, width = (side * factor for side in latents.shape[2:])
    job = Job(prompt, width=width, height=height, steps=steps, guidance=1.0, sampler="ddim")
    return complete(job, model.family)


@torch.inference_mode()
def _plan(job: Job, model: Model) -> ClassifierFree:
    if model.family.concat is not None:
        raise ValueError(
            f"ckpt: {model.name!r} ({model.family.name}) is told of a picture too; inversion knows words only"
        )
    plan = guidance_of(job, model)
    assert isinstance(plan, ClassifierFree), "the job asks for no other guidance"
    return plan


def redrawn(
    inversion: Inversion,
    prompt: str,
    model: Model,
    guidance: float = 1.0,
    negative: str = "",
    contexts: Sequence[Tensor] | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Draw from the noise of an inversion by deterministic DDIM -> latents (B, C, h, w) in diffusion's scale.

    The prompt of the inversion gives the picture back, another one edits it. `contexts` are those of `null_text`, one
    for each step; they stand in the place of the negative prompt.
    """
    require_number("guidance", guidance, Range(0, MAX_GUIDANCE))
    job = replace(inversion.job, prompt=prompt, negative=negative, guidance=float(guidance))
    plan: Guidance = _plan(job, model)
    if contexts is not None:
        plan = null_guidance(contexts, prompt, inversion, model, guidance)
    sigmas = inversion.sigmas[::-1]
    run = Run(ddim(inversion.x, sigmas, lambda: torch.zeros_like(inversion.x)), plan, sigmas, watch)
    (x,) = Engine(model).drive([run])
    assert x is not None, "nobody cancels this run"
    return x * (1 + sigmas[-1] ** 2) ** -0.5


def null_guidance(
    contexts: Sequence[Tensor], prompt: str, inversion: Inversion, model: Model, guidance: float
) -> ClassifierFree:
    """Classifier-free guidance whose unconditional context is another one at each step, the first at the most noise.

    ValueError where there is not one context (1 or B, L, D) for each step of the inversion.
    """
    num_steps = len(inversion.sigmas) - 1
    if len(contexts) != num_steps:
        raise ValueError(f"contexts: there are {len(contexts)}, one for each of {num_steps} steps is needed")
    plan = _plan(replace(inversion.job, prompt=prompt, guidance=2.0), model)  # a scale at which there is a negative
    empty = _conds(plan)[1]
    told = [(step + 1, replace(empty, context=context)) for step, context in enumerate(contexts)]
    return ClassifierFree(plan.positive, told, float(guidance))


def _conds(plan: ClassifierFree, step: int = 0) -> tuple[Cond, Cond]:
    """What holds at a step: the prompt's only part, and the negative. ValueError for a prompt of several parts."""
    conds = plan.rows(Moment(step, 1.0, 0.0, torch.empty(0)))
    if len(conds) != 2:
        raise ValueError("prompt: parts joined by AND cannot be followed by null-text inversion")
    return conds[0], conds[1]


def null_text(
    inversion: Inversion,
    model: Model,
    guidance: float = 7.5,
    rounds: int = 10,
    rate: float = 1e-2,
    enough: float = 1e-5,
) -> list[Tensor]:
    """Null-text inversion (Mokady et al. 2023, algorithm 1): for each step the context (B, L, D) of the empty prompt.

    At each step from the noisy end Adam takes up to `rounds` steps of `rate`, which falls to half over the way, towards
    a guided step that ends on the inversion's path; it stops where the mean squared distance, in variance-preserving
    scale, is below `enough`, which rises by twice itself with each step, as the authors' program has it. Always
    float32. The default `rate` is theirs, for SD 1; the box follows its path far better at 5e-2. ValueError for numbers
    out of range.
    """
    require_number("guidance", guidance, Range(0, MAX_GUIDANCE))
    require_number("rounds", rounds, Range(0, MAX_ROUNDS, whole=True))
    for name, value in (("rate", rate), ("enough", enough)):
        require_number(name, value, Range(0, 1))
    plan = _plan(replace(inversion.job, guidance=2.0), model)
    denoiser = Denoiser(partial(_network, model), NoiseSchedule(model.family.schedule), model.family.prediction)
    levels, found = inversion.sigmas[::-1], []
    with torch.inference_mode(False), weights_in(torch.float32, model.unet):
        path = [x.clone() for x in reversed(inversion.path)]
        x, context = path[0], _conds(plan)[1].context.float().repeat(len(path[0]), 1, 1)
        for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
            conds = [_own(cond) for cond in _conds(plan, step)]
            following = _Following(denoiser, x, sigma, sigma_next, conds[0], conds[1], guidance)
            falling = rate * (1 - 0.5 * step / len(levels))
            context = following.nearest(context, path[step + 1], rounds, falling, enough * (1 + 2 * step))
            with torch.no_grad():
                x = following(context)
            found.append(context)
            log.debug("null text: step %d of %d, error %.2e", step + 1, len(levels) - 1, F.mse_loss(x, path[step + 1]))
    return found


def _network(model: Model, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return model.unet(x, t, cond.context, cond.vector, cond.state)


def _own(cond: Cond) -> Cond:
    """The cond in float32 and in memory that gradients may pass: what inference mode made may not."""
    vector = None if cond.vector is None else cond.vector.clone().float()
    return replace(cond, context=cond.context.clone().float(), vector=vector)


@dataclass(frozen=True)
class _Following:
    """A guided DDIM step from x (B, C, h, w) at sigma to sigma_next, as a function of the unconditional context."""

    denoiser: Denoiser[Cond]
    x: Tensor
    sigma: float
    sigma_next: float
    positive: Cond
    empty: Cond
    guidance: float

    def __call__(self, context: Tensor, positive: Tensor | None = None) -> Tensor:
        positive = self._x0(self.positive) if positive is None else positive
        empty = self._x0(replace(self.empty, context=context))
        x0 = empty + self.guidance * (positive - empty)
        return self.x + (self.sigma_next - self.sigma) * (self.x - x0) / self.sigma

    def _x0(self, cond: Cond) -> Tensor:
        count = len(self.x)
        vector = None if cond.vector is None else cond.vector.expand(count, -1)
        whole = replace(cond, context=cond.context.expand(count, -1, -1), vector=vector)
        return self.denoiser(self.x, [self.sigma] * count, whole)

    def nearest(self, context: Tensor, goal: Tensor, rounds: int, rate: float, enough: float) -> Tensor:
        """The context, from the one given, with which the step ends nearest to `goal`."""
        scale = 1 / (1 + self.sigma_next**2)  # of squares, to variance-preserving scale
        with torch.no_grad():
            positive = self._x0(self.positive)
        with torch.enable_grad():
            context = context.clone().requires_grad_()
            optimiser = torch.optim.Adam([context], lr=rate)
            for _ in range(rounds):
                error = scale * F.mse_loss(self(context, positive), goal)
                if error.item() < enough:
                    break
                optimiser.zero_grad()
                error.backward()
                optimiser.step()
        return context.detach()
