"""Everything a run is made of at one step: parameters, their average, moments, counts; and all of it by name.

Names: `model.`, `ema.`, `optimizer.KEY.`, `buffer.`, and the same under `critic.`. Does not know where files lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sfumato.train.config import LoopConfig
from sfumato.train.optimizers import LossScale, make_optimizer
from sfumato.weights.files import save_safetensors


class Part:
    """One network with its optimiser, and the names that its tensors have in a checkpoint."""

    def __init__(self, network: nn.Module, config: LoopConfig, lr: float, prefix: str = "") -> None:
        self.network = network
        self.prefix = prefix
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.buffers = _buffers(network)
        self.optimizer = make_optimizer(self.parameters, config, lr)

    def copy_buffers(self) -> list[Tensor]:
        """As they are now, for `set_buffers` after a step that is to leave no trace: batch norms remember every one."""
        return [value.clone() for value in self.buffers.values()]

    def set_buffers(self, values: Sequence[Tensor]) -> None:
        """What `copy_buffers` gave."""
        for value, before in zip(self.buffers.values(), values, strict=True):
            value.copy_(before)

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def tensors(self) -> dict[str, Tensor]:
        """By checkpoint name."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"{self.prefix}model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    found[f"{self.prefix}optimizer.{key}.{name}"] = value
        return found | {f"{self.prefix}buffer.{name}": value for name, value in self.buffers.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        """ValueError in one line where a checkpoint's parameters are not this network's."""
        start = f"{self.prefix}model."
        stored = {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}
        if odd := sorted(stored.keys() ^ self.parameters.keys()):
            raise ValueError(f"checkpoint={origin!r}: {len(odd)} parameters differ, first {start}{odd[0]}")
        odd = [name for name, p in self.parameters.items() if tuple(p.shape) != tuple(stored[name])]
        if odd:
            was, now = tuple(stored[odd[0]]), tuple(self.parameters[odd[0]].shape)
            line = f"{len(odd)} parameters have another shape, first {start}{odd[0]}: {was} there, {now} here"
            raise ValueError(f"checkpoint={origin!r}: {line}")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take everything over from tensors that passed `check`."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        start = f"{self.prefix}optimizer."
        for full_name, value in tensors.items():
            if full_name.startswith(start):
                key, name = full_name.removeprefix(start).split(".", 1)
                moments[name][key] = like(value, self.parameters[name])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like(tensors[f"{self.prefix}model.{name}"], parameter))
                if moments[name]:
                    self.optimizer.state[parameter] = moments[name]
            for name, value in self.buffers.items():
                if (stored := tensors.get(f"{self.prefix}buffer.{name}")) is not None:
                    value.copy_(stored)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the weights, such as the averages of batch norms."""
    kept = network.state_dict().keys()
    return {name: value for name, value in network.named_buffers() if name in kept}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `value` that lies as `parameter` does: its memory order, its device, its share of a rank.

    A fused optimiser goes through moments and parameters in the order of memory, so that must be the same. What has
    another shape (a count of steps) only goes to the device.
    """
    if isinstance(value, DTensor):
        return value.clone()
    if value.shape != parameter.shape:
        return value.clone() if value.ndim == 0 else value.clone().to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


class State:
    """A run at step `step`. `skipped` counts steps without a finite gradient, `overflows` those that only float16
    could not hold. `ema` is empty on ranks that keep no average."""

    def __init__(
        self, network: nn.Module, config: LoopConfig, critic: nn.Module | None = None, averaged: bool = True
    ) -> None:
        self.step = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.overflows = 0
        self.scale = LossScale()
        self.network = network
        self.trained = Part(network, config, config.lr)
        self.critic = None if critic is None else Part(critic, config, config.critic_lr or config.lr, "critic.")
        self.parameters = self.trained.parameters
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if averaged else {}
        self.ema_decay = config.ema_decay

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The network's."""
        return self.trained.optimizer

    @property
    def parts(self) -> list[Part]:
        """Network and critic, each with its optimiser."""
        return [part for part in (self.trained, self.critic) if part is not None]

    def update_ema(self) -> None:
        """Exponential average with the warm-up (1 + k) / (10 + k), as the original LitEma."""
        if self.ema:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            averages = [local(value) for value in self.ema.values()]
            torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the averaged parameters in it, to draw samples; afterwards it has its own again."""
        own = {name: self.parameters[name].detach().clone() for name in self.ema}
        with torch.no_grad():
            for name, value in self.ema.items():
                self.parameters[name].copy_(value)
        try:
            yield self.network
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    self.parameters[name].copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All of the state's tensors by checkpoint name."""
        found = {f"ema.{name}": value for name, value in self.ema.items()}
        for part in self.parts:
            found |= part.tensors()
        return found

    def owner(self, name: str) -> Tensor | None:
        """The parameter that the tensor of this checkpoint name belongs to."""
        for part in self.parts:
            for start in (f"{part.prefix}model.", f"{part.prefix}optimizer.", "ema."):
                if name.startswith(start):
                    plain = name.removeprefix(start)
                    return part.parameters.get(plain.split(".", 1)[-1] if start.endswith("optimizer.") else plain)
        return None

    def facts(self, config: LoopConfig, ranks: int = 1) -> dict[str, str]:
        """What is no tensor, as text."""
        described = asdict(config) | {"examples_per_step": config.examples_per_step(ranks)}
        counts = {"skipped": self.skipped, "in_row": self.skipped_in_row, "overflows": self.overflows}
        scale = asdict(self.scale)
        return {"step": str(self.step), "config": json.dumps(described), "counts": json.dumps(counts | scale)}

    def check(self, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        """ValueError in one line where a checkpoint with tensors of these shapes does not fit."""
        for part in self.parts:
            part.check(shapes, origin)

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Take over a checkpoint that passed `check`; without averages in it, they begin with its parameters."""
        for part in self.parts:
            part.restore(tensors)
        with torch.no_grad():
            for name, value in self.ema.items():
                value.copy_(like(tensors.get(f"ema.{name}", tensors[f"model.{name}"]), value))
        self.step = int(facts["step"])
        counts = json.loads(facts.get("counts", "{}"))
        self.skipped, self.skipped_in_row = counts.get("skipped", 0), counts.get("in_row", 0)
        self.overflows = counts.get("overflows", 0)
        self.scale = LossScale(counts.get("value", self.scale.value), counts.get("good_steps", 0))

    def save(self, path: str | Path, config: LoopConfig, ranks: int = 1) -> None:
        """Write one .safetensors file, whole or not at all."""
        save_safetensors(path, self.tensors(), self.facts(config, ranks))


def local(value: Tensor) -> Tensor:
    """The share of this rank; the tensor itself where it is not spread."""
    return value.to_local() if isinstance(value, DTensor) else value
