"""Numbers for what personalising did: how near drawn pictures are to real ones, and how well they follow edges.

Knows no model and no file. Letters: N M pictures, D width of features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from torch import Tensor


@dataclass(frozen=True)
class Match:
    """Shares of edge pixels: `precision` of the drawn ones that were wanted, `recall` of the wanted that were drawn."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Their harmonic mean; 0 where both are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def edge_match(drawn: np.ndarray, wanted: np.ndarray, tolerance: float) -> Match:
    """Edge maps (H, W), above 127 is an edge; those at most `tolerance` px apart are the same.

    Precision and recall of boundaries as Martin et al. 2004 define them, without their one-to-one assignment. A map
    without edges matches nothing, and two of them match wholly. ValueError where the shapes differ.
    """
    if drawn.shape != wanted.shape or drawn.ndim != 2:
        raise ValueError(f"drawn={drawn.shape}: one shape (H, W) is needed for both, wanted is {wanted.shape}")
    here, there = drawn > 127, wanted > 127
    if not here.any() or not there.any():
        same = float(here.any() == there.any())
        return Match(same, same)
    near_there, near_here = (distance_transform_edt(~edges) <= tolerance for edges in (there, here))
    return Match(float(near_there[here].mean()), float(near_here[there].mean()))


def mean_match(found: Sequence[Match]) -> dict[str, float]:
    """Means over pictures, of each one's own F1, precision and recall."""
    return {name: float(np.mean([getattr(each, name) for each in found])) for name in ("f1", "precision", "recall")}


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """Cosines (N, M) of all pairs of features (N, D) and (M, D)."""
    x, y = (features.double() / features.double().norm(dim=1, keepdim=True) for features in (a, b))
    return (x @ y.T).numpy()


def likeness(drawn: Tensor, real: Tensor) -> float:
    """The mean cosine of all pairs of features (N, D) and (M, D)."""
    return float(cosines(drawn, real).mean())


def likeness_within(real: Tensor) -> float:
    """The mean cosine of each of (N, D) with the others: what a picture of the same kind can reach. N is 2 or more."""
    if len(real) < 2:
        raise ValueError(f"real={len(real)}: 2 pictures or more are needed")
    found = cosines(real, real)
    return float(found[~np.eye(len(found), dtype=bool)].mean())


def recognised(drawn: Tensor, real: Tensor, others: Tensor) -> float:
    """The share of drawn pictures (N, D) whose nearest of all is one of `real`, not of `others`."""
    return float((cosines(drawn, real).max(1) > cosines(drawn, others).max(1)).mean())
