"""Group norm with SiLU after it, of maps that lie channels last, compiled: float32 and bfloat16 on a CPU.

Wu & He 2018. Owns what is asked of norm.cpp and its gradients. `None` where there is no compiled code, or it is not
made for what is given: the caller has PyTorch's. Letters: B pictures, C channels, G groups, h w size of a map.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.kernels.build import passes

DTYPES = (torch.float32, torch.bfloat16)
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


@cache
def _functions() -> tuple[Any, Any] | None:
    """The forward and the backward pass, with their types."""
    return passes(
        "sfumato_group_norm",
        [*[_POINTER] * 7, *[_LONG] * 4, _FLOAT, _INT, _INT, _INT],
        [*[_POINTER] * 11, *[_LONG] * 4, _INT, _INT, _INT],
    )


def may_be_compiled(x: Tensor) -> bool:
    """Whether compiled code is made for a tensor of this kind, and this is a call that it may do."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch.compiler.is_compiling() and not torch._C._get_tracing_state()


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor | None:
    """Group norm of x + shift, then SiLU where asked; x (B, C, h, w), weight and bias (C,), shift (B, C).

    Returns x's shape and dtype, channels last, or None where there is no compiled code for it. Sums are in float32 and
    double, whatever x is. Gradients of gradients are refused.
    """
    if not may_be_compiled(x) or x.dim() != 4 or not x.numel() or _functions() is None:
        return None
    weight, bias = weight.float(), bias.float()
    shift = None if shift is None else shift.float().contiguous()
    given = (x, weight, bias, shift)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        found: Tensor = _GroupNorm.apply(x, weight, bias, shift, groups, eps, silu)
        return found
    return _forward(x, weight, bias, shift, groups, eps, silu)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comes out, x as it was read, and the groups' means and 1 / std, (B, G) float32."""
    functions = _functions()
    assert functions is not None
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty(batch, groups, dtype=torch.float32) for _ in range(2))
    functions[0](
        *addresses(x, out, weight, bias, shift, mean, rstd), batch, height * width, channels, groups, eps, silu,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out, x, mean, rstd


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where the tensors lie, for ctypes; whoever asks holds the tensors until the call is over."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class _GroupNorm(torch.autograd.Function):
    """Keeps x and two numbers a group; what lies between is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        out, x, mean, rstd = _forward(x, weight, bias, shift, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        functions = _functions()
        assert functions is not None
        x, weight, bias, shift, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_x = torch.empty_like(x, memory_format=torch.channels_last)
        of_weight, of_bias = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
        of_shift = None if shift is None else torch.empty_like(shift)
        functions[1](
            *addresses(grad, x, of_x, weight, bias, shift, mean, rstd, of_weight, of_bias, of_shift),
            batch, height * width, channels, ctx.groups, ctx.silu, x.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        return of_x, of_weight.sum(0), of_bias.sum(0), of_shift, None, None, None
