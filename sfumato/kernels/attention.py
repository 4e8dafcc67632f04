"""Attention with few keys and narrow heads, compiled: float32 and bfloat16 on a CPU.

Vaswani et al. 2017, eq. 1. Owns what is asked of attention.cpp and its gradients. `None` where there is no compiled
code, or PyTorch's is quicker: the caller has that. Letters: B batch, L queries, M keys, D width, n heads.
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

MOST = 16_384  # numbers of a head's keys: what they become, and values, and gradients of both lie in the cache then
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


@cache
def _functions() -> tuple[Any, Any] | None:
    """The forward and the backward pass, with their types."""
    return passes(
        "sfumato_attention", [*[_POINTER] * 5, *[_LONG] * 5, _INT, _INT], [*[_POINTER] * 9, *[_LONG] * 5, _INT, _INT]
    )


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor | None:
    """softmax(q k^T / sqrt(d)) v of each of the heads, d = D / n: q (B, L, D), k and v (B, M, D) -> (B, L, D).

    None where there is no compiled code for it, or a head has more than MOST numbers of keys. Gradients of gradients
    are refused.
    """
    if not all(map(may_be_compiled, (q, k, v))) or not (q.dtype == k.dtype == v.dtype) or q.shape[0] != k.shape[0]:
        return None
    if k.shape[1] * (k.shape[2] // heads) > MOST or not q.numel() or not k.numel() or _functions() is None:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        found: Tensor = _Attention.apply(q, k, v, heads)
        return found
    q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    return _forward(q, k, v, heads, None)


def _sizes(q: Tensor, k: Tensor, heads: int) -> tuple[int, ...]:
    """What both functions end with."""
    batch, length, width = q.shape
    half = q.dtype == torch.bfloat16
    return batch, heads, length, k.shape[1], width // heads, half, torch.get_num_threads()


def _forward(q: Tensor, k: Tensor, v: Tensor, heads: int, log_sums: Tensor | None) -> Tensor:
    functions = _functions()
    assert functions is not None
    out = torch.empty_like(q)
    functions[0](*addresses(q, k, v, out, log_sums), *_sizes(q, k, heads))
    return out


class _Attention(torch.autograd.Function):
    """Keeps what it was given and gave, and the logarithm of each softmax's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        log_sums = q.new_empty(q.shape[0], heads, q.shape[1], dtype=torch.float32)
        out = _forward(q, k, v, heads, log_sums)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        functions = _functions()
        assert functions is not None
        q, k, v, out, log_sums = ctx.saved_tensors
        of_q, of_k, of_v = (torch.empty_like(tensor) for tensor in (q, k, v))
        given = addresses(grad.to(q.dtype).contiguous(), q, k, v, out, log_sums, of_q, of_k, of_v)
        functions[1](*given, *_sizes(q, k, ctx.heads))
        return of_q, of_k, of_v, None
