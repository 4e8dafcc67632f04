"""Token merging: self-attention over fewer cells, those most alike standing for one another.

Bolya & Hoffman 2023 (Token Merging for Fast Stable Diffusion), after Bolya et al. 2023. Knows no network.
Letters: B rows, L = h w cells, D width; a sources, b destinations, r merged cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 0.75  # of the cells: one in each window of 2 x 2 stays


@dataclass(frozen=True)
class Matched:
    """Which cells of each row are joined: `apart` (B, a - r) and `joined` (B, r) are sources, `kept` (B, b)
    destinations, all places in L; `into` (B, r) says which destination, counted in `kept`, each joined one goes to."""

    apart: Tensor
    joined: Tensor
    kept: Tensor
    into: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L - r, D): sources that stay, then destinations, each the mean of all that it holds."""
        kept, joined = _taken(x, self.kept), _taken(x, self.joined)
        into = self.into[:, :, None].expand_as(joined)
        held = torch.ones_like(kept[:, :, :1]).scatter_add(1, self.into[:, :, None], torch.ones_like(joined[:, :, :1]))
        return torch.cat([_taken(x, self.apart), kept.scatter_add(1, into, joined) / held], dim=1)

    def spread(self, y: Tensor) -> Tensor:
        """y (B, L - r, D) -> (B, L, D): every joined cell has its destination's value."""
        apart, kept = y.split([self.apart.shape[1], self.kept.shape[1]], dim=1)
        joined = _taken(kept, self.into)
        places = torch.cat([self.apart, self.kept, self.joined], dim=1)
        values = torch.cat([apart, kept, joined], dim=1)
        return torch.empty_like(values).scatter_(1, places[:, :, None].expand_as(values), values)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """x (B, L, D) at places (B, M): (B, M, D)."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


def destinations(size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """One cell of each whole window of 2 x 2 in a map of `size` (h, w), drawn for each row: (B, h//2 * w//2) int64."""
    rows, columns = size[0] // 2, size[1] // 2
    picks = torch.stack([torch.randint(4, (rows, columns), generator=generator) for generator in generators])
    top = 2 * torch.arange(rows)[:, None] + picks // 2
    left = 2 * torch.arange(columns)[None] + picks % 2
    return (top * size[1] + left).flatten(1)


@dataclass(frozen=True)
class Merging:
    """How one call merges: the share `ratio` of the cells, in (0, 0.75]; a row's destinations come from its generator.

    Rows of one picture must have generators in the same state: what guidance compares is then merged alike.
    """

    ratio: float
    generators: Sequence[torch.Generator]

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= MOST:
            raise ValueError(f"ratio={self.ratio}: above 0, up to {MOST} is allowed")

    def match(self, z: Tensor, size: tuple[int, int]) -> Matched:
        """Join the sources of z (B, h w, D) that are most alike a destination, by cosine, to it.

        Bolya & Hoffman 2023, section 4. The r = ratio L sources nearest to theirs are joined, or all where r is more.
        ValueError for a map that has no window of 2 x 2, or whose size is not that of z.
        """
        length = z.shape[1]
        if min(size) < 2:
            raise ValueError(f"size={size}: 2 x 2 cells or more are needed")
        if len(self.generators) != len(z) or length != size[0] * size[1]:
            raise ValueError(f"z: {tuple(z.shape)} for {len(self.generators)} generators and {size[0]} x {size[1]}")
        chosen = destinations(size, self.generators).to(z.device)
        is_kept = torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device).scatter_(1, chosen, 1)
        order = is_kept.argsort(dim=1, stable=True)
        sources, kept = order.split([length - chosen.shape[1], chosen.shape[1]], dim=1)
        unit = F.normalize(z.float(), dim=2)
        likeness, into = (_taken(unit, sources) @ _taken(unit, kept).transpose(1, 2)).max(dim=2)
        ranked = likeness.argsort(dim=1, descending=True, stable=True)
        num_joined = min(int(self.ratio * length), sources.shape[1])
        first, rest = ranked[:, :num_joined], ranked[:, num_joined:]
        return Matched(sources.gather(1, rest), sources.gather(1, first), kept, into.gather(1, first))
