"""Objective of the KL autoencoder: absolute error of pixels and of their edges, and the KL term.

Rombach et al. 2022, section 3.1 and appendix G, so far without the perceptual and the adversarial terms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.models.autoencoder import Autoencoder
from sfumato.train.data import CaptionedBatch


def initialise(network: Autoencoder, seed: int) -> Autoencoder:
    """Random weights to train from: convolutions keep the variance of their input, biases and branches start at 0.

    With the framework's default the picture shrinks below the biases on its way through the latents, and a small
    autoencoder answers the mean picture for its first 300 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            branch = name.endswith(("conv2", "proj_out"))
            std = 0.0 if branch else module.weight[0].numel() ** -0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return network


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, along the width and along the height."""
    return images.diff(dim=3), images.diff(dim=2)


class AutoencoderObjective:
    """loss = L1 + edge_weight * L1 of edges + kl_weight * KL a latent number (nats)."""

    def __init__(self, network: Autoencoder, kl_weight: float = 3e-4, edge_weight: float = 0.5) -> None:
        self.network = network
        self.kl_weight = kl_weight
        self.edge_weight = edge_weight

    def loss(self, batch: CaptionedBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.network.encode(batch.pixels)
        shape = posterior.mean.shape
        noise = torch.randn(shape, generator=generator)
        output = self.network.decode(posterior.sample(noise))
        absolute = (output - batch.pixels).abs().mean()
        across, down = edges(output - batch.pixels)
        edge = across.abs().mean() + down.abs().mean()
        kl = posterior.kl().mean() / shape[1:].numel()
        total = absolute + self.edge_weight * edge + self.kl_weight * kl
        psnr = 10 * torch.log10(4.0 / (output - batch.pixels).square().mean())  # peak to peak is 2 in [-1, 1]
        return total, {"l1": absolute, "edge": edge, "kl": kl, "psnr": psnr}
