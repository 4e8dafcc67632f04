"""Moving networks on and off a device, so that only the one in use takes its memory.

Weights stay at home on the CPU, as views of a file's memory map where they are that; going on a device is a copy, and
coming back drops it. Knows nothing of plans or budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText

CPU = torch.device("cpu")


class Unit:
    """Modules that move together, and those of them by whose call it is known that they are needed."""

    def __init__(self, name: str, modules: Iterable[nn.Module], entries: Iterable[nn.Module] | None = None) -> None:
        self.name = name
        modules = list(modules)
        self.entries = modules if entries is None else list(entries)
        found = (tensor for module in modules for tensor in chain(module.parameters(), module.buffers()))
        self.tensors = list({id(tensor): tensor for tensor in found}.values())
        self.homes: list[tuple[Tensor, Any]] = []  # while away: the data at home, and what the copy was marked with
        for tensor in self.tensors:
            tensor.data = tensor.data.to(CPU)

    @property
    def away(self) -> bool:
        return bool(self.homes)

    def leave(self, device: torch.device) -> None:
        """Copy to the device, convolutions' weights in channels-last order."""
        for tensor in self.tensors:
            home = tensor.data
            order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            tensor.data = home.to(device, memory_format=order, copy=True)
            self.homes.append((home, _mark(tensor)))

    def return_home(self) -> None:
        """Drop the copies; one that was changed on the device comes home changed."""
        for tensor, (home, mark) in zip(self.tensors, self.homes, strict=True):
            tensor.data = home if _mark(tensor) == mark else tensor.data.to(CPU)
        self.homes = []


def _mark(tensor: Tensor) -> tuple[int, int | None]:
    """Differs once the tensor has been written to in place (not through `.data`) or got other data."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class Offload:
    """Keeps at most one unit away from home: a call of another brings it home first."""

    def __init__(self, units: Iterable[Unit], device: torch.device) -> None:
        self.device = device
        self.units = list(units)
        self.current: Unit | None = None
        self._handles = [handle for unit in self.units for handle in self._watch(unit)]

    def _watch(self, unit: Unit) -> Iterator[RemovableHandle]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            self.use(unit)
            moved = {name: _to(value, self.device) for name, value in kwargs.items()}
            return tuple(_to(value, self.device) for value in args), moved

        # first of all hooks: one that turns weights when they are first used then finds them turned, on the device
        for module in unit.entries:
            yield module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def use(self, unit: Unit | None) -> None:
        """Have `unit`, and nothing else, on the device; None: nothing."""
        if unit is self.current:
            return
        if self.current is not None:
            self.current.return_home()
        self.current = None
        if unit is not None:
            unit.leave(self.device)
            self.current = unit

    def remove(self) -> None:
        """Bring home what is away and move nothing any more."""
        self.use(None)
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def units_of(networks: Mapping[str, nn.Module]) -> Iterator[Unit]:
    """Each network as one unit, an autoencoder as two: the encoder and the decoder, with the convolutions beside them.

    A text encoder is entered by any of its modules, for not every way into it is a call of the whole.
    """
    for name, network in networks.items():
        if isinstance(network, Autoencoder):
            yield Unit(f"{name}.encoder", [network.encoder, network.quant_conv])
            yield Unit(f"{name}.decoder", [network.decoder, network.post_quant_conv])
        elif isinstance(network, CLIPText):
            yield Unit(name, [network], network.modules())
        else:
            yield Unit(name, [network])


def offload(networks: Mapping[str, nn.Module], device: torch.device) -> Offload:
    """From now on each network is on `device` while it is in use, and at home on the CPU once another is used.

    Change weights at home (after `use(None)`); what is changed on the device in place comes home, except through
    `.data`. Not for several threads at once.
    """
    with torch.inference_mode(False), torch.no_grad():
        return Offload(list(units_of(networks)), device)
