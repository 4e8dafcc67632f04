"""Mean and covariance of features, gathered piece by piece: what FID and its kin compare. Knows no network, no picture.

Facts say what features are: statistics of other features are refused. Letters: B N features, D their width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.weights.files import load_safetensors, save_safetensors

KIND = "sfumato statistics of features"


@dataclass(frozen=True)
class Facts:
    """What features are: the network's name, the hash of its weights, how pictures are resized to `size` px a side."""

    features: str
    hash: str
    resize: str
    size: int


def check_alike(a: Facts, b: Facts) -> None:
    """ValueError, in one line, where two sets of features cannot be compared."""
    for name, mine in asdict(a).items():
        if mine != (other := asdict(b)[name]):
            raise ValueError(f"{name}={other!r}: the other features have {name}={mine!r}; only alike ones compare")


def doubles(features: Tensor | np.ndarray, name: str = "features") -> np.ndarray:
    """features (B, D) as doubles; ValueError where they have another shape or are not finite."""
    found = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"{name}={found.shape}: (B, D) of one or more is needed")
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: some are not finite; a network in half precision may have overflowed")
    return found


class Statistics:
    """`count`, `mean` (D,) and `scatter` (D, D), the sum of outer products of what differs from the mean, in doubles.

    Pieces are joined as Chan, Golub & LeVeque 1979, equations 2.1, so neither their size nor their order matters.
    """

    def __init__(self, facts: Facts, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: 1 or more are needed")
        self.facts = facts
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @property
    def dim(self) -> int:
        """D, the width of the features."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), divided by N - 1 as in Heusel et al.'s code; ValueError of fewer than two features."""
        if self.count < 2:
            raise ValueError(f"count={self.count}: a covariance needs 2 features or more")
        return self.scatter / (self.count - 1)

    def add(self, features: Tensor | np.ndarray) -> None:
        """Take in features (B, D). ValueError where their width is another or they are not finite."""
        found = doubles(features)
        if found.shape[1] != self.dim:
            raise ValueError(f"features={found.shape}: these statistics take (B, {self.dim})")
        mean = found.mean(axis=0)
        apart = found - mean
        self._join(len(found), mean, apart.T @ apart)

    def merged(self, other: Statistics) -> Statistics:
        """Both together, as of ranks or shards; ValueError where they are of other features."""
        check_alike(self.facts, other.facts)
        if self.dim != other.dim:
            raise ValueError(f"dim={other.dim}: the other statistics have dim={self.dim}")
        both = Statistics(self.facts, self.dim)
        for part in (self, other):
            both._join(part.count, part.mean, part.scatter)
        return both

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not count:
            return
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def statistics_of(features: Tensor | np.ndarray, facts: Facts) -> Statistics:
    """The statistics of all features (N, D) at once."""
    found = doubles(features)
    statistics = Statistics(facts, found.shape[1])
    statistics.add(found)
    return statistics


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write a .safetensors file, whole or not at all."""
    facts = {name: str(value) for name, value in asdict(statistics.facts).items()}
    tensors = {"mean": torch.from_numpy(statistics.mean), "scatter": torch.from_numpy(statistics.scatter)}
    save_safetensors(path, tensors, {"kind": KIND, "count": str(statistics.count), **facts})


def load_statistics(path: str | Path) -> Statistics:
    """What `save_statistics` wrote; ValueError, naming the file, where it is anything else."""
    tensors, metadata = load_safetensors(path)
    if metadata.get("kind") != KIND:
        raise ValueError(f"statistics={str(path)!r}: no statistics of features that sfumato wrote")
    try:
        facts = Facts(metadata["features"], metadata["hash"], metadata["resize"], int(metadata["size"]))
        count = int(metadata["count"])
        mean, scatter = (tensors[name].double().numpy().copy() for name in ("mean", "scatter"))
        found = Statistics(facts, len(mean))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"statistics={str(path)!r}: damaged ({error})") from error
    if count < 0 or mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or not math.isfinite(scatter.sum()):
        raise ValueError(f"statistics={str(path)!r}: damaged (mean {mean.shape}, scatter {scatter.shape})")
    found.count, found.mean, found.scatter = count, mean, scatter
    return found
