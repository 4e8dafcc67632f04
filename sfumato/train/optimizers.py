"""Optimisers of a training run, and the scale of the loss in half precision. Knows no files and no ranks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
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


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the groups with `orthogonal`, AdamW for the others.

    A matrix (a convolution as rows of its kernels, (out, in * k * k)) moves along its gradients' average, Nesterov's
    way, with all singular values brought near 1. Scaled as by Liu et al. 2025, "Muon is Scalable for LLM Training",
    section 2.2, so that AdamW's learning rate and weight decay hold for it. `dtype` is of the products.
    """

    MOMENTUM = 0.95
    RMS = 0.2  # of AdamW's updates, which the orthogonal ones are scaled to

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both kinds."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._turn(group)
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[nn.Parameter]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault((len(weight), weight[0].numel()), []).append(weight)
        for (rows, columns), weights in alike.items():
            together = max(1, STACKED // (rows * columns))
            scale = self.RMS * max(rows, columns) ** 0.5
            for start in range(0, len(weights), together):
                some = weights[start : start + together]
                turned = orthogonal(torch.stack([self._ahead(weight) for weight in some]))
                for weight, update in zip(some, turned, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.view(weight.shape).to(weight.dtype), alpha=-group["lr"] * scale)

    def _ahead(self, weight: nn.Parameter) -> Tensor:
        """The gradients' average with one more step into the gradient (Nesterov 1983), as a matrix."""
        assert weight.grad is not None
        if "momentum_buffer" not in self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momentum = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - self.MOMENTUM)
        return weight.grad.lerp(momentum, self.MOMENTUM).flatten(1).to(self.dtype)


STACKED = 2**24  # numbers of matrices that are turned at once, at most, but for one that has more
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the steepest rise at 0 that ends within 0.3 of 1


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (B, m, n) with their singular values brought near 1, by Newton and Schulz's iteration."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        squared = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


SMALLEST = 16  # channels from and to which Muon turns a map; first and last layers of a network have fewer
LOOKED_UP = ("embedding", "vectors")  # names of tables whose rows are words


def _is_turned(name: str, weight: nn.Parameter) -> bool:
    """Whether Muon is for it: not for rows that are looked up by number, nor for maps from or to a few channels."""
    if weight.ndim < 2 or any(part in name.split(".")[-2:][0] for part in LOOKED_UP):
        return False
    return min(weight.shape[:2]) >= SMALLEST


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: LoopConfig, lr: float) -> torch.optim.Optimizer:
    """What `config.optimizer` names, for parameters by name; norms and biases are not decayed.

    AdamW (Loshchilov & Hutter 2019) with 32 or 8 bits a moment, or Muon. Its steps are counted as changes of the
    weights. ValueError where 8 bits are asked for and bitsandbytes is missing.
    """
    turned = {name for name, p in parameters.items() if config.optimizer == "muon" and _is_turned(name, p)}
    listed = [p for name, p in parameters.items() if name not in turned]
    whole = [p for p in listed if p.ndim == 0]  # never spread over ranks, and a kernel takes only one kind
    groups: list[dict[str, Any]] = [
        {"params": [p for p in listed if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in listed if p.ndim == 1], "weight_decay": 0.0},
        {"params": whole, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return _counting(AdamW(groups, lr=lr, betas=config.betas))
    if config.optimizer == "muon":
        groups = [{**group, "orthogonal": False} for group in groups]
        matrices = [parameters[name] for name in parameters if name in turned]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "orthogonal": True})
        half = torch.bfloat16 if config.precision == "bf16" else torch.float32
        return _counting(Muon(groups, lr=lr, betas=config.betas, dtype=half))
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
