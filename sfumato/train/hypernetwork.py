"""Training of a hypernetwork: it learns what a frozen U-Net lacks, from captioned pictures.

The model's own loss, with the hypernetwork worn at strength 1. Knows no file.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.models.hypernetwork import Hypernetwork, HypernetworkConfig, worn
from sfumato.models.transformer import CrossAttention
from sfumato.train.conditions import Told, check_trainable, objective_of, predicting, rest
from sfumato.train.data import LatentBatch
from sfumato.train.diffusion import DiffusionConfig
from sfumato.train.state import State
from sfumato.weights.hypernetworks import HypernetworkFile


class HypernetworkObjective:
    """`network` is the hypernetwork; text encoders and U-Net are frozen, captions are encoded once."""

    def __init__(self, model: Model, network: Hypernetwork, name: str, diffusion: DiffusionConfig) -> None:
        self.model, self.network, self.name = model, network, name
        plain = predicting(model)

        def predict(x: Tensor, t: Tensor, told: Told) -> Tensor:
            with worn(model.unet, [(network, 1.0)]):
                return plain(x, t, told)

        self._inner = objective_of(model, network, predict, diffusion)
        self.partial = not set(network.config.widths) <= context_widths(model)  # of loop.py's Objective

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error. Captions' states that lie with cached latents are used, but not for XL: they lack a part."""
        pooled = self.model.family.unet.vector_dim is not None
        return self._inner.loss(replace(batch, context=None) if pooled else batch, generator)


def new_hypernetwork(
    model: Model,
    name: str,
    generator: torch.Generator,
    config: HypernetworkConfig | None = None,
    diffusion: DiffusionConfig | None = None,
) -> HypernetworkObjective:
    """An objective for `fit` that learns a hypernetwork from new weights; the model's networks rest from now on.

    Without `config` it has A1111's shape for all widths that the U-Net's attentions have. ValueError where the model's
    U-Net sees depth or a picture to be edited, or no attention of it has one of the widths.
    """
    check_trainable(model)
    rest(model)
    there = context_widths(model)
    config = config or HypernetworkConfig(widths=tuple(sorted(there)))
    if not there & set(config.widths):
        raise ValueError(f"widths={config.widths}: this U-Net has {', '.join(map(str, sorted(there)))}")
    network = Hypernetwork(config)
    network.initialise(generator)
    return HypernetworkObjective(model, network.to(model.device), name, diffusion or DiffusionConfig())


def context_widths(model: Model) -> set[int]:
    """The widths of context that the U-Net's attentions have."""
    return {part.context_dim for part in model.unet.modules() if isinstance(part, CrossAttention)}


def hypernetwork_result(objective: HypernetworkObjective, state: State) -> HypernetworkFile:
    """The hypernetwork with its averaged weights, a copy of its own at rest, as it may be saved or worn."""
    model = objective.model
    copy = Hypernetwork(objective.network.config)
    with state.averaged():
        copy.load_state_dict({name: each.detach().cpu() for name, each in objective.network.state_dict().items()})
    copy.eval().requires_grad_(False)
    return HypernetworkFile(objective.name, copy, state.step, model.name, model.hash or None)
