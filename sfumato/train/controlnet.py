"""Training of a ControlNet: a copy of the U-Net's encoder learns to steer the frozen U-Net by hints.

Zhang et al. 2023, section 3.3: the model's own loss, half of the captions left out, so that the hint is read for what
it shows. Knows no file and no annotator.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.models.controlnet import ControlNet
from sfumato.train.conditions import Told, check_trainable, objective_of, rest
from sfumato.train.diffusion import DiffusionConfig, FramedBatch
from sfumato.train.state import State

CAPTION_DROP = 0.5  # Zhang et al. 2023, section 3.3
SILU_GAIN = 0.3558**-0.5  # 1 / sqrt(E[silu(z)^2]), z normal


class ControlObjective:
    """`network` is the ControlNet; batches must have hints. A share `hint_drop_prob` of them is shown as black."""

    def __init__(self, model: Model, network: ControlNet, diffusion: DiffusionConfig, hint_drop_prob: float) -> None:
        if not 0 <= hint_drop_prob < 1:
            raise ValueError(f"hint_drop_prob={hint_drop_prob}: 0 to below 1 is allowed")
        self.model, self.network, self.hint_drop_prob = model, network, hint_drop_prob

        def predict(x: Tensor, t: Tensor, told: Told) -> Tensor:
            if told.hint is None:
                raise ValueError("hints: a ControlNet's batches need them")
            residuals = network(x, t, told.context, told.vector, told.hint.to(x.device))
            out: Tensor = model.unet(x, t, told.context, told.vector, residuals=residuals)
            return out

        self._inner = objective_of(model, network, predict, diffusion)

    def loss(self, batch: FramedBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error."""
        if self.hint_drop_prob and batch.hints is not None:
            shown = torch.rand(len(batch.hints), generator=generator) >= self.hint_drop_prob
            batch = replace(batch, hints=batch.hints * shown.to(batch.hints)[:, None, None, None])
        return self._inner.loss(batch, generator)


def new_control(
    model: Model, seed: int, diffusion: DiffusionConfig | None = None, hint_drop_prob: float = 0.0
) -> ControlObjective:
    """An objective for `fit` that learns a ControlNet from a copy of the model's U-Net, which rests from now on.

    `seed` is of the layers that read the hint. Without `diffusion` half of the captions are dropped. ValueError for a
    U-Net that sees more than a text.
    """
    check_trainable(model, sees=())
    rest(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        network = ControlNet.from_unet(model.unet, model.family.autoencoder.factor)
        _wake(network)
    options = diffusion or DiffusionConfig(caption_drop_prob=CAPTION_DROP)
    return ControlObjective(model, network, options, hint_drop_prob)


def _wake(network: ControlNet) -> None:
    """Draws the layers that read the hint anew, so that its variance reaches the last: He et al. 2015, section 2.2.

    Each of torch's own passes on a third of what it is given or less, and the last would hear next to nothing for
    hundreds of steps. The last one stays zero. Randomness is torch's own generator's.
    """
    *reading, _ = [part for part in network.input_hint_block.modules() if isinstance(part, nn.Conv2d)]
    for part in reading:
        nn.init.normal_(part.weight, std=SILU_GAIN * (part.in_channels * part.kernel_size[0] ** 2) ** -0.5)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def control_result(objective: ControlObjective, state: State) -> ControlNet:
    """The ControlNet with its averaged weights, a copy at rest on the CPU, as `save_control` writes it."""
    network = objective.network
    with torch.device("meta"):
        copy = ControlNet(network.config, network.hint_channels, network.hint_widths, network.pooled)
    with state.averaged():
        weights = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval().requires_grad_(False)
