"""Trainable deltas beside a network's frozen weights: the forward passes change, the weights and their names do not.

Owns the parameters of the deltas, float32 until moved, and their start, at which nothing changes. Knows no files: what
a file would hold is in `tensors_of`. Letters: O I outputs and inputs, r rank, kh kw kernel, W weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.deltas import Change, DoRA, LoHa, LoKr, LoRA

Kind: TypeAlias = Literal["lora", "locon", "loha", "lokr", "dora"]
KINDS = get_args(Kind)
Layer: TypeAlias = nn.Linear | nn.Conv2d


def attach(
    network: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    kind: Kind = "lora",
    *,
    generator: torch.Generator | None = None,
    tucker: bool = False,
    factor: int | None = None,
    dropout: float = 0.0,
) -> Beside:
    """Put a trainable delta beside every linear layer and convolution whose name is, or ends with, one of `targets`.

    A target is whole words of a name ("attn1.to_q", "to_k"). "lora" and "dora" take linear layers and 1 x 1
    convolutions, the others every kernel; `tucker` gives large kernels of "locon", "loha" and "lokr" a core. `factor`
    is LoKr's smaller factor (None: near the root). `dropout` drops inputs of "lora" and "locon" in training. The
    network's parameters lose their gradients until `detach`. `generator` draws the start (None: seed 0). ValueError: no
    such layer, a layer that has a delta, a field out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: one of {', '.join(KINDS)}")
    if rank < 1:
        raise ValueError(f"rank={rank}: 1 or more are needed")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: above 0 is needed")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: 0 to below 1 is allowed")
    layers = _layers(network, targets, kind)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    made = {name: _delta(kind, layer, rank, float(alpha), generator, tucker, factor) for name, layer in layers.items()}
    return Beside(network, layers, made, dropout)


def tensors_of(beside: Beside) -> dict[str, Change]:
    """The deltas by the names of the parameters that they change, copies on the CPU: what an adapter's file holds."""
    return {f"{name}.weight": delta.change(detached=True) for name, delta in beside.deltas()}


def _layers(network: nn.Module, targets: Sequence[str], kind: Kind) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    used = set()
    for name, module in network.named_modules():
        hits = [target for target in targets if name == target or name.endswith(f".{target}")]
        if not hits or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        used.update(hits)
        if kind in ("lora", "dora") and isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1:
            raise ValueError(f"targets: {name} is a convolution of a large kernel; kind 'locon' takes it")
        if "forward" in vars(module):
            raise ValueError(f"targets: {name} has a delta already")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise ValueError(f"targets: {name} has {module.groups} groups; 1 is allowed")
        found[name] = module
    if missing := [target for target in targets if target not in used]:
        raise ValueError(f"targets: no linear layer or convolution of the network is called {missing[0]!r}")
    if not found:
        raise ValueError("targets: one or more are needed")
    return found


class Delta(nn.Module):
    """The parameters of one layer's delta; `make` gives the change that they are, from named tensors."""

    def __init__(self, tensors: dict[str, Tensor], make: Callable[[dict[str, Tensor]], Change]) -> None:
        super().__init__()
        self.make = make
        self.tensors = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})

    def change(self, detached: bool = False) -> Change:
        """The change, of the parameters themselves, or of copies on the CPU."""
        held = {name: tensor.detach().cpu().clone() if detached else tensor for name, tensor in self.tensors.items()}
        return self.make(held)


class Beside(nn.Module):
    """The deltas of a network. Its parameters are what is trained; `detach` gives the network back as it was."""

    def __init__(self, network: nn.Module, layers: dict[str, Layer], deltas: dict[str, Delta], dropout: float) -> None:
        super().__init__()
        self.names = tuple(layers)
        self.held = nn.ModuleList(deltas.values())
        self.dropout = dropout
        self.strength = 1.0
        self._layers = list(layers.values())  # a list: not modules of ours
        self._needed = {parameter: parameter.requires_grad for parameter in network.parameters()}
        device = self._layers[0].weight.device
        self.held.to(device=device)
        network.requires_grad_(False)
        for layer, delta in zip(self._layers, self.held, strict=True):
            layer.forward = MethodType(_forward_of(self, delta), layer)  # type: ignore[method-assign,arg-type]

    def deltas(self) -> list[tuple[str, Delta]]:
        """(name of the layer, its delta), in the network's order."""
        return list(zip(self.names, self.held, strict=True))  # type: ignore[arg-type]

    def detach(self) -> None:
        """The network's own forward passes and gradients again; twice does no more than once."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        for parameter, needed in self._needed.items():
            parameter.requires_grad_(needed)
        self._layers, self._needed = [], {}


def _forward_of(beside: Beside, delta: Delta) -> Callable[[Layer, Tensor], Tensor]:
    """The forward pass of a layer with its delta; a LoRA is computed on x, others on the weight."""

    def forward(layer: Layer, x: Tensor) -> Tensor:
        if beside.strength == 0:
            return type(layer).forward(layer, x)  # type: ignore[arg-type]
        change = delta.change()
        if isinstance(change, LoRA):
            plain = type(layer).forward(layer, x)  # type: ignore[arg-type]
            return plain + beside.strength * _low_rank(layer, change, F.dropout(x, beside.dropout, beside.training))
        weight = change.changed(layer.weight.float(), beside.strength).to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    return forward


def _low_rank(layer: Layer, change: LoRA, x: Tensor) -> Tensor:
    """alpha / r up(down(x)) in x's precision."""
    up, down = change.up.to(x.dtype), change.down.to(x.dtype)
    scale = 1.0 if change.alpha is None else change.alpha / change.rank
    if isinstance(layer, nn.Linear):
        return F.linear(F.linear(x, down), up) * scale
    if change.mid is None:
        x = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
    else:
        core = change.mid.to(x.dtype)
        x = F.conv2d(F.conv2d(x, down), core, None, layer.stride, layer.padding, layer.dilation)
    return F.conv2d(x, up) * scale


def _delta(
    kind: Kind, layer: Layer, rank: int, alpha: float, generator: torch.Generator, tucker: bool, factor: int | None
) -> Delta:
    shape = tuple(layer.weight.shape)

    def normal(*sizes: int) -> Tensor:
        """Of deviation 1 / root of what is summed over, so that sizes stay."""
        fan = torch.Size(sizes[1:]).numel()
        return torch.randn(sizes, generator=generator) * fan**-0.5

    core = tucker and len(shape) == 4 and shape[2] * shape[3] > 1
    if kind == "loha":
        return _loha(shape, rank, alpha, normal, core)
    if kind == "lokr":
        return _lokr(shape, rank, alpha, normal, core, factor)
    ones = (1,) * (len(shape) - 2)
    tensors = {"up": torch.zeros(shape[0], rank, *ones), "down": normal(rank, shape[1], *shape[2:])}
    if core and kind == "locon":
        tensors |= {"down": normal(rank, shape[1], *ones), "mid": normal(rank, rank, *shape[2:])}
    if kind == "dora":  # starts as the weight's own norms, so that nothing changes (Liu et al. 2024, section 4.1)
        tensors["magnitude"] = torch.linalg.vector_norm(layer.weight.detach().float().flatten(1), dim=1).cpu()
        return Delta(tensors, lambda held: DoRA(LoRA(held["up"], held["down"], alpha), held["magnitude"]))
    return Delta(tensors, lambda held: LoRA(held["up"], held["down"], alpha, held.get("mid")))


def _loha(shape: tuple[int, ...], rank: int, alpha: float, normal: Callable[..., Tensor], core: bool) -> Delta:
    """w2_a starts at 0, so that the product does."""
    if core:
        tensors = {f"t{n}": normal(rank, rank, *shape[2:]) for n in (1, 2)}
        tensors |= {f"w{n}_b": normal(rank, shape[1]) for n in (1, 2)}
        tensors |= {"w1_a": normal(rank, shape[0]), "w2_a": torch.zeros(rank, shape[0])}
    else:
        tensors = {f"w{n}_b": normal(rank, torch.Size(shape[1:]).numel()) for n in (1, 2)}
        tensors |= {"w1_a": normal(shape[0], rank), "w2_a": torch.zeros(shape[0], rank)}
    return Delta(tensors, lambda held: LoHa(**held, alpha=alpha))


def _lokr(
    shape: tuple[int, ...], rank: int, alpha: float, normal: Callable[..., Tensor], core: bool, factor: int | None
) -> Delta:
    """The smaller factor is whole; the larger is of rank r where that is less, and starts at 0."""
    (out1, out2), (in1, in2) = (_divided(size, factor) for size in shape[:2])
    tensors = {"w1": normal(out1, in1)}
    if rank >= max(out2, in2) / 2:
        tensors["w2"] = torch.zeros(out2, in2, *shape[2:])
    elif core:
        tensors |= {"t2": normal(rank, rank, *shape[2:]), "w2_a": torch.zeros(rank, out2), "w2_b": normal(rank, in2)}
    else:
        tensors |= {"w2_a": torch.zeros(out2, rank), "w2_b": normal(rank, in2 * torch.Size(shape[2:]).numel())}
    return Delta(tensors, lambda held: LoKr(**held, alpha=alpha))


def _divided(size: int, factor: int | None) -> tuple[int, int]:
    """size as small * large: small is the largest divisor that is at most `factor`, or at most the root."""
    most = min(factor, size) if factor is not None else int(size**0.5)
    if most < 1:
        raise ValueError(f"factor={factor}: 1 or more are needed")
    small = next(each for each in range(most, 0, -1) if size % each == 0)
    return small, size // small
