"""Tensors that are computed when they are written: what a file, a change of layout or a merge will give.

Shapes and precisions are known at once, data are read one tensor at a time, so that a conversion of 10 GB needs little
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.weights.layouts.tables import THIRDS, Change, Table, stored_shape
from sfumato.weights.parts import Source


@dataclass(frozen=True)
class Lazy:
    """A tensor to be: `read` computes it, `release` hands back what reading mapped."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    release: Callable[[], None] = lambda: None

    def to(self, dtype: torch.dtype) -> Lazy:
        """The same in another precision; whole numbers stay as they are."""
        if not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


def from_source(source: Source) -> Lazy:
    """A tensor of ours as it lies on disk."""
    return Lazy(source.shape, source.dtype, source.read, source.release)


def stored(parts: Mapping[str, Lazy], table: Table) -> dict[str, Lazy]:
    """A network's tensors by our names -> by the names and in the shapes of a table's layout."""
    out: dict[str, Lazy] = {}
    thirds: dict[str, list[Lazy]] = {}
    for ours, (name, change) in sorted(table.items(), key=lambda item: _third(item[1].change)):
        lazy = parts[ours]
        if change in THIRDS:
            thirds.setdefault(name, []).append(lazy)
            continue
        shape = stored_shape(lazy.shape, change)
        if change is Change.SAME:
            out[name] = lazy
        else:
            out[name] = replace(lazy, shape=shape, read=lambda lazy=lazy, change=change: _change(lazy.read(), change))  # type: ignore[misc]
    for name, group in thirds.items():
        out[name] = stack(group)
    return out


def _third(change: Change) -> int:
    return THIRDS.index(change) if change in THIRDS else 0


def _change(tensor: Tensor, change: Change) -> Tensor:
    return tensor.flatten(1) if change is Change.POINTWISE else tensor.T


def stack(group: Sequence[Lazy]) -> Lazy:
    """Tensors alike, one below the other."""
    first = group[0]

    def release() -> None:
        for lazy in group:
            lazy.release()

    shape = (sum(lazy.shape[0] for lazy in group), *first.shape[1:])
    return Lazy(shape, first.dtype, lambda: torch.cat([lazy.read() for lazy in group]), release)
