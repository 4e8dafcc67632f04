"""Checkpoints of true size with random weights, for comparisons and benchmarks: no real ones are needed."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from sfumato.families import Family
from sfumato.weights.lazy import Lazy
from sfumato.weights.parts import shapes_of
from sfumato.weights.writing import write


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    """Random values that depend on the name alone; the networks' norms keep what follows near unit size."""

    def read() -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) >= 2:
            return (noise * noise[0].numel() ** -0.5).to(dtype)
        return (0.1 * noise + (1.0 if name.endswith("weight") else 0.0)).to(dtype)

    return Lazy(shape, dtype, read)


def write_random(target: Path, family: Family, dtype: torch.dtype) -> None:
    """Write a file or a folder, as the target's name says, unless it is there already."""
    if target.exists():
        return
    parts = {
        part: {name: random_tensor(f"{part}.{name}", shape, dtype) for name, shape in shapes.items()}
        for part, shapes in shapes_of(family).items()
    }
    write(target, family, parts)
