"""Weights of 8 bits: kept as codes with a scale for each output channel, turned back into numbers when they are used.

Owns the codes and their layers; `quantise` puts these in the place of a network's own. A layer computes as before, in
the precision that it had. Knows no files. Letters: O outputs, I inputs, W weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from sfumato.models.inference import Linear
from sfumato.models.layers import Conv2d

Kind: TypeAlias = Literal["int8", "fp8"]
KINDS = get_args(Kind)
WEIGHTS = ("full", *KINDS)
LARGEST = {"int8": 127.0, "fp8": 448.0}  # of fp8 E4M3, Micikevicius et al. 2022, table 1
KERNELS = ((1, 1), (3, 3))
LEAST = 4096  # numbers of a weight that is worth it


def encode(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes (the weight's shape; int8, or the bytes of fp8 E4M3 as uint8) and scales (O, 1, ...) float32.

    Symmetric, a scale for each output: max |W_o| / 127 or / 448, and the nearest code. An output of zeros has scale 1.
    """
    weight = weight.detach().float()
    most = weight.flatten(1).abs().amax(dim=1).view(-1, *[1] * (weight.ndim - 1))
    scale = torch.where(most > 0, most / LARGEST[kind], torch.ones_like(most))
    if kind == "int8":
        return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that codes stand for, rounded once to `dtype`; at most half a code's step from the exact one."""
    numbers = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn).float()
    return (numbers * scale).to(dtype)


class _Coded(nn.Module):
    """A layer whose weight is codes. `like`, of no numbers, moves with it and tells in which precision it computes."""

    codes: Tensor
    scale: Tensor
    like: Tensor

    def code(self, kind: Kind) -> None:
        """Put codes in the place of the weight, whose memory is given up, whoever still holds it."""
        weight: Tensor = self._parameters.pop("weight")  # type: ignore[assignment]
        codes, scale = encode(weight, kind)
        if codes.ndim == 4:
            codes = codes.contiguous(memory_format=torch.channels_last)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        weight.data = weight.new_empty((0,) * weight.ndim)

    def number(self) -> Tensor:
        """The weight in the precision that the layer computes in, made anew."""
        return decode(self.codes, self.scale, self.like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and changes of precision, which a scale does not take part in."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self


class CodedLinear(_Coded, nn.Linear):
    """A linear layer whose weight is codes."""

    weight = property(_Coded.number)


class CodedConv2d(_Coded, Conv2d):
    """A convolution whose weight is codes."""

    weight = property(_Coded.number)


def check_kind(kind: str) -> str:
    """The name of how weights are kept, "full" among them; ValueError where it is none."""
    if kind not in WEIGHTS:
        raise ValueError(f"weights={kind!r}: one of {', '.join(WEIGHTS)}")
    return kind


def quantise(network: nn.Module, kind: Kind) -> int:
    """Keep the weights of linear layers and of 1 x 1 and 3 x 3 convolutions as codes; returns the bytes saved.

    The layers stay, their classes change; weights of fewer than `LEAST` numbers stay too. The exact weights are gone.
    ValueError where a layer has a delta, or codes already.
    """
    if kind not in KINDS:
        raise ValueError(f"weights={kind!r}: one of {', '.join(KINDS)}")
    saved = 0
    with torch.inference_mode(False), torch.no_grad():
        for layer in _layers(network):
            saved += _saved(layer.weight, layer.weight.dtype)
            layer.__class__ = CodedLinear if isinstance(layer, nn.Linear) else CodedConv2d
            layer.code(kind)  # type: ignore[operator]
    return saved


def saved_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """What `quantise` saves of a network in a precision; the network may lie on "meta"."""
    return sum(_saved(layer.weight, dtype) for layer in _layers(network))


def largest(network: nn.Module) -> int:
    """The numbers of the largest weight that `quantise` takes, which is there whole while its layer works."""
    return max((layer.weight.numel() for layer in _layers(network)), default=0)


def is_quantised(network: nn.Module) -> bool:
    """Whether a network has layers whose weights are codes."""
    return any(isinstance(layer, _Coded) for layer in network.modules())


def _saved(weight: Tensor, dtype: torch.dtype) -> int:
    """Codes take a byte a number, scales four an output."""
    return weight.numel() * (dtype.itemsize - 1) - 4 * weight.shape[0]


def _layers(network: nn.Module) -> list[nn.Linear | Conv2d]:
    """The layers that are quantised."""
    found: list[nn.Linear | Conv2d] = []
    for name, layer in network.named_modules():
        if isinstance(layer, _Coded):
            raise ValueError(f"weights: {name} is of 8 bits already")
        if type(layer) in (nn.Linear, Linear) or (type(layer) is Conv2d and layer.kernel_size in KERNELS):
            if "forward" in vars(layer):
                raise ValueError(f"weights: {name} has a delta beside it; take it off first")
            if layer.weight.numel() >= LEAST:
                found.append(layer)
    return found
