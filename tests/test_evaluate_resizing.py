"""Resizing: what each way keeps and loses, and that it is said. Against clean-fid itself in test_evaluate_peers.py."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.evaluate.resizing import RESIZERS, resized


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("how", RESIZERS)
def test_the_right_size_passes_and_flat_pictures_stay_flat(how):
    picture = noise(33, 33)
    assert np.array_equal(resized([picture], 33, how)[0].permute(1, 2, 0).numpy(), (picture / np.float32(255)))
    flat = np.full((9, 17, 3), (1, 128, 255), dtype=np.uint8)
    found = resized([flat, flat[:5]], 31, how)
    assert found.shape == (2, 3, 31, 31)
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - np.array([1, 128, 255]) / 255).max() < 1e-6


def test_only_clean_filters_what_is_too_fine():
    """A board of single pixels is grey from afar; bilinear without antialiasing makes it black or striped."""
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    board = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    spread = {how: float(resized([board], 60, how).std()) for how in RESIZERS}
    assert spread["clean"] < 0.01
    assert min(spread["legacy-torch"], spread["legacy-tf"]) > 0.05


def test_legacy_tf_by_hand():
    """Place i of 4 lies at i / 2 of 2 pixels: 0, half, 1, and beyond the edge 1 again."""
    row = np.array([0, 100], dtype=np.uint8)[None, :, None].repeat(2, axis=0).repeat(3, axis=2)
    assert resized([row], 4, "legacy-tf")[0, 0, 0].tolist() == pytest.approx([0, 50 / 255, 100 / 255, 100 / 255])


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_picture_is_named(bad):
    with pytest.raises(ValueError, match=r"pictures\[1\]"):
        resized([noise(4, 4), bad], 8)


def test_an_unknown_way_is_one_line():
    with pytest.raises(ValueError, match="resize='nearest': one of clean, legacy-torch, legacy-tf"):
        resized([noise(4, 4)], 8, "nearest")
