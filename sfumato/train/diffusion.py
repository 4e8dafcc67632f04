"""Objective of the diffusion model: predict what was added to a latent, given its caption or none.

Rombach et al. 2022, equation 3; captions are dropped for a tenth of the examples, so that the same network also
knows the unconditional answer (Ho & Salimans 2022, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.train.data import LatentBatch


@dataclass(frozen=True)
class DiffusionConfig:
    """caption_drop_prob in [0, 1]; min_snr_gamma > 0 or None (Hang et al. 2023)."""

    caption_drop_prob: float = 0.1
    min_snr_gamma: float | None = None


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


class DiffusionObjective:
    """`network` holds what is trained, `denoiser` wraps its U-Net; `context` maps captions to (B, 77, D).

    Give a `frozen` context where the text encoder stays as it is; a live one lets gradients reach it.
    """

    def __init__(
        self,
        network: nn.Module,
        denoiser: Denoiser[Tensor],
        context: Context,
        latent_scale: float,
        config: DiffusionConfig,
    ) -> None:
        self.network = network
        self.denoiser = denoiser
        self.context = context
        self.latent_scale = latent_scale
        self.config = config

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        shape = batch.mean.shape
        x0 = self.latent_scale * (batch.mean + batch.std * torch.randn(shape, generator=generator))
        noise = torch.randn(shape, generator=generator)
        t = torch.randint(len(self.denoiser.schedule.sigmas), (shape[0],), generator=generator)
        drop = torch.rand(shape[0], generator=generator) < self.config.caption_drop_prob
        captions = ["" if dropped else caption for caption, dropped in zip(batch.captions, drop, strict=True)]
        context = self.context(captions)
        x0, noise = (z.contiguous(memory_format=torch.channels_last) for z in (x0, noise))
        total = self.denoiser.loss(x0, noise, t, context, self.config.min_snr_gamma).mean()
        return total, {"loss": total}
