"""Compiled F(m x m, 3 x 3) for maps that lie channels last, with gradients: by tensors what winograd.cpp computes.

float32 on a CPU. Without a library (see `build`) nothing here can be called.
Letters: B batch, C channels in, O channels out, h w size of a map, which has a cell of zeros around it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.kernels.build import library


class Room(Protocol):
    """Memory that functions here need: `take`n until the name is taken again, lent as long as somebody holds it."""

    def take(self, name: str, *shape: int) -> Tensor: ...

    def lend(self, *shape: int) -> Tensor: ...


BAND = 8 * 2**20  # bytes of transformed tiles that are in work at a time
KEPT = 16 * 2**20  # bytes of them that are kept for a backward pass, at most

_FUNCTIONS = {  # pointers, numbers, and whether a number comes back
    "forward": (7, 7, False),
    "backward": (7, 7, False),
    "pack": (2, 3, False),
    "packed": (0, 3, True),
    "tiles": (0, 5, True),
    "forward_work": (0, 9, True),
    "backward_work": (0, 9, True),
}


@cache
def _function(name: str) -> Any:
    """m comes first, then pointers, then whole numbers."""
    found = library()
    if found is None:
        raise RuntimeError("there are no compiled kernels here: ask sfumato.kernels.build.library")
    pointers, numbers, returns = _FUNCTIONS[name]
    function = getattr(found, f"sfumato_winograd_{name}")
    function.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * pointers, *[ctypes.c_long] * (numbers - (pointers == 0))]
    function.restype = ctypes.c_long if returns else None
    return function


def _rows(x: Tensor) -> Tensor:
    """x (B, C, h, w) as (B, h, w, C), each picture's cells one after the other; a view where it lies channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def tiles_numbers(shape: tuple[int, ...], m: int) -> int:
    """How many numbers the transformed tiles of a map of `shape` (B, C, h, w) are, as `convolve` keeps them."""
    batch, channels, height, width = shape
    return int(_function("tiles")(m, batch, height, width, channels))


def packed_numbers(channels: int, outs: int, m: int) -> int:
    """How many numbers a weight (O, C, 3, 3) is, packed."""
    return int(_function("packed")(m, channels, outs))


def pack(weight: Tensor, m: int) -> Tensor:
    """The weight (O, C, 3, 3) transformed, in the order that `convolve` reads it in."""
    outs, channels = weight.shape[:2]
    packed = torch.empty(packed_numbers(channels, outs, m))
    rows = _rows(weight.detach())
    _function("pack")(m, rows.data_ptr(), packed.data_ptr(), channels, outs, torch.get_num_threads())
    return packed


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    m: int,
    room: Room,
    packed: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """F(m x m, 3 x 3) of x (B, C, h, w): (B, O, h, w), without gradients.

    `packed` spares the weight's transform; into `kept` (tiles_numbers of x) go the transformed tiles.
    """
    batch, channels, height, width = x.shape
    outs, threads = weight.shape[0], torch.get_num_threads()
    shape = BAND // 4, batch, height, width, channels, outs
    rows, filters = _rows(x), None if packed is not None else _rows(weight)
    shift = None if bias is None else bias.contiguous()
    out = x.new_empty(batch, height, width, outs)
    work = room.take("work", _function("forward_work")(m, *shape, kept is not None, threads))
    tensors = rows, filters, packed, shift, out, kept, work
    _function("forward")(m, *map(_pointer, tensors), *shape, threads)
    return out.permute(0, 3, 1, 2)


def gradients(
    grad: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    m: int,
    room: Room,
    of_x: bool,
    of_weight: Tensor | None,
) -> Tensor | None:
    """Backward of `convolve` from grad (B, O, h, w), with x or the tiles that were `kept` of it.

    Returns the gradient of x if it is wanted; that of the weight goes into `of_weight` (O, 3, 3, C).
    """
    batch, outs, height, width = grad.shape
    channels, threads = weight.shape[1], torch.get_num_threads()
    shape = BAND // 4, batch, height, width, channels, outs
    back = grad.new_empty(batch, height, width, channels) if of_x else None
    rows, filters, cells = _rows(grad), _rows(weight), None if x is None else _rows(x)
    work = room.take("work", _function("backward_work")(m, *shape, kept is not None or of_weight is None, threads))
    tensors = rows, cells, kept, filters, back, of_weight, work
    _function("backward")(m, *map(_pointer, tensors), *shape, threads)
    return None if back is None else back.permute(0, 3, 1, 2)


class Winograd(torch.autograd.Function):
    """F(m x m, 3 x 3) with its gradients. Keeps the weight and, where they are few enough, a map's tiles; else x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, m: int, room: Room) -> Tensor:
        numbers = tiles_numbers(tuple(x.shape), m)
        kept = room.lend(numbers) if ctx.needs_input_grad[1] and 4 * numbers <= KEPT else None
        ctx.m, ctx.room, ctx.whole = m, room, kept is not None
        ctx.save_for_backward(weight, x if kept is None else kept)
        return convolve(x, weight, bias, m, room, kept=kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight, saved = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        x, kept = (None, saved) if ctx.whole else (saved, None)
        into = ctx.room.lend(weight.shape[0], 3, 3, weight.shape[1]) if wants_weight else None
        of_x = gradients(grad, x, kept, weight, ctx.m, ctx.room, wants_x, into)
        of_weight = None if into is None else into.permute(0, 3, 1, 2)
        return of_x, of_weight, grad.sum((0, 2, 3)) if wants_bias else None, None, None
