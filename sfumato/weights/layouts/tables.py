"""What a key table is made of: for each of our tensors, its name in another layout and how it is changed on the way.

A change is exact and has an inverse, so that there and back is the identity, bit for bit. Knows no file, no layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor


class Change(Enum):
    """How our tensor lies in the other layout."""

    SAME = "same"
    POINTWISE = "pointwise"  # ours is a 1 x 1 convolution (C, D, 1, 1), theirs a linear layer (C, D)
    TRANSPOSED = "transposed"  # theirs is (D, C) where ours is (C, D)
    QUERY = 0  # ours is one third of theirs, which stacks q, k and v
    KEY = 1
    VALUE = 2


THIRDS = (Change.QUERY, Change.KEY, Change.VALUE)


class Place(NamedTuple):
    """Where a tensor lies in another layout."""

    name: str
    change: Change = Change.SAME


Table = Mapping[str, Place]  # ours -> theirs


def stored_shape(ours: tuple[int, ...], change: Change) -> tuple[int, ...]:
    """The shape that the other layout stores a tensor of our shape in."""
    if change is Change.POINTWISE:
        return ours[:2]
    if change is Change.TRANSPOSED:
        return ours[::-1]
    if change in THIRDS:
        return (3 * ours[0], *ours[1:])
    return ours


def ours_of(stored: Tensor, change: Change) -> Tensor:
    """Their tensor -> ours, a view of it."""
    if change is Change.POINTWISE:
        return stored[:, :, None, None]
    if change is Change.TRANSPOSED:
        return stored.T
    if change in THIRDS:
        return stored.chunk(3)[THIRDS.index(change)]
    return stored


def to_layout(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """A network's tensors by our names -> the same by theirs; ValueError names the first missing or unknown one."""
    check_names(state, table)
    theirs: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor | None]] = {}
    for ours, (name, change) in table.items():
        tensor = state[ours]
        if change in THIRDS:
            thirds.setdefault(name, [None, None, None])[THIRDS.index(change)] = tensor
        elif change is Change.POINTWISE:
            theirs[name] = tensor.flatten(1)
        else:
            theirs[name] = tensor.T if change is Change.TRANSPOSED else tensor
    for name, parts in thirds.items():
        theirs[name] = torch.cat([part for part in parts if part is not None])
    return theirs


def from_layout(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The inverse of `to_layout`, with the same strictness; the tensors are views of `state`'s."""
    check_names(state, {place.name for place in table.values()})
    return {ours: ours_of(state[name], change) for ours, (name, change) in table.items()}


def check_names(state: Mapping[str, Tensor], expected: Mapping[str, object] | set[str]) -> None:
    """ValueError names the first tensor that is missing, or is in no place of the layout."""
    names = set(expected)
    if missing := names - set(state):
        raise ValueError(f"the tensor {min(missing)} is missing")
    if unknown := set(state) - names:
        raise ValueError(f"{len(unknown)} tensors are unknown in this layout, first {min(unknown)}")
