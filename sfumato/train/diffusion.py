"""Objective of the diffusion model: predict what was added to a latent, given its caption or none.

Rombach et al. 2022, equation 3; captions are dropped for a tenth of the examples, so that the same network also
knows the unconditional answer (Ho & Salimans 2022, algorithm 1). What is predicted, the denoiser owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    sigmoid(N(logit_mean, logit_std^2)) of the way (Esser et al. 2024, section 3.1).
    """

    caption_drop_prob: float = 0.1
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.caption_drop_prob <= 1:
            raise ValueError(f"caption_drop_prob={self.caption_drop_prob}: from 0 to 1 is allowed")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma}: above 0 is needed, or None")
        for name in ("offset_noise", "input_perturbation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more is needed")
        if self.timesteps not in TIMESTEPS:
            raise ValueError(f"timesteps={self.timesteps!r}: one of {', '.join(TIMESTEPS)}")
        if not self.logit_std > 0:
            raise ValueError(f"logit_std={self.logit_std}: above 0 is needed")


Context = Callable[[list[str]], Tensor]


def frozen(text_states: Context) -> Context:
    """A text encoder that is not trained: each distinct caption is computed once and kept, in fp16."""
    kept: dict[str, Tensor] = {}

    def context(captions: list[str]) -> Tensor:
        missing = [caption for caption in dict.fromkeys(captions) if caption not in kept]
        if missing:
            with torch.no_grad():
                kept.update(zip(missing, text_states(missing).half(), strict=True))
        return torch.stack([kept[caption] for caption in captions]).float()

    return context


def draw_timesteps(config: DiffusionConfig, total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps of 0 to total - 1, (count,) int64, as the config spreads them."""
    if config.timesteps == "uniform":
        return torch.randint(total, (count,), generator=generator)
    place = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(count, generator=generator))
    return (place * total).long().clamp(max=total - 1)


class DiffusionObjective:
    """`network` holds what is trained, `denoiser` wraps its U-Net; `context` maps captions to (B, 77, D).

    Give a `frozen` context where the text encoder stays as it is; a live one lets gradients reach it. An `alignment`
    adds its term; its projector must be in `network`. ValueError where the noise goes up to none of the picture left
    and the network predicts noise: there it would have nothing to learn (Lin et al. 2023, section 3.1).
    """

    def __init__(
        self,
        network: nn.Module,
        denoiser: Denoiser[Tensor],
        context: Context,
        latent_scale: float,
        config: DiffusionConfig,
        alignment: Alignment | None = None,
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

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error, and the alignment's term where there is one; figures are unweighted."""
        config, shape, device = self.config, batch.mean.shape, batch.mean.device

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        x0 = self.latent_scale * (batch.mean + batch.std * normal(*shape))
        noise = normal(*shape)
        t = draw_timesteps(config, len(self.denoiser.schedule.sigmas), shape[0], generator).to(device)
        drop = torch.rand(shape[0], generator=generator) < config.caption_drop_prob
        if config.offset_noise:
            noise = noise + config.offset_noise * normal(*shape[:2], 1, 1)
        shown = noise + config.input_perturbation * normal(*shape) if config.input_perturbation else None
        context = self._context(batch, drop)
        x0, noise = (z.contiguous(memory_format=torch.channels_last) for z in (x0, noise))
        if self.alignment is None:
            total = self.denoiser.loss(x0, noise, t, context, config.min_snr_gamma, shown).mean()
            return total, {"loss": total}
        with self.alignment.listening():
            error = self.denoiser.loss(x0, noise, t, context, config.min_snr_gamma, shown).mean()
            aligned = self.alignment.loss(batch)
        total = error + self.alignment.weight * aligned
        return total, {"loss": error, "alignment": aligned}

    def _context(self, batch: LatentBatch, drop: Tensor) -> Tensor:
        """The captions' states (B, L, D), those kept with the batch where there are some; dropped ones are empty."""
        if batch.context is None:
            captions = ["" if dropped else caption for caption, dropped in zip(batch.captions, drop, strict=True)]
            return self.context(captions)
        if not drop.any():
            return batch.context
        empty = self.context([""]).to(batch.context)
        if empty.shape[1:] != batch.context.shape[1:]:
            raise ValueError(
                f"context: {tuple(batch.context.shape)} with the batch, the encoder gives {tuple(empty.shape)}"
            )
        return torch.where(drop.to(empty.device)[:, None, None], empty, batch.context)
