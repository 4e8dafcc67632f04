"""Tiled diffusion: any sampler on a picture larger than the network is good for, its questions asked tile by tile.

MultiDiffusion (Bar-Tal et al. 2023): at every step the overlapping tiles' answers are blended, so that they grow into
one picture. Registers no sampler and knows nothing of networks; that the sizes suit one is the caller's affair.
Letters: B pictures, C latent channels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.diffusion.samplers.registry import Steps, passed_through
from sfumato.types import Answer, Query


@dataclass(frozen=True)
class _Span:
    """One tile along one axis: its first cell, its cells in the picture, and their weights, both (n,)."""

    start: int
    cells: Tensor
    weight: Tensor


def tiled(steps: Steps, tile: int, overlap: int, seamless: tuple[bool, bool] = (False, False)) -> Steps:
    """The sampler `steps` with each query asked once a tile of `tile` cells, `overlap` or more shared by neighbours.

    The answers' parts are blended with weights that fall smoothly where tiles overlap. A query that fits into one tile
    passes as it is. In the directions `seamless` (x, y) tiles lie across the meeting edges too: such a tile's window
    ends beyond the picture's end. ValueError for a tile below 2 or an overlap outside 0 ... tile - 1.
    """
    if tile < 2:
        raise ValueError(f"tile={tile}: 2 cells or more are needed")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap}: 0 to {tile - 1} cells, less than the tile, are allowed")
    return passed_through(steps, lambda query: _ask(query, tile, overlap, seamless))


def crop(x: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """The window (top, left, height, width) of x (..., h, w), round the edges where it goes beyond them."""
    top, left, height, width = window
    rows, columns = (
        (torch.arange(start, start + size, device=x.device) % whole)
        for start, size, whole in zip((top, left), (height, width), x.shape[-2:], strict=True)
    )
    return x[..., rows[:, None], columns]


def _ask(query: Query, tile: int, overlap: int, seamless: tuple[bool, bool]) -> Generator[Query, Answer, Answer]:
    """One query, asked tile by tile; returns the whole picture's answer."""
    height, width = query.x.shape[-2:]
    if max(height, width) <= tile:
        return (yield query)
    cut = (width > tile, height > tile)
    sums: dict[str, Tensor] = {}
    for down in _spans(height, tile, overlap, seamless[1], query.x.device):
        for across in _spans(width, tile, overlap, seamless[0], query.x.device):
            window = (down.start, across.start, len(down.cells), len(across.cells))
            answer = yield replace(query, x=crop(query.x, window), window=window, cut=cut)
            weight = down.weight[:, None] * across.weight
            for name in ("x0", "uncond", "cond"):
                part = getattr(answer, name)
                if part is not None:
                    whole = sums.setdefault(name, torch.zeros_like(query.x))
                    whole[..., down.cells[:, None], across.cells] += weight * part
    return Answer(**sums)


def _spans(size: int, tile: int, overlap: int, ring: bool, device: torch.device) -> list[_Span]:
    """The fewest tiles, evenly spread, over an axis of `size` cells; their weights sum to 1 in every cell.

    A tile fades in while its predecessor fades out. On a ring the last `overlap` cells are covered a second time by
    tiles that begin before the first cell.
    """
    if size <= tile:
        cells = torch.arange(size, device=device)
        return [_Span(0, cells, torch.ones(size, device=device))]
    before = overlap if ring else 0
    last = math.ceil((size + before - overlap) / (tile - overlap)) - 1
    starts = [round(index * (size + before - tile) / last) - before for index in range(last + 1)]
    inside = torch.arange(tile, dtype=torch.float64) + 0.5
    ends = (starts[0] - tile + before, starts[-1] + tile - before)  # without a ring, where no tile is overlapped
    total, weights = torch.zeros(size, dtype=torch.float64), []
    for left, start, right in zip([ends[0], *starts], starts, [*starts[1:], ends[1]], strict=False):
        weight = _fade(inside / (left + tile - start)) * _fade((tile - inside) / (start + tile - right))
        total.index_add_(0, (torch.arange(start, start + tile) % size), weight)
        weights.append(weight)
    spans = []
    for start, weight in zip(starts, weights, strict=True):
        cells = torch.arange(start, start + tile) % size
        spans.append(_Span(start % size, cells.to(device), (weight / total[cells]).to(device, torch.float32)))
    return spans


def _fade(x: Tensor) -> Tensor:
    """From 0 at x <= 0 to 1 at x >= 1, level at both ends: 3 x^2 - 2 x^3."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)
