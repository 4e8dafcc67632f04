"""Objective of the KL autoencoder: pixels, their edges, how pictures look, a critic's opinion, and the KL term.

Esser et al. 2021, section 3.1; Rombach et al. 2022, section 3.1 and appendix G; the terms' order and schedule are
those of ldm's LPIPSWithDiscriminator, but every term here is a mean over its numbers, not a sum. Knows no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.autoencoder import Autoencoder, Posterior
from sfumato.train.critic import adaptive_weight, adversarial, critic_hinge, held
from sfumato.train.data import CaptionedBatch
from sfumato.train.perceptual import Perceptual


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the terms, and what of the pictures and of the network takes part.

    reconstruction = L1 + edge_weight * L1 of edges + perceptual_weight * perceptual; the loss is reconstruction /
    exp(logvar) + logvar + kl_weight * KL a latent number (nats) + critic_weight * adaptive weight * adversarial, the
    last from step `critic_start` on. ldm's KL weight w for sums is w * latent numbers / picture numbers here. `logvar`
    is a constant, as in effect in ldm, whose optimisers do not hold it. `crop` (px, a multiple of the factor) trains on
    a random crop of every picture. `decoder_only` leaves latents as they are: encoder and quant_conv do not change.
    `equivariance` is the share of steps whose latents are shrunk and turned, and must decode to the pictures shrunk and
    turned alike (Kouzelis et al. 2025, EQ-VAE): latents that diffusion learns sooner, for a little reconstruction.
    """

    kl_weight: float = 3e-4
    edge_weight: float = 0.5
    perceptual_weight: float = 1.0
    critic_weight: float = 0.5
    critic_start: int = 50_000
    logvar: float = 0.0
    crop: int | None = None
    decoder_only: bool = False
    equivariance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kl_weight", "edge_weight", "perceptual_weight", "critic_weight", "critic_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more is needed")
        if not 0 <= self.equivariance <= 1:
            raise ValueError(f"equivariance={self.equivariance}: 0 to 1 is allowed")


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


def random_crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A place of its own for every picture: images (B, C, H, W) -> (B, C, size, size), in the same memory order."""
    height, width = images.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"crop={size}: pictures are {width} x {height} px, 1 to {min(height, width)} is allowed")
    tops = torch.randint(height - size + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (len(images),), generator=generator).tolist()
    crops = [one[:, t : t + size, x : x + size] for one, t, x in zip(images, tops, lefts, strict=True)]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def shrunk_and_turned(latents: Tensor, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both by one factor of 1/2 to 1 in whole cells, and by one multiple of 90 degrees; latents (B, z, h, w)."""
    height, width = latents.shape[-2:]
    factor = images.shape[-2] // height
    rows = int(torch.randint(max(1, height // 2), height + 1, (1,), generator=generator))
    columns = max(1, round(rows * width / height))
    turns = int(torch.randint(4, (1,), generator=generator))
    small = F.interpolate(latents, (rows, columns), mode="bilinear", antialias=True)
    target = F.interpolate(images, (rows * factor, columns * factor), mode="bilinear", antialias=True)
    turned = (torch.rot90(x, turns, (2, 3)).contiguous(memory_format=torch.channels_last) for x in (small, target))
    return next(turned), next(turned)


class AutoencoderObjective:
    """The loss of `network`, and of `critic` where there is one: it is trained beside, by an optimiser of its own.

    `perceptual` and `critic` are optional; they must be on the network's device.
    """

    def __init__(
        self,
        network: Autoencoder,
        config: AutoencoderLoss | None = None,
        perceptual: Perceptual | None = None,
        critic: nn.Module | None = None,
    ) -> None:
        self.config = AutoencoderLoss() if config is None else config
        factor = network.config.factor
        if self.config.crop is not None and self.config.crop % factor:
            raise ValueError(f"crop={self.config.crop}: a multiple of the autoencoder's factor {factor} is needed")
        self.network, self.perceptual, self.critic = network, perceptual, critic
        self.step = 0
        self._shown: tuple[Tensor, Tensor] | None = None  # what the critic judges after the network's backward
        if self.config.decoder_only:
            network.encoder.requires_grad_(False)
            network.quant_conv.requires_grad_(False)

    def begin_step(self, step: int) -> None:
        """Tell the objective which step, counted from 0, is about to be taken."""
        self.step = step

    def loss(self, batch: CaptionedBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's loss, and its terms unweighted; `psnr` is in dB over the whole batch."""
        config, images = self.config, batch.pixels
        if config.crop is not None:
            images = random_crops(images, config.crop, generator)
        posterior = self._encode(images)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
        latents = posterior.sample(noise)
        if config.equivariance and torch.rand((), generator=generator) < config.equivariance:
            latents, images = shrunk_and_turned(latents, images, generator)
        output = self.network.decode(latents)
        reconstruction, figures = self._reconstruction(output, images)
        kl = posterior.kl().mean() / noise[0].numel()
        total = reconstruction + config.logvar + config.kl_weight * kl
        if self.critic is not None:
            self._shown = (images, output.detach())
            if self.step >= config.critic_start:
                against, weight = self._against(output, reconstruction)
                total = total + config.critic_weight * weight * against
                figures |= {"adversarial": against, "adaptive_weight": weight}
        return total, figures | {"kl": kl}

    def critic_loss(self, batch: CaptionedBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss on the pictures of the `loss` before it; 0, without gradients, before `critic_start`."""
        if self.critic is None or self._shown is None:
            raise ValueError("critic_loss: a critic, and a call of loss before, are needed")
        (real, fake), self._shown = self._shown, None
        if self.step < self.config.critic_start:
            nothing = torch.stack([parameter.sum() for parameter in self.critic.parameters()]).sum() * 0.0
            return nothing, {"critic": nothing}
        on_real, on_fake = self.critic(real), self.critic(fake)
        total = critic_hinge(on_real, on_fake)
        return total, {"critic": total, "critic_real": on_real.mean(), "critic_fake": on_fake.mean()}

    def _encode(self, images: Tensor) -> Posterior:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.decoder_only):
            return self.network.encode(images)

    def _reconstruction(self, output: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        absolute = (output - images).abs().mean()
        across, down = edges(output - images)
        edge = across.abs().mean() + down.abs().mean()
        total = absolute + self.config.edge_weight * edge
        psnr = 10 * torch.log10(4.0 / (output - images).square().mean())  # peak to peak is 2 in [-1, 1]
        figures = {"l1": absolute, "edge": edge, "psnr": psnr}
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(output, images).mean()
            total = total + self.config.perceptual_weight * figures["perceptual"]
        return total / torch.tensor(self.config.logvar).exp().item(), figures

    def _against(self, output: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial term, and its weight: 0 where no gradient is asked for and nothing can be weighed."""
        assert self.critic is not None
        with held(self.critic):
            against = adversarial(self.critic(output))
        if not output.requires_grad:
            return against, against.new_zeros(())
        return against, adaptive_weight(reconstruction, against, self.network.decoder.conv_out.weight)
