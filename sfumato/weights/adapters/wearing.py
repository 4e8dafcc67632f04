"""Adapters worn by a model: its networks' weights are edited in place, and every bit of them comes back.

Owns copies of the touched parameters' originals, in main memory. Parameters are found by name at each call, so networks
may move between devices meanwhile. Knows nothing of prompts. Not for several threads at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.models.deltas import Change, DoRA, LoRA, Rows, moved
from sfumato.weights.adapters.adapter import Adapter, Key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worn:
    """An adapter with its strengths on the text encoders and the U-Net, and its rank cut to `dyn` where given.

    A strength of 0 changes no bit; below 0 it turns the adapter round. `dyn` cuts LoRAs alone.
    """

    adapter: Adapter
    text: float = 1.0
    unet: float = 1.0
    dyn: int | None = None

    def __post_init__(self) -> None:
        for name in ("text", "unet"):
            value = getattr(self, name)
            if not -1e4 < value < 1e4:  # no number fails too
                raise ValueError(f"{name}={value}: a strength between -10000 and 10000 is needed")
        if self.dyn is not None and self.dyn < 1:
            raise ValueError(f"dyn={self.dyn}: 1 or more are needed")

    def strength(self, part: str) -> float:
        return self.unet if part == "unet" else self.text


Step = tuple[Change, float, int | None]  # a change, its strength, its rank cut; changes compare by identity
Mark = tuple[tuple[int, float, int | None], ...]


class Wardrobe:
    """What a model wears: see `wear`. One Wardrobe a model, which must not be changed otherwise meanwhile."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.worn: tuple[Worn, ...] = ()
        self._on: dict[Key, tuple[Step, ...]] = {}
        self._originals: dict[Key, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """The main memory that the originals take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._originals.values())

    def wear(self, worn: Sequence[Worn]) -> None:
        """Put exactly these on, one over another in order; `()` gives every bit of the model back.

        Only parameters whose changes differ from what they wear are computed, in float32 on the parameter's device.
        After an error, also a keyboard's, the networks are as before the call. ValueError: an adapter for another
        model; a change that makes numbers beyond the parameter's precision.
        """
        wanted = steps_of(worn)
        parameters = _parameters(self.model)
        for part, name in wanted:
            if (part, name) not in parameters:
                raise ValueError(f"{part} has no {name}: the adapter was read for another model")
        touched = [key for key in {**self._on, **wanted} if _mark(self._on.get(key)) != _mark(wanted.get(key))]
        undo: dict[Key, Tensor] = {}
        try:
            for key in touched:
                parameter = parameters[key]
                original = self._originals[key] if key in self._on else _copy(parameter)
                undo[key] = _copy(parameter) if key in self._on else original
                _write(parameter, _changed(original, wanted.get(key, ()), parameter, key))
                if key in wanted:
                    self._originals[key] = original
        except BaseException:
            for key, tensor in undo.items():
                _write(parameters[key], tensor)
            self._originals = {key: tensor for key, tensor in self._originals.items() if key in self._on}
            raise
        self._on = wanted
        self._originals = {key: tensor for key, tensor in self._originals.items() if key in wanted}
        self.worn = tuple(worn)
        if touched:
            log.info("%d parameters changed, originals of %.0f MB kept", len(touched), self.num_bytes / 1e6)


def applied(weight: Tensor, steps: Sequence[Step]) -> Tensor:
    """A weight (float32) with changes on it in their order; those of strength 0 do nothing."""
    for change, strength, dyn in steps:
        if strength != 0:
            weight = moved(_cut(change, dyn), weight.device).changed(weight, strength)
    return weight


def steps_of(worn: Sequence[Worn]) -> dict[Key, tuple[Step, ...]]:
    """What is to be done to each parameter; strengths of 0 are left out."""
    steps: dict[Key, tuple[Step, ...]] = {}
    for each in worn:
        for key, changes in each.adapter.changes.items():
            strength = each.strength(key[0])
            if strength != 0:
                steps[key] = (*steps.get(key, ()), *((change, strength, each.dyn) for change in changes))
    return steps


def _mark(steps: tuple[Step, ...] | None) -> Mark:
    """Equal for the same changes; both sides are held, so that no identity is given twice."""
    return tuple((id(change), strength, dyn) for change, strength, dyn in steps or ())


def _parameters(model: Model) -> dict[Key, nn.Parameter]:
    return {
        (part, name): parameter
        for part, network in model.networks.items()
        for name, parameter in network.named_parameters()
    }


def _cut(change: Change, dyn: int | None) -> Change:
    if dyn is None:
        return change
    if isinstance(change, LoRA):
        return change.cut(dyn)
    if isinstance(change, DoRA) and isinstance(change.inner, LoRA):
        return DoRA(change.inner.cut(dyn), change.magnitude, change.on_output)
    if isinstance(change, Rows) and isinstance(change.inner, LoRA):
        return Rows(change.inner.cut(dyn), change.third)
    return change


def _copy(parameter: nn.Parameter) -> Tensor:
    """A copy in main memory, in the parameter's precision and memory order."""
    return parameter.detach().to("cpu", copy=True)


@torch.no_grad()
def _changed(original: Tensor, steps: Sequence[Step], like: Tensor, key: Key) -> Tensor:
    if not steps:
        return original
    new = applied(original.to(device=like.device, dtype=torch.float32), steps).to(like.dtype)
    if not torch.isfinite(new).all() and torch.isfinite(original).all():
        raise ValueError(f"{key[0]} {key[1]}: the adapters' strengths make numbers beyond {like.dtype}")
    return new


@torch.no_grad()
def _write(parameter: nn.Parameter, new: Tensor) -> None:
    """In place: who holds the parameter, a compiled graph or the memory planner, sees it."""
    parameter.copy_(new)
