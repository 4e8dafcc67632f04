"""Optimisers of a training run, and the scale of the loss in half precision. Knows no files and no ranks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.train.config import LoopConfig


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; its kernel gets weights that lie channels last as they lie in memory.

    As they are it would bring each, its gradient and both moments into another order and back at every step.
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.01) -> None:
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        found = super()._init_group(group, *lists)
        for index, weight in enumerate(lists[0]):
            if weight.ndim == 4 and not weight.is_contiguous() and weight.permute(0, 2, 3, 1).is_contiguous():
                for tensors in lists[:4]:  # weights, gradients, both moments
                    tensors[index] = tensors[index].permute(0, 2, 3, 1)
        return found


def make_optimizer(parameters: Iterable[nn.Parameter], config: LoopConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with 32 or 8 bits a moment; norms and biases are not decayed.

    Its steps are counted as changes of the weights. ValueError where 8 bits are asked for and bitsandbytes is missing.
    """
    listed = list(parameters)
    whole = [p for p in listed if p.ndim == 0]  # never spread over ranks, and a kernel takes only one kind
    groups = [
        {"params": [p for p in listed if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in listed if p.ndim == 1], "weight_decay": 0.0},
        {"params": whole, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return _counting(AdamW(groups, lr=lr, betas=config.betas))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer='adamw8bit': needs the package bitsandbytes, which is not installed; or take adamw")
    library = importlib.import_module("bitsandbytes")
    return _counting(cast(torch.optim.Optimizer, library.optim.AdamW8bit(groups, lr=lr, betas=config.betas)))


def _counting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, whose every step from now on counts as a change of the weights that it has."""
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """After a step: kernels of an optimiser's own write without it, and by the counts stale copies are told.

    PyTorch's fused AdamW and 8-bit ones are such; models/inference.py keeps such copies.
    """
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


SHARE = "share"  # of a group's parameters in the network's learning rate; without it all of it


def part_rates(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], config: LoopConfig) -> None:
    """Divide the groups of a new optimiser so that those with a rate of their own (`config.part_lr`) have it.

    ValueError where no parameter that is trained has such a name.
    """
    for start in config.part_lr:
        if not any(name.startswith(start) for name in parameters):
            known = ", ".join(sorted({name.partition(".")[0] for name in parameters}))
            raise ValueError(f"part_lr={start!r}: nothing that is trained has a name that begins so; there are {known}")
    if not config.part_lr:
        return
    shares = {parameter: config.share_of(name) for name, parameter in parameters.items()}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for share in sorted({shares[parameter] for parameter in group["params"]}):
            own = [parameter for parameter in group["params"] if shares[parameter] == share]
            optimizer.add_param_group({**group, "params": own, SHARE: share})


@dataclass
class LossScale:
    """A factor on the loss that keeps gradients inside the range of float16 (Micikevicius et al. 2018, section 3.2).

    Its numbers are those of torch's GradScaler. That one decides for one optimiser on one rank; here network and
    critic, and all ranks, take or skip a step together.
    """

    value: float = 2.0**16
    good_steps: int = 0
    GROW_AFTER = 2000  # steps

    def update(self, overflow: bool) -> None:
        """Halve after an overflow, double after 2,000 steps without one."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps == self.GROW_AFTER:
            self.value, self.good_steps = self.value * 2, 0
