"""Compiled matrix products: a linear layer of float32 on a CPU with its gradients; by tensors what linear.cpp does.

Without a library (see `build`) nothing here can be called. Letters: T rows, K channels in, O channels out.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.kernels.build import library
from sfumato.kernels.winograd import Room


@cache
def _functions() -> tuple[Any, Any]:
    found = library()
    if found is None:
        raise RuntimeError("there are no compiled kernels here: ask sfumato.kernels.build.library")
    work, product = found.sfumato_linear_work, found.sfumato_linear_product
    work.argtypes, work.restype = [ctypes.c_long], ctypes.c_long
    product.argtypes, product.restype = [*[ctypes.c_void_p] * 5, *[ctypes.c_long] * 8], None
    return work, product


def multiply(
    a: Tensor, b: Tensor, room: Room, bias: Tensor | None = None, turned: bool = False, out: Tensor | None = None
) -> Tensor:
    """a (T, K) times b (K, O), or where it is `turned` b (O, K); plus bias (O,): (T, O), without gradients.

    a may lie in any order, b by rows.
    """
    work, product = _functions()
    (rows, depth), threads = a.shape, torch.get_num_threads()
    columns = b.shape[0 if turned else 1]
    b, shift = b.contiguous(), None if bias is None else bias.contiguous()
    into = a.new_empty(rows, columns) if out is None else out
    memory = room.take("work", work(threads))
    pointers = (None if each is None else each.data_ptr() for each in (a, b, shift, into, memory))
    product(*pointers, rows, columns, depth, *a.stride(), b.stride(0), turned, threads)
    return into


class Linear(torch.autograd.Function):
    """x (T, K) times weight (O, K) turned, plus bias, with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, room: Room) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.room = room
        return multiply(x, weight, room, bias, turned=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), room = ctx.saved_tensors, ctx.room
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        of_x = multiply(grad, weight, room) if wants_x else None
        of_weight = multiply(grad.t(), x, room, out=room.lend(*weight.shape)) if wants_weight else None
        return of_x, of_weight, grad.sum(0) if wants_bias else None, None
