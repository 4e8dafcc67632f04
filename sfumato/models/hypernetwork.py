"""Hypernetworks: small networks that change what a U-Net's attentions make their keys and values of.

NovelAI's, 2022, in the form of A1111's web UI, whose rules and names of tensors these are. Knows no file.
Letters: B pictures, L tokens or cells, D width of a context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.models.transformer import CrossAttention

# A1111's names: seven of its own, where swish is the hard one, and torch's classes in small letters. Those of torch
# that are not here mix rows of a batch or need arguments, and no file can have been trained with them.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity, "swish": nn.Hardswish, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "celu": nn.CELU, "gelu": nn.GELU, "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "hardtanh": nn.Hardtanh, "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish, "prelu": nn.PReLU, "relu6": nn.ReLU6, "rrelu": nn.RReLU, "selu": nn.SELU, "silu": nn.SiLU,
    "softplus": nn.Softplus, "softshrink": nn.Softshrink, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink,
}  # fmt: skip
WEIGHT_INITS = ("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")
MOST_LAYERS, MOST_WIDTH = 32, 65536  # a hostile file shall not fill the memory


@dataclass(frozen=True)
class HypernetworkConfig:
    """The shape of each of its networks, two for each of `widths`: for keys and for values.

    `layers` are the widths of its layers in units of D, 1 at both ends; `dropout` has the probability behind each of
    them, none at both ends, and may be empty. The activation follows each linear layer, the last one only where
    `activate_output`; with `layer_norm` a normalisation comes next.
    """

    widths: tuple[int, ...] = (320, 640, 768, 1280)
    layers: tuple[float, ...] = (1, 2, 1)
    activation: str = "linear"
    layer_norm: bool = False
    activate_output: bool = False
    dropout: tuple[float, ...] = ()
    weight_init: str = "Normal"

    def __post_init__(self) -> None:
        if not self.widths or not all(1 <= width <= MOST_WIDTH for width in self.widths):
            raise ValueError(f"widths={self.widths}: one or more from 1 to {MOST_WIDTH} are needed")
        ends = len(self.layers) >= 2 and self.layers[0] == self.layers[-1] == 1
        if not ends or len(self.layers) > MOST_LAYERS:
            raise ValueError(f"layers={self.layers}: 2 to {MOST_LAYERS} widths that begin and end with 1 are needed")
        for width in self.widths:
            if not all(math.isfinite(part) and 1 <= int(width * part) <= MOST_WIDTH for part in self.layers):
                raise ValueError(f"layers={self.layers}: times {width}, 1 to {MOST_WIDTH} are allowed")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: one of {', '.join(ACTIVATIONS)}")
        if self.weight_init not in WEIGHT_INITS:
            raise ValueError(f"weight_init={self.weight_init!r}: one of {', '.join(WEIGHT_INITS)}")
        if self.dropout and (len(self.dropout) < len(self.layers) or not all(0 <= prob < 1 for prob in self.dropout)):
            raise ValueError(f"dropout={self.dropout}: one probability below 1 for each of {len(self.layers)} layers")


@contextmanager
def worn(unet: nn.Module, hypernetworks: Sequence[tuple[Hypernetwork, float]]) -> Iterator[None]:
    """Inside, the U-Net's attentions wear the hypernetworks, each at its strength, one over the other in order.

    They go on top of what the U-Net wears already; one of strength 0 is left out. Afterwards, also after an error, it
    wears what it wore. The hypernetworks must be on the U-Net's device. ValueError where a strength is not finite, or
    where no attention's context has one of a hypernetwork's widths.
    """
    attentions = [module for module in unet.modules() if isinstance(module, CrossAttention)]
    there = {attention.context_dim for attention in attentions}
    for network, strength in hypernetworks:
        if not math.isfinite(strength):
            raise ValueError(f"strength={strength}: a finite number is needed")
        if not there & set(network.config.widths):
            raise ValueError(
                f"hypernetwork: it is for contexts of widths {network.config.widths}, this U-Net has {sorted(there)}"
            )
    before = [(attention, attention.worn) for attention in attentions]
    try:
        for attention in attentions:
            width = attention.context_dim
            added = [
                network.change(width, strength)
                for network, strength in hypernetworks
                if strength != 0 and width in network.config.widths
            ]
            attention.worn = (*attention.worn, *added)
        yield
    finally:
        for attention, kept in before:
            attention.worn = kept


class HypernetworkModule(nn.Module):
    """One network: x (B, L, D) -> x + strength * linear(x)."""

    def __init__(self, width: int, config: HypernetworkConfig) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        last = len(config.layers) - 2
        for index in range(last + 1):
            inner, outer = (int(width * config.layers[place]) for place in (index, index + 1))
            parts.append(nn.Linear(inner, outer))
            if config.activation != "linear" and (index < last or config.activate_output):
                parts.append(ACTIVATIONS[config.activation]())
            if config.layer_norm:
                parts.append(nn.LayerNorm(outer))
            if config.dropout and config.dropout[index + 1] > 0:
                parts.append(nn.Dropout(config.dropout[index + 1]))
        self.linear = nn.Sequential(*parts)

    def forward(self, x: Tensor, strength: float = 1.0) -> Tensor:
        dtype = next(self.parameters()).dtype
        return (x.to(dtype) + self.linear(x.to(dtype)) * strength).to(x.dtype)


class Hypernetwork(nn.Module):
    """Two networks for each width: `layers["768"][0]` is the one for keys, `[1]` the one for values."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict(
            {
                str(width): nn.ModuleList(HypernetworkModule(width, config) for _ in range(2))
                for width in dict.fromkeys(config.widths)
            }
        )

    def pair(self, width: int) -> tuple[HypernetworkModule, HypernetworkModule]:
        """The networks for keys and for values of a width that there is."""
        both: nn.ModuleList = self.layers[str(width)]  # type: ignore[assignment]
        return both[0], both[1]  # type: ignore[return-value]

    def change(self, width: int, strength: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What an attention whose context is `width` wide does to what keys and values are made of."""
        for_keys, for_values = self.pair(width)

        def changed(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return for_keys(keys, strength), for_values(values, strength)

        return changed

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """New weights, as the config says and A1111 begins: small or spread normally or evenly, biases 0."""
        how = self.config.weight_init
        slope = "leaky_relu" if self.config.activation == "leakyrelu" else "relu"
        for module in self.modules():
            if isinstance(module, nn.PReLU):
                nn.init.constant_(module.weight, 0.25)  # torch's own
            if not isinstance(module, nn.Linear | nn.LayerNorm):
                continue
            weight = module.weight
            nn.init.zeros_(module.bias)
            if how == "Normal" or isinstance(module, nn.LayerNorm):
                nn.init.normal_(weight, std=0.01, generator=generator)
            elif how == "XavierUniform":
                nn.init.xavier_uniform_(weight, generator=generator)
            elif how == "XavierNormal":
                nn.init.xavier_normal_(weight, generator=generator)
            elif how == "KaimingUniform":
                nn.init.kaiming_uniform_(weight, nonlinearity=slope, generator=generator)  # type: ignore[arg-type]
            else:
                nn.init.kaiming_normal_(weight, nonlinearity=slope, generator=generator)  # type: ignore[arg-type]
