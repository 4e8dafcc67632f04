"""Upscalers in ncnn's two files, a .param that lists the layers and a .bin with their numbers, as ours.

The layers are compared one by one with those of our network; only where all are the same are the numbers taken, in
the file's order. Knows RRDBNet and SRVGG, nothing else of ncnn. A `Graph` is a list of layers, each with the places of
those that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.models.rrdbnet import RESIDUAL, SLOPE, RRDBNetConfig
from sfumato.models.srvgg import SRVGGConfig

Number = int | float
Value = Number | tuple[Number, ...]

MAGIC = "7767517"
MAX_BYTES = 4 * 2**20  # of a .param; x4plus has 116 kB
HALF = 0x01306B47  # what stands before weights in half precision: ncnn's modelbin.cpp
SINGLE = (0, 0x0002C056)  # and before those in single precision

# Parameters that say nothing when they are so, by the kind of layer: ncnn's documentation of its operators.
DEFAULTS: Mapping[str, Mapping[int, Value]] = {
    "Convolution": {2: 1, 3: 1, 8: 0, 9: 0, 11: 3, 12: 1, 13: 1, 14: 1, 15: 1, 16: 1, 18: 0, 19: 0},
    "BinaryOp": {0: 0, 1: 0, 2: 0},
    "Concat": {0: 0},
    "Interp": {3: 0, 4: 0, 5: 0, 6: 0},
    "PixelShuffle": {1: 0},
}
LEAKY: Mapping[int, Value] = {9: 2, 10: (SLOPE,)}


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the places of the layers it reads, its parameters, and the name of its tensors."""

    kind: str
    inputs: tuple[int, ...]
    params: Mapping[int, Value]
    name: str


Graph = list[Layer]


def read_ncnn(param: Path, weights: Path) -> tuple[RRDBNetConfig | SRVGGConfig, dict[str, Tensor]]:
    """The network of a pair of files and its tensors by our names, float16 or float32 as they are stored.

    ValueError of one line, without the file's name, where a file is damaged or of another network.
    """
    graph = read_param(param)
    compact = any(layer.kind == "PReLU" for layer in graph)
    config = _srvgg_config(graph) if compact else _rrdbnet_config(graph)
    expected = srvgg_graph(config) if isinstance(config, SRVGGConfig) else rrdbnet_graph(config)
    _compare(graph, expected, "the compact network" if compact else "RRDBNet")
    return config, _read_bin(weights.read_bytes(), expected)


# --- the .param


def read_param(path: Path) -> Graph:
    """The layers of a .param without those that only copy ("Split"), in the file's order."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"not a readable ncnn .param: it has more than {MAX_BYTES} bytes")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lines = [line for line in lines if line.strip()]
    if len(lines) < 2 or lines[0].strip() != MAGIC:
        raise ValueError(f"not a readable ncnn .param: its first line is not {MAGIC}")
    count = lines[1].split()[0]
    if count != str(len(lines) - 2):
        raise ValueError(f"a damaged ncnn .param: it has {len(lines) - 2} layers and says {count[:20]}")
    graph: Graph = []
    blobs: dict[str, int] = {}  # the name of what a layer makes -> that layer's place
    for number, line in enumerate(lines[2:], start=3):
        try:
            _add(line.split(), graph, blobs)
        except (ValueError, IndexError) as error:
            raise ValueError(f"a damaged ncnn .param: line {number} is {line[:60]!r}") from error
    return graph


def _add(words: list[str], graph: Graph, blobs: dict[str, int]) -> None:
    """One line: kind, name, how many inputs and outputs, their names, then number=value."""
    kind, name, num_in, num_out = words[0], words[1], int(words[2]), int(words[3])
    names, params = words[4 : 4 + num_in + num_out], dict(map(_parameter, words[4 + num_in + num_out :]))
    if num_in < 0 or num_out < 1 or len(names) != num_in + num_out or any(each not in blobs for each in names[:num_in]):
        raise ValueError("not the inputs and outputs that it says")
    inputs = tuple(blobs[each] for each in names[:num_in])
    if kind == "Split":
        (place,) = inputs
    else:
        place = len(graph)
        graph.append(Layer(kind, inputs, params, name))
    for each in names[num_in:]:
        if each in blobs:
            raise ValueError("two layers make the same")
        blobs[each] = place


def _parameter(word: str) -> tuple[int, Value]:
    """`6=1728` -> (6, 1728); an array's key is -23300 minus its number: `-23310=1,2.0e-01` -> (10, (0.2,))."""
    key, _, text = word.partition("=")
    place = int(key)
    if place > -23300:
        return place, _number(text)
    size, *items = map(_number, text.split(","))
    if size != len(items):
        raise ValueError("an array of another length than it says")
    return -23300 - place, tuple(items)


def _number(text: str) -> Number:
    return float(text) if any(letter in text for letter in ".eE") else int(text)


# --- which network it is


def _rrdbnet_config(graph: Graph) -> RRDBNetConfig:
    """The RRDBNet that a graph would be, from its first, second and last convolution and how many there are."""
    convs = [layer for layer in graph if layer.kind == "Convolution"]
    upsamplings = sum(layer.kind == "Interp" for layer in graph)
    blocks = (len(convs) - 4 - upsamplings) // 15
    if blocks < 1 or upsamplings > 4:
        raise ValueError("an ncnn model of another network than RRDBNet or Real-ESRGAN's compact one")
    features, growth, out_channels = (_width(conv) for conv in (convs[0], convs[1], convs[-1]))
    return RRDBNetConfig(_in_channels(convs[0]), out_channels, features, blocks, growth, 2**upsamplings)


def _srvgg_config(graph: Graph) -> SRVGGConfig:
    """The compact network that a graph would be."""
    convs = [layer for layer in graph if layer.kind == "Convolution"]
    shuffles = [layer.params.get(0) for layer in graph if layer.kind == "PixelShuffle"]
    shrinks = [layer.params.get(1) for layer in graph if layer.kind == "Interp"][1:]
    if len(convs) < 2 or len(shuffles) != 1 or not isinstance(shuffles[0], int) or not 1 <= shuffles[0] <= 16:
        raise ValueError("an ncnn model of another network than RRDBNet or Real-ESRGAN's compact one")
    inner = shuffles[0]
    scale = round(inner * shrinks[0]) if shrinks and isinstance(shrinks[0], float) and 0 < shrinks[0] <= 1 else inner
    channels = _in_channels(convs[0])
    return SRVGGConfig(channels, channels, _width(convs[0]), len(convs) - 2, scale, inner if scale != inner else None)


def _width(conv: Layer) -> int:
    """The channels that a convolution makes."""
    width = conv.params.get(0)
    if not isinstance(width, int) or not 1 <= width <= 4096:
        raise ValueError(f"a damaged ncnn .param: the layer {conv.name[:40]} makes no or too many channels")
    return width


def _in_channels(conv: Layer) -> int:
    """The channels that a 3 x 3 convolution reads: its count of weights is out * in * 9."""
    size = conv.params.get(6)
    return size // (9 * _width(conv)) if isinstance(size, int) and size >= 9 * _width(conv) else 1


# --- our networks as ncnn's layers


def rrdbnet_graph(config: RRDBNetConfig) -> Graph:
    """An RRDBNet as ncnn has it; `unshuffle` 1 is needed."""
    graph, features, growth = [Layer("Input", (), {}, "")], config.features, config.growth

    def conv(source: int, name: str, in_channels: int, out_channels: int, leaky: bool = False) -> int:
        return _append(graph, "Convolution", (source,), _conv(in_channels, out_channels, leaky), name)

    first = x = conv(0, "conv_first", config.in_channels, features)
    for block in range(config.blocks):
        outer = x
        for dense in (1, 2, 3):
            name, seen, source = f"body.{block}.rdb{dense}.conv", [x], x
            for index in range(4):
                seen.append(conv(source, f"{name}{index + 1}", features + index * growth, growth, leaky=True))
                source = _append(graph, "Concat", tuple(seen), {})
            last = conv(source, f"{name}5", features + 4 * growth, features)
            x = _append(graph, "Eltwise", (last, x), {0: 1, 1: (RESIDUAL, 1.0)})
        x = _append(graph, "Eltwise", (x, outer), {0: 1, 1: (RESIDUAL, 1.0)})
    x = _append(graph, "BinaryOp", (first, conv(x, "conv_body", features, features)), {})
    for step in range(1, config.upsamplings + 1):
        x = _append(graph, "Interp", (x,), {0: 1, 1: 2.0, 2: 2.0})
        x = conv(x, f"conv_up{step}", features, features, leaky=True)
    conv(conv(x, "conv_hr", features, features, leaky=True), "conv_last", features, config.out_channels)
    return graph


def srvgg_graph(config: SRVGGConfig) -> Graph:
    """A compact network as ncnn has it."""
    graph, width, inner = [Layer("Input", (), {}, "")], config.features, config.inner
    x, channels = 0, config.in_channels
    for index in range(config.convs + 1):
        x = _append(graph, "Convolution", (x,), _conv(channels, width), f"body.{2 * index}")
        x = _append(graph, "PReLU", (x,), {0: width}, f"body.{2 * index + 1}")
        channels = width
    last = _conv(width, config.out_channels * inner**2)
    x = _append(graph, "Convolution", (x,), last, f"body.{2 * config.convs + 2}")
    x = _append(graph, "PixelShuffle", (x,), {0: inner})
    plain = _append(graph, "Interp", (0,), {0: 1, 1: float(inner), 2: float(inner)})
    x = _append(graph, "BinaryOp", (x, plain), {})
    if inner != config.scale:
        _append(graph, "Interp", (x,), {0: 3, 1: config.scale / inner, 2: config.scale / inner})
    return graph


def _append(graph: Graph, kind: str, inputs: tuple[int, ...], params: Mapping[int, Value], name: str = "") -> int:
    graph.append(Layer(kind, inputs, params, name))
    return len(graph) - 1


def _conv(in_channels: int, out_channels: int, leaky: bool = False) -> dict[int, Value]:
    """The parameters of a 3 x 3 convolution with a bias: channels, kernel, padding, bias, count of weights."""
    params: dict[int, Value] = {0: out_channels, 1: 3, 4: 1, 5: 1, 6: 9 * in_channels * out_channels}
    return {**params, **LEAKY} if leaky else params


def _compare(graph: Graph, expected: Graph, network: str) -> None:
    """ValueError that names the first layer that is not as in our network."""
    for found, ours in zip(graph, expected, strict=False):
        same_inputs = found.inputs == ours.inputs or (ours.kind == "BinaryOp" and found.inputs == ours.inputs[::-1])
        if found.kind != ours.kind or not same_inputs or (ours.kind != "Input" and not _same(found, ours)):
            raise ValueError(f"the ncnn layer {found.name[:40]!r} ({found.kind[:20]}) is not as in {network}")
    if len(graph) != len(expected):
        raise ValueError(f"an ncnn model of {len(graph)} layers, {network} of this kind has {len(expected)}")


def _same(found: Layer, ours: Layer) -> bool:
    """Whether two layers of one kind have the same parameters; numbers are written with 7 digits."""
    defaults = DEFAULTS.get(ours.kind, {})
    for key in {*found.params, *ours.params}:
        a, b = (layer.params.get(key, defaults.get(key)) for layer in (found, ours))
        if a is None or b is None:
            return False
        a, b = (value if isinstance(value, tuple) else (value,) for value in (a, b))
        if len(a) != len(b) or not all(isclose(x, y, rel_tol=1e-6) for x, y in zip(a, b, strict=True)):
            return False
    return True


# --- the .bin


def _read_bin(data: bytes, graph: Graph) -> dict[str, Tensor]:
    """The tensors of a graph, from one end of the .bin to the other: weights behind a word that tells their precision,
    biases and slopes in single precision without one."""
    place, state = 0, {}

    def take(kind: str, count: int) -> Tensor:
        nonlocal place
        size = np.dtype(kind).itemsize * count
        if place + size > len(data):
            raise ValueError(f"a damaged ncnn .bin: it ends within {name}")
        numbers = np.frombuffer(data, kind, count, place).astype(np.dtype(kind).newbyteorder("="))  # a copy
        place += size + -size % 4
        return torch.from_numpy(numbers)

    for name, shape in _tensors(graph):
        count = int(np.prod(shape))
        if len(shape) == 4:
            if place + 4 > len(data):
                raise ValueError(f"a damaged ncnn .bin: it ends before {name}")
            word = int.from_bytes(data[place : place + 4], "little")
            place += 4
            if word != HALF and word not in SINGLE:
                raise ValueError(f"an ncnn .bin whose {name} is marked 0x{word:08X}: float16 or float32 is needed")
            state[name] = take("<f2" if word == HALF else "<f4", count).reshape(shape)
        else:
            state[name] = take("<f4", count)
    if place != len(data):
        raise ValueError(f"a damaged ncnn .bin: it has {len(data)} bytes, the .param asks for {place}")
    return state


def _tensors(graph: Graph) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a graph's tensors, in the order of the .bin."""
    for layer in graph:
        width, size = layer.params.get(0), layer.params.get(6)
        if layer.kind == "Convolution" and isinstance(width, int) and isinstance(size, int):
            yield f"{layer.name}.weight", (width, size // (9 * width), 3, 3)
            yield f"{layer.name}.bias", (width,)
        elif layer.kind == "PReLU" and isinstance(width, int):
            yield f"{layer.name}.weight", (width,)
