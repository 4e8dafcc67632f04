"""The gated GELU, value * gelu(gate), compiled: float32 and bfloat16 on a CPU.

Shazeer 2020. Owns what is asked of gated.cpp and its gradients. `None` where there is no compiled code, or it is not
made for what is given: the caller has PyTorch's. Letters: D width, I channels of value and of gate.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.kernels.build import passes
from sfumato.kernels.norm import addresses, may_be_compiled

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


@cache
def _functions() -> tuple[Any, Any] | None:
    """The forward and the backward pass, with their types."""
    return passes(
        "sfumato_gated", [_POINTER, _POINTER, _LONG, _LONG, _INT, _INT], [*[_POINTER] * 3, _LONG, _LONG, _INT, _INT]
    )


def gated(x: Tensor) -> Tensor | None:
    """value * gelu(gate) of x (..., 2 I), value before gate -> (..., I) of x's dtype.

    None where there is no compiled code for it. Gradients of gradients are refused.
    """
    if not may_be_compiled(x) or not x.numel() or _functions() is None:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Gated.apply(x)
        return found
    return _forward(x.contiguous())


def _sizes(x: Tensor) -> tuple[int, ...]:
    """What both functions end with."""
    inner = x.shape[-1] // 2
    return x.numel() // (2 * inner), inner, x.dtype == torch.bfloat16, torch.get_num_threads()


def _forward(x: Tensor) -> Tensor:
    functions = _functions()
    assert functions is not None
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    functions[0](*addresses(x, out), *_sizes(x))
    return out


class _Gated(torch.autograd.Function):
    """Keeps what it was given; the GELU is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        functions = _functions()
        assert functions is not None
        (x,) = ctx.saved_tensors
        of_x = torch.empty_like(x)
        functions[1](*addresses(grad.to(x.dtype).contiguous(), x, of_x), *_sizes(x))
        return of_x
