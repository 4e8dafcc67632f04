"""Statistics of features: streamed equals batch, pieces merge, files come back, and unlike features are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.evaluate.statistics import Facts, Statistics, load_statistics, save_statistics, statistics_of
from sfumato.weights.files import save_safetensors

FACTS = Facts("inception", "ab12", "clean", 299)


def drawn(count, dim=7, seed=0, shift=100.0):
    rng = np.random.default_rng(seed)
    return shift + rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 1000))
def test_streamed_equals_the_batch(sizes, seed):
    features = drawn(sum(sizes) + 1, seed=seed)
    streamed = Statistics(FACTS, 7)
    streamed.add(torch.from_numpy(features[:1]))
    for piece in np.split(features[1:], np.cumsum(sizes)[:-1]):
        streamed.add(piece)
    assert streamed.count == len(features)
    assert np.abs(streamed.mean - features.mean(axis=0)).max() < 1e-10
    assert np.abs(streamed.covariance - np.cov(features, rowvar=False)).max() < 1e-10


def test_shards_merge_to_the_whole_in_any_order():
    features = drawn(90)
    parts = [statistics_of(piece, FACTS) for piece in np.split(features, [10, 11, 60])]
    whole = statistics_of(features, FACTS)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        both = Statistics(FACTS, 7)
        for part in order:
            both = both.merged(parts[part])
        assert both.count == 90
        assert np.abs(both.mean - whole.mean).max() < 1e-10
        assert np.abs(both.covariance - whole.covariance).max() < 1e-10
    assert parts[0].count == 10  # merging leaves the parts alone


def test_a_file_brings_all_back(tmp_path):
    whole = statistics_of(drawn(20), FACTS)
    save_statistics(tmp_path / "of.safetensors", whole)
    back = load_statistics(tmp_path / "of.safetensors")
    assert back.facts == FACTS and back.count == 20
    assert np.array_equal(back.mean, whole.mean) and np.array_equal(back.scatter, whole.scatter)
    back.add(drawn(3))  # and goes on
    assert back.count == 23 and whole.count == 20


@pytest.mark.parametrize("change", [{"features": "clip"}, {"hash": "cd"}, {"resize": "legacy"}, {"size": 224}])
def test_unlike_features_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name}="):
        statistics_of(drawn(5), FACTS).merged(statistics_of(drawn(5), replace(FACTS, **change)))


@pytest.mark.parametrize("bad", [np.zeros(7), np.zeros((0, 7)), np.zeros((2, 6)), np.full((2, 7), np.nan)])
def test_bad_features_are_refused_and_change_nothing(bad):
    statistics = statistics_of(drawn(5), FACTS)
    with pytest.raises(ValueError, match="^features"):
        statistics.add(bad)
    assert statistics.count == 5


def test_a_covariance_needs_two():
    with pytest.raises(ValueError, match="count=1"):
        _ = statistics_of(drawn(1), FACTS).covariance


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_safetensors(path, {"mean": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match=r"other\.safetensors.*no statistics"):
        load_statistics(path)
    save_statistics(path, statistics_of(drawn(5), FACTS))
    save_safetensors(path, {"mean": torch.zeros(3)}, {"kind": "sfumato statistics of features"})
    with pytest.raises(ValueError, match=r"other\.safetensors.*damaged"):
        load_statistics(path)
