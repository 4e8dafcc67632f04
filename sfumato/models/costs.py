"""Which way a 3 x 3 convolution goes on a CPU: the least sum of costs that were fitted to measurements.

A table for each kind of processor, with compiled kernels and without: benchmarks/convolution_costs.py measures and fits
them. Nothing is timed when a network works, so the same shape goes the same way in every run on a machine.
Letters: B batch, C channels in, O channels out, T tiles of m x m results, n = (m + 2)^2 products of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

# Ways that a weight may be kept for: in the order that PyTorch's convolution brings it into at every call, transformed.
KEPT = ("ordered", "winograd2", "winograd4")


@dataclass(frozen=True)
class Table:
    """Milliseconds of one core for 1e9 products, 1e6 numbers of the weight that is multiplied with, 1e6 numbers of the
    maps that are, and in any case; by way.

    `transform` is what 1e6 numbers of a transformed weight cost that is not kept, by way; `ordering` what 1e6 numbers
    of a weight beyond `ordered` cost which PyTorch's convolution brings into its order.
    """

    ways: Mapping[str, tuple[float, float, float, float]]
    transform: Mapping[str, float]
    ordering: float = 0.0
    ordered: int = 0


def sizes(shape: tuple[int, ...], out_channels: int, stride: int) -> dict[str, tuple[int, int, int]]:
    """Products, numbers of the weight and numbers of the maps of each way for a map of `shape` (B, C, h, w)."""
    batch, channels, height, width = shape
    results = batch * -(-height // stride) * -(-width // stride)
    weight = channels * out_channels
    maps = batch * channels * height * width + results * out_channels
    found = dict.fromkeys(("direct", "ordered"), (9 * results * weight, 9 * weight, maps))
    found["columns"] = 9 * results * weight, 9 * weight, 9 * results * channels
    if stride == 1:
        for m in (2, 4):
            n, tiles = (m + 2) ** 2, batch * -(-height // m) * -(-width // m)
            found[f"winograd{m}"] = n * tiles * weight, n * weight, n * tiles * (channels + out_channels)
    return found


def costs(
    table: Table, shape: tuple[int, ...], out_channels: int, stride: int, kept: tuple[str, ...] = ()
) -> dict[str, float]:
    """Milliseconds by way of a 3 x 3 convolution of a map of `shape`, padded by a cell.

    For the ways in `kept` the weight is there as it is wanted, or will be kept so; without that "ordered" is none.
    """
    found = {}
    for way, (products, numbers, maps) in sizes(shape, out_channels, stride).items():
        if way not in table.ways or (way == "ordered" and way not in kept):
            continue
        a, b, c, least = table.ways[way]
        cost = least + a * products / 1e9 + b * numbers / 1e6 + c * maps / 1e6
        if way == "direct":
            cost += table.ordering * max(0, numbers - table.ordered) / 1e6
        elif way not in kept:
            cost += table.transform.get(way, 0.0) * numbers / 1e6
        found[way] = cost
    return found


@cache
def cheapest(
    purpose: str,
    compiled: bool,
    shape: tuple[int, ...],
    out_channels: int,
    stride: int,
    kept: tuple[str, ...] = (),
) -> str:
    """The way of least cost here; `purpose` is "training" or "drawing"."""
    found = costs(TABLES[purpose, compiled, capability()], shape, out_channels, stride, kept)
    return min(found, key=lambda way: found[way])


@cache
def capability() -> str:
    """Which tables count here: "AVX512", or "AVX2" for all others."""
    return "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"


# "training" is a forward and a backward pass together, "drawing" a forward pass alone; whether tiles are computed by
# compiled kernels; the kind of processor.
TABLES = {
    ("training", False, "AVX2"): Table(
        {
            "direct": (64.0, 5.0, 2.6, 0.0),
            "columns": (66.2, 1.6, 3.5, 0.0),
            "winograd2": (81.5, 3.3, 5.0, 0.0),
            "winograd4": (70.0, 4.3, 7.0, 0.0),
        },
        {},
    ),
    ("training", False, "AVX512"): Table(
        {
            "direct": (26.597, 2.291, 1.813, 0.671),
            "columns": (66.477, 1.188, 1.236, 1.02),
            "winograd2": (56.958, 2.791, 3.727, 0.376),
            "winograd4": (58.766, 2.378, 4.868, 0.626),
        },
        {},
        ordering=2.334,
        ordered=1_500_000,
    ),
    ("training", True, "AVX2"): Table(
        {
            "direct": (55.063, 2.015, 1.624, 0.625),
            "columns": (64.568, 1.561, 1.256, 1.22),
            "winograd2": (60.071, 1.04, 1.437, 0.0),
            "winograd4": (62.856, 0.96, 2.133, 0.0),
        },
        {},
        ordering=1.988,
        ordered=1_500_000,
    ),
    ("training", True, "AVX512"): Table(
        {
            "direct": (26.597, 2.291, 1.813, 0.671),
            "columns": (66.477, 1.188, 1.236, 1.02),
            "winograd2": (29.637, 0.793, 1.127, 0.0),
            "winograd4": (29.539, 0.696, 1.562, 0.0),
        },
        {},
        ordering=2.334,
        ordered=1_500_000,
    ),
    ("drawing", False, "AVX2"): Table(
        {
            "direct": (21.7, 0.5, 0.3, 0.01),
            "ordered": (21.7, 0.1, 0.3, 0.01),
            "columns": (24.0, 0.3, 1.0, 0.1),
            "winograd2": (25.0, 0.4, 2.2, 0.15),
            "winograd4": (25.0, 0.4, 2.2, 0.15),
        },
        {"winograd2": 0.9, "winograd4": 0.9},
        ordering=3.8,
        ordered=1_500_000,
    ),
    ("drawing", False, "AVX512"): Table(
        {
            "direct": (8.55, 0.401, 0.425, 0.135),
            "ordered": (8.973, 0.179, 0.377, 0.047),
            "columns": (23.688, 0.099, 0.364, 0.048),
            "winograd2": (25.358, 0.195, 0.939, 0.025),
            "winograd4": (26.894, 0.241, 1.721, 0.018),
        },
        {"winograd2": 0.804, "winograd4": 0.551},
        ordering=3.251,
        ordered=1_500_000,
    ),
    ("drawing", True, "AVX2"): Table(
        {
            "direct": (15.858, 0.439, 0.372, 0.114),
            "ordered": (15.861, 0.206, 0.469, 0.054),
            "columns": (21.892, 0.394, 0.447, 0.055),
            "winograd2": (19.096, 0.157, 0.345, 0.003),
            "winograd4": (24.484, 0.084, 0.465, 0.006),
        },
        {"winograd2": 0.247, "winograd4": 0.205},
        ordering=2.34,
        ordered=1_500_000,
    ),
    ("drawing", True, "AVX512"): Table(
        {
            "direct": (8.55, 0.401, 0.425, 0.135),
            "ordered": (8.973, 0.179, 0.377, 0.047),
            "columns": (23.688, 0.099, 0.364, 0.048),
            "winograd2": (10.398, 0.047, 0.282, 0.001),
            "winograd4": (12.829, 0.065, 0.366, 0.001),
        },
        {"winograd2": 0.252, "winograd4": 0.193},
        ordering=3.251,
        ordered=1_500_000,
    ),
}
