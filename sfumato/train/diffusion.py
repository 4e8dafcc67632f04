"""Objective of the diffusion model: predict what was added to a latent, given its caption or none.

Rombach et al. 2022, equation 3; captions are dropped for a tenth of the examples, so that the same network also
knows the unconditional answer (Ho & Salimans 2022, algorithm 1). What is predicted, the denoiser owns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.train.alignment import Alignment
from sfumato.train.data import LatentBatch

TIMESTEPS = ("uniform", "logit-normal")


@dataclass(frozen=True)
class DiffusionConfig:
    """What the objective does beside the plain error; None and 0 leave a thing out, and draw nothing for it.

    `min_snr_gamma` > 0: Hang et al. 2023. `offset_noise`: the deviation of noise that is one number a channel
    (Guttenberg 2023 took 0.1). `input_perturbation`: of noise that the network sees and is not asked for (Ning et al.
    2023 took 0.1). `timesteps` "logit-normal" takes those around the quantile that `logit_mean` sits at more often:
    sigmoid(N(logit_mean, logit_std^2)) of the way (Esser et al. 2024, section 3.1). `beside_drop_prob` is the share of
    pictures that the U-Net is not shown what it sees beside x, zeros instead; half of the dropped captions' are among
    them, so that 0.1 of both drops each alone and both in 5 % (Brooks et al. 2023, section 3.2.1).
    """

    caption_drop_prob: float = 0.1
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    beside_drop_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("caption_drop_prob", "beside_drop_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: from 0 to 1 is allowed")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma}: above 0 is needed, or None")
        for name in ("offset_noise", "input_perturbation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more is needed")
        if self.timesteps not in TIMESTEPS:
            raise ValueError(f"timesteps={self.timesteps!r}: one of {', '.join(TIMESTEPS)}")
        if not self.logit_std > 0:
            raise ValueError(f"logit_std={self.logit_std}: above 0 is needed")


@dataclass(frozen=True)
class Texts:
    """What text encoders say of B captions: context (B, L, D), and pooled (B, E) where the U-Net takes a vector."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class FramedBatch(LatentBatch):
    """Latents, and what a model may be told of their pictures beside a caption.

    `frames` (B, 6): height and width of the file's picture, top and left of the part that was cut out of it once
    resized, height and width of that part, in pixels. `hints` (B, 3, H, W) uint8 for a ControlNet. `shares` (B,): what
    each picture's error counts in the loss, which is then their sum; None: the mean. `beside` (B, Cc, h, w): what the
    U-Net of a model that inpaints, edits or sees depth sees beside x.
    """

    frames: Tensor | None = None
    hints: Tensor | None = None
    shares: Tensor | None = None
    beside: Tensor | None = None


States: TypeAlias = Tensor | Texts
S = TypeVar("S", Tensor, Texts)
Context = Callable[[list[str]], States]
Tell = Callable[[LatentBatch, States], Any]


def frozen(text_states: Callable[[list[str]], S]) -> Callable[[list[str]], S]:
    """A text encoder that is not trained: each distinct caption is computed once, alone, and kept, in fp16.

    Alone, so that the bits do not depend on which captions came together: a resumed run meets them in another order.
    """
    kept: dict[str, S] = {}

    def context(captions: list[str]) -> S:
        for caption in dict.fromkeys(captions):
            if caption not in kept:
                with torch.no_grad():
                    kept[caption] = _each(text_states([caption]), lambda tensor: tensor.half())
        return _joined([kept[caption] for caption in captions])

    return context


def _each(states: S, change: Callable[[Tensor], Tensor]) -> S:
    if isinstance(states, Tensor):
        return change(states)  # type: ignore[return-value]
    return Texts(change(states.context), None if states.pooled is None else change(states.pooled))


def _joined(parts: Sequence[S]) -> S:
    """Rows of one caption each as a batch, float32."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part.float() for part in parts if isinstance(part, Tensor)])  # type: ignore[return-value]
    texts = [part for part in parts if isinstance(part, Texts)]
    pooled = [part.pooled.float() for part in texts if part.pooled is not None]
    # float before joining: autocast on a CPU refuses to join fp16
    return Texts(torch.cat([part.context.float() for part in texts]), torch.cat(pooled) if pooled else None)


def draw_timesteps(config: DiffusionConfig, total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps of 0 to total - 1, (count,) int64, as the config spreads them."""
    if config.timesteps == "uniform":
        return torch.randint(total, (count,), generator=generator)
    place = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(count, generator=generator))
    return (place * total).long().clamp(max=total - 1)


class DiffusionObjective:
    """`network` holds what is trained, `denoiser` wraps its U-Net; `context` maps captions to (B, 77, D), or to Texts.

    Give a `frozen` context where the text encoder stays as it is; a live one lets gradients reach it. `tell` makes of a
    batch and its captions' states what the denoiser's network is told (None: the states themselves). An `alignment`
    adds its term; its projector must be in `network`. ValueError where the noise goes up to none of the picture left
    and the network predicts noise: there it would have nothing to learn (Lin et al. 2023, section 3.1).
    """

    def __init__(
        self,
        network: nn.Module,
        denoiser: Denoiser[Any],
        context: Context,
        latent_scale: float,
        config: DiffusionConfig,
        alignment: Alignment | None = None,
        tell: Tell | None = None,
    ) -> None:
        if denoiser.schedule.config.zero_terminal_snr and denoiser.prediction == "eps":
            raise ValueError("prediction='eps': a schedule with zero_terminal_snr needs v or sample")
        if alignment is not None:
            alignment.check(network)
        self.network = network
        self.denoiser = denoiser
        self.context = context
        self.latent_scale = latent_scale
        self.config = config
        self.alignment = alignment
        self.tell = tell
        self.partial = False  # see loop.py's Objective

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error, and the alignment's term where there is one; figures are unweighted."""
        config, shape, device = self.config, batch.mean.shape, batch.mean.device

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        x0 = self.latent_scale * (batch.mean + batch.std * normal(*shape))
        noise = normal(*shape)
        t = draw_timesteps(config, len(self.denoiser.schedule.sigmas), shape[0], generator).to(device)
        chance = torch.rand(shape[0], generator=generator)
        drop = chance < config.caption_drop_prob
        if config.offset_noise:
            noise = noise + config.offset_noise * normal(*shape[:2], 1, 1)
        shown = noise + config.input_perturbation * normal(*shape) if config.input_perturbation else None
        if isinstance(batch, FramedBatch) and batch.beside is not None and config.beside_drop_prob:
            least = min(config.caption_drop_prob / 2, 1 - config.beside_drop_prob)
            kept = (chance < least) | (chance >= least + config.beside_drop_prob)
            batch = replace(batch, beside=batch.beside * kept.to(batch.beside)[:, None, None, None])
        context = self._context(batch, drop)
        told = context if self.tell is None else self.tell(batch, context)
        x0, noise = (z.contiguous(memory_format=torch.channels_last) for z in (x0, noise))
        if self.alignment is None:
            errors = self.denoiser.loss(x0, noise, t, told, config.min_snr_gamma, shown)
            shares = batch.shares if isinstance(batch, FramedBatch) else None
            total = errors.mean() if shares is None else (shares.to(errors) * errors).sum()
            return total, {"loss": total}
        with self.alignment.listening():
            error = self.denoiser.loss(x0, noise, t, told, config.min_snr_gamma, shown).mean()
            aligned = self.alignment.loss(batch)
        total = error + self.alignment.weight * aligned
        return total, {"loss": error, "alignment": aligned}

    def _context(self, batch: LatentBatch, drop: Tensor) -> States:
        """The captions' states, those (B, L, D) kept with the batch where there are some; dropped ones are empty."""
        if batch.context is None:
            captions = ["" if dropped else caption for caption, dropped in zip(batch.captions, drop, strict=True)]
            return self.context(captions)
        if not drop.any():
            return batch.context
        empty = self.context([""])
        if isinstance(empty, Texts):
            raise ValueError("context: kept with the batch, but this model's captions have a pooled vector as well")
        if empty.shape[1:] != batch.context.shape[1:]:
            raise ValueError(
                f"context: {tuple(batch.context.shape)} with the batch, the encoder gives {tuple(empty.shape)}"
            )
        dropped = drop.to(batch.context.device)[:, None, None]
        return torch.where(dropped, empty.to(batch.context), batch.context)
