"""Whole calls of a U-Net as CUDA graphs: a call of shapes that were seen before is one launch instead of thousands.

Owns which calls are recorded, where their inputs lie, and when a recording is of no use any more. Knows nothing of
CUDA but in `CudaRecorder`, in whose place a test may put its own. Calls without gradients only.
Letters: B rows, h w latent size, L tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.models.residuals import Residuals
from sfumato.models.reuse import Deep

MOST = 8  # recordings; each holds the activations of its call, in memory that all share
SEEN = (
    2  # calls of the same shapes that go as before, so that what libraries set up once is there; then one is recorded
)
NAMES = ("x", "t", "context", "vector", "state", "maps", "cross", "residuals", "deep", "merging")  # of UNet.forward


class Recorder(Protocol):
    """Records what a function does on a device: `record` runs it, and gives what repeats it and where its answer lies.

    What it reads must stay where it is.
    """

    def serves(self, device: torch.device) -> bool: ...
    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


class CudaRecorder:
    """PyTorch's CUDA graphs. All share one pool of memory: an answer is copied before another graph runs."""

    def __init__(self) -> None:
        self.pool: Any = None

    def serves(self, device: torch.device) -> bool:
        """Whether it can record on a device."""
        return device.type == "cuda"

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Once on a stream of its own first, as PyTorch's notes on CUDA graphs want it, then recorded."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            answer = function()
        return graph.replay, answer


@dataclass(frozen=True)
class _Recording:
    """One call: the tensors that it reads, by name, what repeats it, and its answer."""

    inputs: Mapping[str, Tensor]
    repeat: Callable[[], None]
    answer: Tensor

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.repeat()
        return self.answer.clone()


class _Places:
    """Where a network's weights lie, and how. A graph reads them there: what is written to them it sees.

    Aliases are held, so that no other tensor comes to lie where one lay.
    """

    def __init__(self, network: nn.Module) -> None:
        self.tables = [table for part in network.modules() for table in (part._parameters, part._buffers)]
        with torch.inference_mode(False):
            self.then = [tensor.detach() for tensor in self._tensors()]
        self.facts = [_facts(tensor) for tensor in self.then]

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for table in self.tables for tensor in table.values() if tensor is not None)

    def still(self) -> bool:
        """Whether every weight lies where it did, in the same order and precision."""
        return [_facts(tensor) for tensor in self._tensors()] == self.facts


def _facts(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class Graphs:
    """A U-Net's calls, recorded by their shapes, until `remove`. `most` recordings are kept, the last used ones.

    A call goes as before where something is asked of it (a state, kept or given deep features, merged cells), where a
    module has a hook, a delta or a hypernetwork, with gradients, and the first `seen` times with its shapes. All
    recordings go once a weight lies elsewhere; weights that are written to in place, as adapters do, are seen without
    that. For one thread.
    """

    def __init__(
        self, network: nn.Module, recorder: Recorder | None = None, most: int = MOST, seen: int = SEEN
    ) -> None:
        if most < 1:
            raise ValueError(f"most={most}: 1 or more are needed")
        self.network, self.most, self.seen = network, most, seen
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.forget()
        network._compiled_call_impl = self._call

    def __len__(self) -> int:
        """How many calls are recorded."""
        return len(self._kept)

    def forget(self) -> None:
        """Drop all recordings, and what is known of the network; both are made again when they are needed."""
        self._kept: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._times: OrderedDict[Hashable, int] = OrderedDict()
        self._places: _Places | None = None
        parts = list(self.network.modules())
        self._hooks = [table for part in parts for table in (part._forward_hooks, part._forward_pre_hooks)]
        self._own = [vars(part) for part in parts]
        self._wearing = [part for part in parts if hasattr(part, "worn")]
        self._sliced = [part for part in parts if hasattr(part, "query_rows")]

    def remove(self) -> None:
        """Drop all, and let the network be called as before."""
        self.network._compiled_call_impl = None
        self.forget()

    def _call(self, *given: Any, **named: Any) -> Tensor:
        arguments = dict(zip(NAMES, given, strict=False)) | named
        inputs = inputs_of(arguments) if self._may() else None
        if inputs is None or not self.recorder.serves(inputs["x"].device):
            found: Tensor = self.network._call_impl(*given, **named)
            return found
        if self._places is not None and not self._places.still():
            self.forget()
        key = self._key(inputs)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key](inputs)
        times = self._times.pop(key, 0)
        if times < self.seen:
            self._times[key] = times + 1
            while len(self._times) > 8 * self.most:  # shapes that came once
                self._times.popitem(last=False)
            return self.network._call_impl(*given, **named)
        return self._record(key, inputs)

    def _may(self) -> bool:
        """Whether a call now is one of the network as it is."""
        return not (
            torch.is_grad_enabled()
            or any(self._hooks)
            or any("forward" in own for own in self._own)
            or any(part.worn for part in self._wearing)
        )

    def _key(self, inputs: Mapping[str, Tensor]) -> Hashable:
        device = inputs["x"].device.type
        shapes = tuple((name, part.shape, part.stride(), part.dtype, part.device) for name, part in inputs.items())
        slices = tuple(part.query_rows for part in self._sliced)
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return shapes, slices, precision

    def _record(self, key: Hashable, inputs: Mapping[str, Tensor]) -> Tensor:
        while len(self._kept) >= self.most:
            self._kept.popitem(last=False)
        if self._places is None:
            self._places = _Places(self.network)
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        repeat, answer = self.recorder.record(partial(self.network._call_impl, **arguments_of(held)))
        self._kept[key] = _Recording(held, repeat, answer)
        return self._kept[key](inputs)


def inputs_of(arguments: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that a U-Net's call reads, by names that `arguments_of` knows; None where it is asked for more."""
    deep: Deep | None = arguments.get("deep")
    if arguments.get("state") is not None or arguments.get("merging") is not None or asks(deep):
        return None
    found = {name: arguments[name] for name in NAMES[:4] if arguments.get(name) is not None}
    residuals: Residuals | None = arguments.get("residuals")
    if residuals is not None:
        found |= {f"skips.{index}": skip for index, skip in enumerate(residuals.skips)}
        found |= {f"inner.{index}": residuals.inner[index] for index in sorted(residuals.inner)}
        found |= {} if residuals.middle is None else {"middle": residuals.middle}
    return found


def asks(deep: Deep | None) -> bool:
    """Whether a call keeps deep features, or is given some."""
    return deep is not None and (bool(deep.wanted) or deep.given is not None)


def arguments_of(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a U-Net's call that reads these tensors."""
    found: dict[str, Any] = {name: inputs[name] for name in NAMES[:4] if name in inputs}
    skips: Sequence[Tensor] = [tensor for name, tensor in inputs.items() if name.startswith("skips.")]
    inner = {int(name[6:]): tensor for name, tensor in inputs.items() if name.startswith("inner.")}
    if skips or inner or "middle" in inputs:
        found["residuals"] = Residuals(tuple(skips), inputs.get("middle"), inner)
    return found
