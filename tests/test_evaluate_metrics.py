"""Metrics of features against known answers and in their own laws; against peers in test_evaluate_peers.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sfumato.evaluate import metrics
from sfumato.evaluate.statistics import Statistics, statistics_of

from .test_evaluate_statistics import FACTS


def cloud(count, dim=24, seed=0, shift=0.0, stretch=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((dim, dim)) / dim**0.5
    return shift + stretch * rng.standard_normal((count, dim)) @ mixing


REAL, DRAWN = cloud(600), cloud(500, seed=1, shift=0.3, stretch=1.2)


def rng():
    return np.random.default_rng(0)


def exact(mean, covariance):
    """Statistics that say exactly this mean and covariance."""
    statistics = Statistics(FACTS, len(mean))
    statistics.count, statistics.mean, statistics.scatter = 10**6 + 1, np.array(mean), 10**6 * np.array(covariance)
    return statistics


def test_a_set_against_itself_is_0():
    own = statistics_of(REAL, FACTS)
    assert abs(metrics.fid(own, own)) < 1e-3
    few = statistics_of(100 * cloud(40, dim=300), FACTS)  # without full rank and with great numbers
    assert abs(metrics.fid(few, few)) < 1e-3
    assert abs(metrics.cmmd(REAL, REAL)) < 1e-3
    unit = REAL / np.linalg.norm(REAL, axis=1, keepdims=True)
    assert abs(metrics.kid(unit, unit, rng(), subsets=5).value) < 1e-3
    assert metrics.precision_recall(REAL, REAL) == (1, 1)
    assert np.allclose(metrics.clip_scores(REAL, REAL, weight=1), 1)


def test_fid_of_two_normal_distributions():
    """Where covariances commute, it is |m - w|^2 + the sum of (s - t)^2 of the deviations."""
    s, t = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 1.5])
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
    a = exact([0, 0, 0], turn @ np.diag(s**2) @ turn.T)
    b = exact([1, 2, 2], turn @ np.diag(t**2) @ turn.T)
    assert metrics.fid(a, b) == pytest.approx(9 + 5, rel=1e-9)


def test_fid_of_few_features_warns_and_stays_finite(caplog):
    few = statistics_of(cloud(20), FACTS)
    with caplog.at_level("WARNING"):
        value = metrics.fid(statistics_of(REAL, FACTS), few)
    assert value > metrics.fid(statistics_of(REAL, FACTS), statistics_of(cloud(600, seed=5), FACTS))
    assert len(caplog.records) == 1 and "20 features of 24 dimensions" in caplog.text
    assert metrics.bias_warning(25, 24) is None and metrics.bias_warning(24, 24)


@pytest.mark.parametrize("change", [{"features": "clip"}, {"hash": "cd"}, {"resize": "legacy"}, {"size": 224}])
def test_fid_refuses_unlike_features(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        metrics.fid(statistics_of(REAL, FACTS), statistics_of(DRAWN, replace(FACTS, **change)))


def test_fid_infinity_has_less_bias():
    """Of the very distribution the true FID is 0: what 1,000 features leave is mostly gone."""
    mixing = np.random.default_rng(99).standard_normal((24, 24)) / 24**0.5
    truth = exact(np.zeros(24), mixing.T @ mixing)
    sets = [cloud(1000, seed=seed) for seed in range(6)]
    plain = [metrics.fid(truth, statistics_of(drawn, FACTS)) for drawn in sets]
    without = [metrics.fid_infinity(truth, drawn, rng()) for drawn in sets]
    assert min(plain) > 0.1
    assert abs(np.mean(without)) < np.mean(plain) / 4
    assert metrics.fid_infinity(truth, sets[0], rng()) == without[0]


def test_kid_without_bias_and_with_a_spread():
    """Over many draws of one distribution the mean is 0 within its error, and it grows with the distance."""
    same = [metrics.kid(cloud(60, seed=2 * i), cloud(60, seed=2 * i + 1), rng(), subsets=1).value for i in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5
    near, far = (metrics.kid(REAL, cloud(600, seed=1, shift=shift), rng(), 200, 20) for shift in (0.2, 0.5))
    assert 0 < near.value < far.value and near.deviation > 0
    assert (near.draws, near.each) == (20, 200)


def test_cmmd_by_hand():
    a, b = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0]])
    k = math.exp(-2 / 200)  # of unit vectors at right angles
    assert metrics.cmmd(a, b) == pytest.approx(1000 * ((1 + k) / 2 + 1 - (1 + k)), rel=1e-12)


def test_precision_and_recall_tell_apart():
    """Real: two clusters. Drawn: one of them, which is precise but does not recall; then all over, the reverse."""
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((100, 2)), 50 + generator.standard_normal((100, 2))
    precision, recall = metrics.precision_recall(np.concatenate([left, right]), left + 0.01)
    assert precision > 0.95 and 0.4 < recall < 0.55
    everywhere = generator.uniform(-60, 110, (400, 2))
    precision, recall = metrics.precision_recall(np.concatenate([left, right]), everywhere)
    assert precision < 0.1 and recall > 0.9


def test_precision_recall_by_hand():
    """On a line with k = 1: balls reach 1, 1 and 3."""
    real, drawn = np.array([[0.0], [1.0], [4.0]]), np.array([[-0.5], [6.5], [8.0]])
    # drawn's own balls reach 7, 1.5 and 1.5, so all of the real ones lie in the first
    assert metrics.precision_recall(real, drawn, neighbours=1) == (pytest.approx(2 / 3), 1.0)


def test_inception_score_at_its_ends():
    sure = 50.0 * np.eye(5)[np.arange(100) % 5]
    assert metrics.inception_score(sure, splits=4).value == pytest.approx(5, rel=1e-9)
    assert metrics.inception_score(np.zeros((100, 5))).value == pytest.approx(1, rel=1e-12)
    assert metrics.inception_score(1000 * sure, splits=1).value == pytest.approx(5, rel=1e-9)  # no overflow


def test_clip_score_is_hessels():
    pictures, texts = np.array([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert metrics.clip_scores(pictures, texts) == pytest.approx([2.5, 2.5 / 2**0.5, 0])


@pytest.mark.parametrize(
    "call, field",
    [
        (lambda: metrics.kid(REAL, DRAWN[:, :5], rng()), "drawn"),
        (lambda: metrics.kid(REAL, DRAWN[:1], rng()), "size=1"),
        (lambda: metrics.cmmd(REAL, np.zeros_like(REAL)), "embeddings"),
        (lambda: metrics.precision_recall(REAL, DRAWN[:3]), "neighbours=3"),
        (lambda: metrics.inception_score(DRAWN, 501), "splits=501"),
        (lambda: metrics.clip_scores(REAL, DRAWN), "texts"),
        (lambda: metrics.fid_infinity(statistics_of(REAL, FACTS), DRAWN, rng(), least=500), "least=500"),
        (lambda: metrics.fid_infinity(statistics_of(REAL, FACTS), DRAWN, rng(), num_points=1), "num_points=1"),
    ],
)
def test_bad_input_is_one_line(call, field):
    with pytest.raises(ValueError, match=f"^{field}") as caught:
        call()
    assert "\n" not in str(caught.value)
