"""The critic of pictures that an autoencoder is trained against, patch by patch, and the losses of both sides.

Isola et al. 2017 (PatchGAN), as Esser et al. 2021 use it. Knows nothing of autoencoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.layers import group_norm

MAX_WIDENING = 8  # the published critic's widest layers are 8 times its first


@dataclass(frozen=True)
class CriticConfig:
    """`num_layers` halvings; an answer sees 34 px with two of them, 70 px with three, the published critic's.

    `norm_groups` is for group norm, 0 for none. The published critic has batch norm, which with batches of one to a
    few pictures is noise, ties a picture's verdict to its neighbours and differs between ranks (Isola et al. 2017 had
    a batch of one, where it is instance norm: a group norm of one channel a group). Group norm knows no batch.
    """

    channels: int = 64
    num_layers: int = 3
    norm_groups: int = 8
    image_channels: int = 3


def critic_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss (Lim & Ye 2017): 0 where it says 1 or more of real patches, -1 or less of made ones."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adversarial(fake: Tensor) -> Tensor:
    """The maker's loss: what the critic says of its patches, with the sign turned."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, against: Tensor, last: Tensor) -> Tensor:
    """|grad of the reconstruction's loss| / |grad of the adversarial loss|, both at `last`, clamped to [0, 1e4].

    Esser et al. 2021, equation 7; their delta is 1e-6, the code that they published has 1e-4, and so have we.
    """
    (ours,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (theirs,) = torch.autograd.grad(against, last, retain_graph=True)
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0.0, 1e4).detach()


@contextmanager
def held(network: nn.Module) -> Iterator[None]:
    """Inside, answers of the network give gradients to its input and none to its parameters."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class PatchCritic(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> (B, 1, h, w): above 0 where a patch looks real."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.Conv2d(config.image_channels, config.channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = config.channels
        for index in range(1, config.num_layers + 1):
            before, width = width, config.channels * min(2**index, MAX_WIDENING)
            stride = 2 if index < config.num_layers else 1
            layers.append(nn.Conv2d(before, width, 4, stride, 1, bias=config.norm_groups == 0))
            if config.norm_groups:
                layers.append(group_norm(width, config.norm_groups, 1e-5))
            layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def initialise(self, seed: int) -> PatchCritic:
        """Weights ~ N(0, 0.02^2), biases 0 (Isola et al. 2017, section 6.2)."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)
