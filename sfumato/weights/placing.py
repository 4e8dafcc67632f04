"""Filling networks with tensors from disk, each placed once, in the precision and memory order that it computes in.

A tensor that needs no change stays a view of the file's memory map: it costs memory when it is first read, and the
system may take it back. Convolutions read faster in channels-last order; they are turned when first used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Readable(Protocol):
    """A tensor on disk: `read` gives it, as a view where that is possible; `release` hands its pages back."""

    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> Tensor: ...
    def release(self) -> None: ...


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network, its convolutions' weights in channels-last order, which is faster on CPUs and tensor cores."""
    return module.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fill(module: nn.Module, sources: Mapping[str, Readable], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Fill a network built on "meta" with a source for each of its tensors; ready to compute, without gradients."""
    mapped: dict[str, Callable[[], None]] = {}
    state = {}
    for name, source in sources.items():
        tensor = source.read()
        if source.dtype == dtype and device.type == "cpu":
            state[name] = tensor
            mapped[name] = source.release
        else:
            order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            state[name] = tensor.to(device=device, dtype=dtype).to(memory_format=order)
            del tensor
            source.release()
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    for unit in _units(module):
        _turn_when_used(
            unit, {id(parameter): mapped[name] for name, parameter in module.named_parameters() if name in mapped}
        )
    return module


def _units(module: nn.Module) -> list[nn.Module]:
    """The modules that are called as a whole: a network, or the two halves of one that has an encoder and a decoder."""
    halves = [getattr(module, name) for name in ("encoder", "decoder") if hasattr(module, name)]
    return halves or [module]


def _turn_when_used(unit: nn.Module, releases: Mapping[int, Callable[[], None]]) -> None:
    """Before the unit's first call, turn its mapped convolution weights to channels-last and hand the pages back."""
    turned = [p for p in unit.parameters() if p.ndim == 4 and id(p) in releases]
    if not turned:
        return

    def turn(_: nn.Module, __: Any) -> None:
        handle.remove()
        with torch.inference_mode(False), torch.no_grad():
            for parameter in turned:
                before = parameter.data
                parameter.data = before.contiguous(memory_format=torch.channels_last)
                if parameter.data_ptr() != before.data_ptr():  # a 1 x 1 convolution may stay where it is
                    releases[id(parameter)]()

    handle = unit.register_forward_pre_hook(turn)
