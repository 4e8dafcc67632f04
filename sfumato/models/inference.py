"""What calls without gradients may spare: weights transformed once, keys and values of a text computed once.

Owns what is kept from call to call, and drops it when PyTorch counts a change of what it was made of; and which way a
convolution goes when there is no backward pass. float32 on a CPU only. Knows nothing of modules but linear layers.
Letters: B batch, C channels in, O channels out, n = (m + 2)^2 products of a tile, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sfumato.kernels import linear as products
from sfumato.kernels import winograd as kernels
from sfumato.kernels.build import library
from sfumato.models.costs import KEPT, capability, cheapest
from sfumato.models.room import Room
from sfumato.models.winograd import BAND, columns, convolve, transform

CONTEXTS = 4  # kept at once: of a network's calls, those for a prompt and for what it is guided from may take turns


def quickest(
    shape: tuple[int, ...], out_channels: int, stride: int, kept: tuple[str, ...] = (), compiled: bool = False
) -> str:
    """Which way is likely the quickest for a 3 x 3 convolution of a map of `shape` (B, C, h, w), padded by a cell.

    "direct" (PyTorch's own), "columns", or one of KEPT, tiles by kernels where they are `compiled`; of a forward pass
    alone. For the ways in `kept` the weight is there as it is wanted, or will be kept so; without that "ordered" is
    none.
    """
    return cheapest("drawing", compiled, shape, out_channels, stride, kept)


@cache
def can_order() -> bool:
    """Whether this PyTorch has oneDNN, and takes weights in its order (as its own compiler hands them over)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def ordered(weight: Tensor, stride: int, shape: tuple[int, ...]) -> Tensor:
    """A weight (O, C, 3, 3) in oneDNN's own order for maps of `shape`, padded by a cell; others are served as well."""
    dense = weight.detach().to_mkldnn()
    sides, ones = [stride, stride], [1, 1]
    reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight
    return reorder(dense, ones, sides, ones, 1, list(shape))


def convolve_ordered(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The 3 x 3 convolution of x (B, C, h, w), a cell of zeros around it, with a weight that is `ordered`."""
    sides, ones = [stride, stride], [1, 1]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, ones, sides, ones, 1, "none", [], "")


@cache
def products_by_kernels() -> bool:
    """Whether compiled products are the faster ones here: where MKL leaves AVX-512 unused, which it does on AMD's."""
    if capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "AuthenticAMD" in told


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, room: Room | None) -> Tensor:
    """A linear layer of x (..., C), weight (O, C), bias (O,): with a room, by compiled products where they are faster.

    Those are for float32 on a CPU; with gradients.
    """
    if room is None or not _by_kernels(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        out: Tensor = products.Linear.apply(rows, weight, bias, room)
    else:
        out = products.multiply(rows, weight, room, bias, turned=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def _by_kernels(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or not x.numel():
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return products_by_kernels() and library() is not None


class Linear(nn.Linear):
    """PyTorch's, to the bit unless it has `room` to be faster: see `hasten`."""

    room: Store | None = None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.room)


def plain(*layers: nn.Module) -> bool:
    """Whether these are PyTorch's linear layers as they are: no delta beside them, no hook."""
    return all(
        type(layer) in (nn.Linear, Linear)
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        for layer in layers
    )


def may_be_kept(*tensors: Tensor) -> bool:
    """Whether a call with these goes without gradients, in float32 on a CPU: what is made of them may be kept then."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def text_may_be_kept(context: Tensor) -> bool:
    """Whether a text's keys and values may be kept from this call: as `may_be_kept`, but in bfloat16 as well."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return context.device.type == "cpu" and context.dtype in (torch.float32, torch.bfloat16)


class _Made:
    """The weights that something was made of, as they were: a later change is noticed where PyTorch counts it.

    It counts its own operations, but not writing through `.data`, and not what kernels outside of it write, among them
    its fused optimisers: who changes weights so calls `increment_version`, as train/optimizers.py does, or `forget`.
    An alias of each weight is held, which counts the same changes, so that no other tensor comes to lie where it lay.
    """

    def __init__(self, *weights: Tensor) -> None:
        with torch.inference_mode(False):
            self.then = [weight.detach() for weight in weights]
        self.versions = [alias._version for alias in self.then]

    def still(self, *weights: Tensor) -> bool:
        """Whether these are the same tensors in the same memory, nothing written to them since."""
        return all(
            weight.data_ptr() == alias.data_ptr()
            and weight.shape == alias.shape
            and weight.stride() == alias.stride()
            and alias._version == version
            for weight, alias, version in zip(weights, self.then, self.versions, strict=True)
        )


@dataclass(eq=False)
class _Context:
    """A text that is known: a copy of it, which `stands` for it, and keys and values that were `made` of it."""

    stands: Tensor
    made: WeakKeyDictionary[nn.Module, tuple[_Made, Tensor, Tensor]] = field(default_factory=WeakKeyDictionary)

    @property
    def num_bytes(self) -> int:
        return 4 * (self.stands.numel() + sum(k.numel() + v.numel() for _, k, v in self.made.values()))


class Store(Room):
    """A room that keeps, too, what calls without gradients need again, in `most` bytes: transformed weights and texts.

    Texts are kept with their keys and values; the oldest make way for newer ones. What is kept is dropped when a weight
    that it was made of is moved, replaced, or written to in a way that PyTorch counts: see `_Made` for those that it
    does not, for which `forget` is. For one thread at a time.
    """

    def __init__(self, most: int = 0) -> None:
        super().__init__()
        self.most = most
        self.forget()

    def forget(self) -> None:
        """Drop all that is kept; it is made again when it is needed."""
        self._weights: Any = WeakIdKeyDictionary()
        self.forget_texts()

    def forget_texts(self) -> None:
        """Drop the texts with their keys and values: for the end of a drawing, which the next one seldom shares."""
        self._contexts: list[_Context] = []

    def empty(self) -> None:
        """Give up the memory for what layers need for a moment; they take it again, in new pages, when they work."""
        self._held.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now: transformed weights, and texts with their keys and values."""
        weights = sum(4 * kept.numel() for _, ways in self._weights.values() for kept in ways.values())
        return weights + sum(each.num_bytes for each in self._contexts)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor | None:
        """The 3 x 3 convolution of x (B, C, h, w), a cell of zeros around it, in the quickest way; without gradients.

        None where PyTorch's own is that. `weight` (O, C, 3, 3) is a parameter: what is kept goes when it does.
        """
        kept = self._kept(weight)
        may: tuple[str, ...] = ()
        if self.most and not weight.is_inference():  # PyTorch counts no changes of those others
            may = KEPT if can_order() else KEPT[1:]
        shape, compiled = tuple(x.shape), library() is not None
        way = quickest(shape, weight.shape[0], stride, may, compiled)
        if way in may and way not in kept and not self._fits(weight, way):
            may = tuple(each for each in may if each in kept or self._fits(weight, each))
            way = quickest(shape, weight.shape[0], stride, may, compiled)
        if way == "direct":
            return None
        if way == "columns":
            return columns(x, weight, bias, stride, self)
        if way in may and way not in kept:
            kept = self._keep(weight, way, stride, shape)
        if way == "ordered":
            return convolve_ordered(x, kept[way], bias, stride)
        work = kernels.convolve if compiled else convolve
        return work(x, weight, bias, int(way[-1]), self, kept.get(way))

    def _kept(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight by the ways that it is kept for, if nothing was written to it since."""
        found = self._weights.get(weight)
        if found is None:
            return {}
        if not found[0].still(weight):
            del self._weights[weight]
            return {}
        return found[1]

    def _fits(self, weight: Tensor, way: str) -> bool:
        outs, channels = weight.shape[:2]
        if way == "ordered":
            numbers = 9 * outs * channels
        elif library() is not None:
            numbers = kernels.packed_numbers(channels, outs, int(way[-1]))
        else:
            numbers = (int(way[-1]) + 2) ** 2 * outs * channels
        return self.num_bytes + 4 * numbers <= self.most

    def _keep(self, weight: Tensor, way: str, stride: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            if way == "ordered":
                made = ordered(weight, stride, shape)
            else:
                made = (transform if library() is None else kernels.pack)(weight, int(way[-1]))
        _, ways = self._weights.setdefault(weight, (_Made(weight), {}))
        ways[way] = made
        return ways

    def known(self, context: Tensor) -> Tensor:
        """The tensor that stands for a context (B, L, D): of several that are equal the first, a copy of it.

        Whose keys and values are wanted again and again is known by it: see `keys_values`. Where there is no room for
        a copy it is the context itself.
        """
        for index, each in enumerate(self._contexts):
            if each.stands.shape == context.shape and torch.equal(each.stands, context):
                self._contexts.append(self._contexts.pop(index))
                return each.stands
        if not self._has_room(4 * context.numel()):
            return context
        with torch.inference_mode(False):
            stands = context.detach().clone()
        self._contexts = [*self._contexts[1 - CONTEXTS :], _Context(stands)]
        return stands

    def _has_room(self, more: int, spared: _Context | None = None) -> bool:
        """Whether `more` bytes may be kept too; until they may, the oldest texts go, but not the `spared` one."""
        others = [each for each in self._contexts if each is not spared]
        excess = self.num_bytes + more - self.most
        if excess > sum(each.num_bytes for each in others):
            return False
        while excess > 0:
            oldest = others.pop(0)
            excess -= oldest.num_bytes
            self._contexts.remove(oldest)
        return True

    def keys_values(self, context: Tensor, to_k: nn.Linear, to_v: nn.Linear) -> tuple[Tensor, Tensor]:
        """to_k and to_v of the context (B, L, D); of one that is `known` they are computed once, if there is room."""
        text = next((each for each in self._contexts if each.stands is context), None)
        if text is None or to_k.weight.is_inference() or to_v.weight.is_inference():
            return to_k(context), to_v(context)
        found = text.made.get(to_k)
        if found is not None and found[0].still(to_k.weight, to_v.weight):
            return found[1], found[2]
        text.made.pop(to_k, None)
        keys, values = to_k(context), to_v(context)
        if self._has_room(4 * (keys.numel() + values.numel()), spared=text):
            text.made[to_k] = _Made(to_k.weight, to_v.weight), keys, values
        return keys, values

    def gated(self, x: Tensor, first: nn.Linear, last: nn.Linear) -> Tensor:
        """last(value * gelu(gate)) of x (B, L, D), with (value, gate) = first(x); some rows after others.

        So what lies between stays in the cache: for x of 4096 tokens and more it is tens of megabytes otherwise.
        """
        rows, inner = x.reshape(-1, x.shape[-1]), last.in_features
        out = x.new_empty(rows.shape[0], last.out_features)
        step = max(128, BAND // (8 * inner))
        if 2 * rows.shape[0] <= step:  # small enough as it is
            value, gate = first(x).chunk(2, dim=-1)
            return last(value * F.gelu(gate))
        weights, biases = first.weight.split(inner), first.bias.split(inner)
        for begin in range(0, rows.shape[0], step):
            part = rows[begin : begin + step]
            value, gate = (self.take(name, part.shape[0], inner) for name in ("value", "gate"))
            for into, weight, bias in zip((value, gate), weights, biases, strict=True):
                self._linear(part, weight, bias, into)
            value.mul_(torch.ops.aten.gelu_(gate))
            self._linear(value, last.weight, last.bias, out[begin : begin + step])
        return out.view(*x.shape[:-1], last.out_features)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        if _by_kernels(x, weight):
            products.multiply(x, weight, self, bias, turned=True, out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return Store(self.most)

    def __reduce__(self) -> tuple[type[Store], tuple[Any, ...]]:
        return Store, (self.most,)
