"""How near drawn pictures are to real ones, and to their captions: numbers from features. Knows no network, no picture.

Features are (N, D), `real` those of the data, `drawn` those of the model. All sums are in doubles. Where an equation
leaves a choice open the docstring says which is taken. Letters: N M features, D width, K classes, n features of a draw.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from sfumato.evaluate.statistics import Statistics, check_alike, doubles

log = logging.getLogger(__name__)

Features = Tensor | np.ndarray

KID_SUBSET, KID_SUBSETS = 1000, 100  # Binkowski et al. 2018, section 5: the size; 100 draws as their code
IS_SPLITS = 10  # Salimans et al. 2016, their code
NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019, section 3.1
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4, and the factor that they show
CLIP_WEIGHT = 2.5  # w of Hessel et al. 2021, equation 1
FID_POINTS, FID_LEAST = 15, 5000  # Chong & Forsyth 2020, section 4: points, and features of the smallest
ROWS = 1000  # of a matrix of distances at once


@dataclass(frozen=True)
class Spread:
    """A mean over draws, the standard deviation of the draws (divided by their number), how many, of how many each."""

    value: float
    deviation: float
    draws: int
    each: int


def _pair(real: Features, drawn: Features) -> tuple[np.ndarray, np.ndarray]:
    """Both as doubles; ValueError where they are no features of one width."""
    a, b = doubles(real, "real"), doubles(drawn, "drawn")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"drawn={b.shape}: the real features are {a.shape[1]} wide")
    return a, b


def _roots(values: np.ndarray) -> np.ndarray:
    """Square roots of a covariance's eigenvalues (D,). Those within rounding of the greatest are 0.

    Left in, the roots of so many of them would add up where features are fewer than dimensions.
    """
    return np.sqrt(np.where(values > 4 * np.finfo(np.float64).eps * values.max(), values, 0).clip(0))


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root (D, D) of a covariance (D, D)."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * _roots(values)) @ vectors.T


def frechet(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray,
    other_root: np.ndarray | None = None,
) -> float:  # fmt: skip
    """|m - w|^2 + Tr(C + V - 2 (C V)^(1/2)) of two normal distributions: Heusel et al. 2017, equation 6.

    The trace of the root is taken of V^(1/2) C V^(1/2), which has the same eigenvalues and is symmetric, so no
    imaginary part arises and nothing is added to the diagonal. `other_root` is V^(1/2) where it is known.
    """
    beside = root(other_covariance) if other_root is None else other_root
    inner = beside @ covariance @ beside
    product = _roots(np.linalg.eigvalsh((inner + inner.T) / 2)).sum()
    step = mean - other_mean
    return float(step @ step + np.trace(covariance) + np.trace(other_covariance) - 2 * product)


def fid(real: Statistics, drawn: Statistics) -> float:
    """Frechet distance of two sets of features, >= 0 but for rounding: Heusel et al. 2017, equation 6.

    Covariances are divided by N - 1, as Heusel et al. and all ports of their code do. It is "FID" of Inception's
    features, "CLIP-FID" of CLIP's (Kynkaanniemi et al. 2023). Of few features it is too large by a term like 1 / N:
    where a set has no more features than dimensions that is logged. ValueError where the features are unlike.
    """
    check_alike(real.facts, drawn.facts)
    if real.dim != drawn.dim:
        raise ValueError(f"dim={drawn.dim}: the real features have dim={real.dim}")
    if warning := bias_warning(min(real.count, drawn.count), real.dim):
        log.warning("%s", warning)
    return frechet(drawn.mean, drawn.covariance, real.mean, real.covariance)


def bias_warning(count: int, dim: int) -> str | None:
    """What a reader of an FID of `count` features of `dim` dimensions must know; None where there are more."""
    if count > dim:
        return None
    return (
        f"FID of {count} features of {dim} dimensions: its covariance has no full rank and it is much too large; it "
        f"only compares with others of as many pictures (KID, CMMD and FID-infinity depend less on their number)"
    )


def fid_infinity(
    real: Statistics, drawn: Features, rng: np.random.Generator, num_points: int = FID_POINTS, least: int | None = None
) -> float:
    """FID that infinitely many drawn pictures would have: Chong & Forsyth 2020, section 4.

    FID is taken of `num_points` random sets of `drawn` (N, D), evenly from `least` (5,000, or N / 5 of fewer than
    10,000) to N features, and a line in 1 / N fitted (their equation 4); the value is where it meets 0. May be
    a little below 0. The bias of the real set's own number stays. ValueError of too few points or features.
    """
    features = doubles(drawn, "drawn")
    count = len(features)
    if features.shape[1] != real.dim:
        raise ValueError(f"drawn={features.shape}: the real features are {real.dim} wide")
    least = (FID_LEAST if count >= 2 * FID_LEAST else max(2, count // 5)) if least is None else least
    if num_points < 2:
        raise ValueError(f"num_points={num_points}: a line needs 2 or more")
    if not 2 <= least < count:
        raise ValueError(f"least={least}: from 2 to below the {count} drawn features")
    covariance, beside = real.covariance, root(real.covariance)
    sizes = np.linspace(least, count, num_points).astype(int)
    found = []
    for size in sizes:
        chosen = features[rng.choice(count, size, replace=False)]
        spread = np.cov(chosen, rowvar=False).reshape(real.dim, real.dim)
        found.append(frechet(chosen.mean(axis=0), spread, real.mean, covariance, beside))
    return float(np.polyfit(1 / sizes, found, 1)[1])


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a b / D + 1)^3 of all pairs: Binkowski et al. 2018, section 4."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(
    real: Features, drawn: Features, rng: np.random.Generator, size: int = KID_SUBSET, subsets: int = KID_SUBSETS
) -> Spread:
    """Squared maximum mean discrepancy with a cubic kernel, without bias: Binkowski et al. 2018, section 4.

    The mean over `subsets` random sets of `size` features of either side (of all, where there are fewer), and its
    spread. May be a little below 0.
    """
    a, b = _pair(real, drawn)
    n = min(size, len(a), len(b))
    if n < 2 or subsets < 1:
        raise ValueError(f"size={n}, subsets={subsets}: 2 or more features and 1 or more subsets are needed")
    found = []
    for _ in range(subsets):
        x, y = a[rng.choice(len(a), n, replace=False)], b[rng.choice(len(b), n, replace=False)]
        within = sum(float(kernel.sum() - np.trace(kernel)) for kernel in (_cubic(x, x), _cubic(y, y)))
        found.append(within / (n * (n - 1)) - 2 * float(_cubic(x, y).mean()))
    return Spread(float(np.mean(found)), float(np.std(found)), subsets, n)


def cmmd(real: Features, drawn: Features) -> float:
    """1000 times the squared maximum mean discrepancy of CLIP embeddings, Gaussian kernel: Jayasumana et al. 2024.

    Equation 5 with sigma = 10 and each kernel's whole mean, diagonals too, as their code has it: it is never below 0,
    and 0 of a set against itself. Embeddings (N, E) are made unit vectors here, as theirs are.
    """
    a, b = (_units(features) for features in _pair(real, drawn))
    return CMMD_SCALE * (_gaussian(a, a) + _gaussian(b, b) - 2 * _gaussian(a, b))


def _gaussian(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of exp(-|a - b|^2 / (2 sigma^2)) over all pairs."""
    total = sum(
        float(np.exp(-_squares(a[start : start + ROWS], b) / (2 * CMMD_SIGMA**2)).sum())
        for start in range(0, len(a), ROWS)
    )
    return total / (len(a) * len(b))


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of all pairs, (N, M)."""
    return (np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None] - 2 * a @ b.T).clip(0)


def _units(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if not length.all():
        raise ValueError("embeddings: one is 0 and points nowhere")
    return features / length


def inception_score(logits: Features, splits: int = IS_SPLITS) -> Spread:
    """exp(E[KL(p(y|x) || p(y))]) in [1, K], p the softmax of logits (N, K): Salimans et al. 2016, section 4.

    The mean over `splits` equal pieces in the order given, and its spread. Their network leaves the last layer's bias
    out of the logits; so does `features.Inception`. ValueError of fewer logits than splits.
    """
    found = doubles(logits, "logits")
    if not 1 <= splits <= len(found):
        raise ValueError(f"splits={splits}: from 1 to the {len(found)} logits")
    shifted = found - found.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    ends = [index * len(found) // splits for index in range(splits + 1)]
    scores = []
    for start, stop in pairwise(ends):
        piece = p[start:stop]
        whole = np.log(piece.mean(axis=0).clip(np.finfo(np.float64).tiny))
        scores.append(float(np.exp((piece * (log_p[start:stop] - whole)).sum(axis=1).mean())))
    return Spread(float(np.mean(scores)), float(np.std(scores)), splits, len(found) // splits)


def precision_recall(real: Features, drawn: Features, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of drawn features within the real manifold, and of real ones within the drawn one, in [0, 1].

    Kynkaanniemi et al. 2019, equations 1 to 3: a manifold is the balls around its features that reach to the k-th
    nearest other one. ValueError where a set has no k others.
    """
    a, b = _pair(real, drawn)
    if neighbours < 1 or min(len(a), len(b)) <= neighbours:
        raise ValueError(f"neighbours={neighbours}: from 1 to below the {min(len(a), len(b))} features")
    middle = a.mean(axis=0)  # distances of numbers near 0 keep more digits
    a, b = a - middle, b - middle
    return _within(b, a, neighbours), _within(a, b, neighbours)


def _within(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """The share of points that lie in a ball of the manifold."""
    reach = np.concatenate(
        [
            np.partition(_squares(manifold[start : start + ROWS], manifold), neighbours, axis=1)[:, neighbours]
            for start in range(0, len(manifold), ROWS)
        ]
    )
    inside = 0
    for start in range(0, len(points), ROWS):
        # what lies on a ball's edge, a point of both sets say, is inside: distances have rounding
        near = _squares(points[start : start + ROWS], manifold) <= reach * (1 + 1e-9) + 1e-12
        inside += int(near.any(axis=1).sum())
    return inside / len(points)


def clip_scores(pictures: Features, texts: Features, weight: float = CLIP_WEIGHT) -> np.ndarray:
    """w max(cos, 0) of each picture's and its text's embedding (N, E) -> (N,): Hessel et al. 2021, equation 1.

    `weight` is their w = 2.5; others show it with 1 (as we do in figures) or with 100.
    """
    a, b = _pair(pictures, texts)
    if len(a) != len(b):
        raise ValueError(f"texts={b.shape}: {len(a)} pictures need as many")
    return weight * (_units(a) * _units(b)).sum(axis=1).clip(0)
