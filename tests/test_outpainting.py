"""Outpainting: noise with a picture's spectrum and histogram, canvases, passes, seams, and membranes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

from sfumato.images.outpainting import (
    distance,
    extended,
    passes,
    seam,
    shaped_noise,
    with_histogram,
    without_step,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def landscape(height=96, width=96, seed=0):
    """(H, W, 3) float in [0, 1]: a random picture with amplitudes of 1 / f, as photographs have (Field 1987)."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.fft.rfft2(rng(seed).normal(size=(height, width, 3)), axes=(0, 1))
    shaped = np.fft.irfft2(
        spectrum / np.maximum(np.hypot(y, x), 1 / max(height, width))[..., None], s=(height, width), axes=(0, 1)
    )
    shaped = shaped @ np.array([[1, 0.8, 0.6], [0.2, 0.4, 0.6], [0.1, 0, 0.3]])
    return np.clip(0.5 + shaped / (5 * shaped.std()), 0, 1)


def beside(picture):
    """A canvas twice as wide with the picture at its left, and the mask of the right half."""
    height, width = picture.shape[:2]
    canvas = np.zeros((height, 2 * width, 3))
    canvas[:, :width] = picture
    mask = np.zeros((height, 2 * width))
    mask[:, width:] = 1
    return canvas, mask


def photograph(height=120, width=140, seed=1):
    """(H, W, 3) uint8."""
    return (ndimage.gaussian_filter(landscape(height, width, seed), (1, 1, 0)) * 255).round().astype(np.uint8)


# --- noise


def log_spectrum(picture):
    """The radially averaged log power of a square picture, under a Hann window."""
    side = len(picture)
    window = np.hanning(side)[:, None, None] * np.hanning(side)[None, :, None]
    power = (np.abs(np.fft.fft2((picture - picture.mean(axis=(0, 1))) * window, axes=(0, 1))) ** 2).mean(axis=2)
    ring = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]) * side
    ring = ring.astype(int).ravel()
    return np.log(np.bincount(ring, power.ravel()) / np.bincount(ring))[1 : side // 2]


@pytest.mark.parametrize("seed", range(3))
def test_spectrum_is_that_of_the_picture(seed):
    picture = landscape(seed=seed)
    noise = shaped_noise(*beside(picture), rng=rng(seed))[:, 96:]
    likeness = np.corrcoef(log_spectrum(picture), log_spectrum(noise))[0, 1]
    white = np.corrcoef(log_spectrum(picture), log_spectrum(rng(seed).random((96, 96, 3))))[0, 1]
    assert likeness > 0.9 > white
    assert not np.allclose(noise, picture, atol=0.1)


@pytest.mark.parametrize("falloff", [0.0, 1.0, 3.0])
def test_histogram_is_that_of_the_picture(falloff):
    picture = landscape() ** [0.5, 1, 3]
    noise = shaped_noise(*beside(picture), falloff, 0.5, rng=rng())[:, 96:]
    tenths = np.arange(10, 100, 10)
    for c in range(3):
        off = np.percentile(noise[..., c], tenths) - np.percentile(picture[..., c], tenths)
        assert np.abs(off).max() < 2 / 255


def test_lower_falloff_has_more_detail():
    canvas, mask = beside(landscape())
    detail = [
        np.abs(np.diff(shaped_noise(canvas, mask, falloff, rng=rng())[:, 96:], axis=1)).mean()
        for falloff in (0.0, 0.5, 1.0, 2.0)
    ]
    assert detail == sorted(detail, reverse=True) and detail[0] > 2 * detail[-1]


def test_colour_variation():
    grey = landscape()[..., :1].repeat(3, axis=2)
    canvas, mask = beside(grey)
    spread = [
        shaped_noise(canvas, mask, 1.0, variation, rng=rng())[:, 96:].std(axis=2).mean() for variation in (0, 0.05, 1)
    ]
    assert spread[0] < 1e-9 < spread[1] < spread[2] / 3


def test_seeds():
    canvas, mask = beside(landscape())
    one, again, other = (shaped_noise(canvas, mask, rng=rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert np.abs(one - other)[:, 96:].mean() > 0.05


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_known_part_is_untouched_and_the_unknown_part_unread(kind):
    canvas, mask = (array.astype(kind) for array in beside(landscape()))
    noise = shaped_noise(canvas, mask, rng=rng())
    assert noise.dtype == kind and np.array_equal(noise[:, :96], canvas[:, :96])
    assert noise.min() >= 0 and noise.max() <= 1
    canvas[:, 96:] = 0.7
    assert np.array_equal(shaped_noise(canvas, mask, rng=rng()), noise)


def test_soft_mask_mixes():
    canvas, mask = beside(landscape())
    canvas[:, 96:] = canvas[:, :96]
    mask[:, 96:] = 0.25
    full = shaped_noise(canvas, (mask > 0).astype(float), rng=rng())
    soft = shaped_noise(canvas, mask, rng=rng())
    moved = [np.abs(noise - canvas)[:, 96:].mean() for noise in (soft, full)]
    assert 0.15 * moved[1] < moved[0] < 0.35 * moved[1]


def test_as_automatic1111_draws_it():
    """Levels of 0 to 252 that the script "Outpainting mk2" gives, with its default_rng(0), at rows 0, 5, 10, 15."""
    y, x = np.mgrid[:16, :16]
    picture = np.stack([(y * y + 3 * x) % 253, (x * x * 7 + y) % 253, (x * y * 5) % 253], axis=-1) / 252
    noise = shaped_noise(*beside(picture), 1.5, 0.3, rng=rng())
    assert noise[::5, 20] * 252 == pytest.approx(np.array(MK2), abs=1e-6)


MK2 = [[181, 31, 165.5], [8.5, 7.75, 93], [131.5, 13, 28.5], [93, 17, 142.5]]


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_flat_pictures_stay_flat(level):
    canvas, mask = beside(np.full((32, 32, 3), level))
    for falloff in (0.0, 0.5, 1.0):
        assert np.allclose(shaped_noise(canvas, mask, falloff, rng=rng())[:, 32:], level)


def test_what_noise_refuses():
    canvas, mask = beside(landscape(16, 16))
    for arguments, word in [
        ((canvas, mask, 4.1), "falloff=4.1"),
        ((canvas, mask, -1), "falloff=-1"),
        ((canvas, mask, 1, 1.5), "colour_variation=1.5"),
        ((canvas, mask[1:]), "mask="),
        ((canvas[..., 0], mask), "picture="),
        (((canvas * 255).astype(np.uint8), mask), "uint8"),
        ((canvas, np.ones_like(mask)), "known"),
    ]:
        with pytest.raises(ValueError, match=word):
            shaped_noise(*arguments, rng=rng())


def test_histogram_keeps_the_order():
    values, like = rng(0).normal(size=(500, 2)), rng(1).random((300, 2)) ** 2
    matched = with_histogram(values, like)
    for c in range(2):
        assert (np.diff(matched[np.argsort(values[:, c]), c]) >= 0).all()
        assert np.abs(np.sort(matched[:, c])[::50] - np.quantile(like[:, c], np.arange(0, 1, 0.1))).max() < 0.02
    same = with_histogram(like, like)
    assert np.allclose(same, like)


# --- canvases


@pytest.mark.parametrize("fill", ["noise", "edge", "mirror"])
@pytest.mark.parametrize("blur", [0, 8, 24.5])
@pytest.mark.parametrize("sides", [(16, 0, 0, 0), (0, 24, 8, 0), (10, 20, 30, 40)])
def test_canvas(fill, blur, sides):
    picture = photograph(60, 50)
    left, right, up, down = sides
    canvas, mask = extended(picture, *sides, blur=blur, fill=fill, rng=rng())
    assert canvas.shape == (60 + up + down, 50 + left + right, 3) and canvas.dtype == np.uint8
    assert mask.shape == canvas.shape[:2] and mask.dtype == np.float32
    old = np.zeros(mask.shape, bool)
    old[up : up + 60, left : left + 50] = True
    assert np.array_equal(mask == 0, old)
    assert np.array_equal(canvas[old].reshape(picture.shape), picture)
    away = distance((60, 50), *sides)
    assert np.array_equal(mask == 1, away >= blur + 1)
    assert np.array_equal(canvas, extended(picture, *sides, blur=blur, fill=fill, rng=rng())[0])


def test_distance():
    away = distance((4, 5), 3, 0, 0, 4)
    assert away.shape == (8, 8) and (away[:4, 3:] == 0).all()
    assert away[0].tolist() == [3, 2, 1, 0, 0, 0, 0, 0]
    assert away[7, 0] == 5 and away[7, 3] == 4


@pytest.mark.parametrize("fill", ["noise", "edge", "mirror"])
def test_nothing_jumps_where_the_mask_rises(fill):
    picture = photograph()
    canvas, _ = extended(picture, 32, 32, 32, 32, blur=16, fill=fill, rng=rng())
    box = (32, 32, 32 + 140, 32 + 120)
    assert seam(canvas, box) < 1.3
    if fill == "noise":
        hard, _ = extended(picture, 32, 32, 32, 32, fill=fill, rng=rng())
        assert seam(hard, box) > 2


def test_mirror_and_edge():
    picture = photograph(40, 30)
    canvas, _ = extended(picture, 0, 30, 0, 0, fill="mirror", rng=rng())
    assert np.array_equal(canvas[:, 30:], picture[:, ::-1])
    canvas, _ = extended(picture, 0, 100, 0, 0, fill="edge", rng=rng())
    assert np.abs(canvas[:, 30].astype(int) - picture[:, 29]).mean() < 12
    assert canvas[:, 129].std(axis=0).mean() < 0.5 * picture[:, 29].std(axis=0).mean()  # streaks fade


def test_tiny_pictures():
    for fill in ("noise", "edge", "mirror"):
        canvas, _ = extended(np.full((1, 1, 3), 77, np.uint8), 9, 0, 0, 5, fill=fill, rng=rng())
        assert canvas.shape == (6, 10, 3) and (canvas == 77).all()


def test_what_canvases_refuse():
    picture = photograph(20, 20)
    for sides, options, word in [
        ((0, 0, 0, 0), {}, "all 0"),
        ((0, -8, 0, 0), {}, "right=-8"),
        ((8, 0, 0, 0), {"fill": "fog"}, "fill='fog': one of noise, edge, mirror"),
        ((8, 0, 0, 0), {"blur": -1.0}, "blur=-1"),
        ((8, 0, 0, 0), {"blur": math.nan}, "blur=nan"),
        ((8, 0, 0, 0), {"falloff": 5.0}, "falloff=5"),
    ]:
        with pytest.raises(ValueError, match=word):
            extended(picture, *sides, **options, rng=rng())
    with pytest.raises(ValueError, match="uint8 is needed"):
        extended(picture / 255, 8, rng=rng())


# --- passes


@settings(deadline=None, max_examples=200)
@given(
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    sides=st.tuples(*[st.integers(0, 3000)] * 4).filter(any),
    limit=st.integers(1, 512),
)
def test_passes_sum_to_what_was_wanted(size, sides, limit):
    found = passes(size, *sides, limit)
    assert tuple(map(sum, zip(*found, strict=True))) == sides
    height, width = size
    for left, right, up, down in found:
        assert min(left, right, up, down) >= 0 and 0 < max(left, right, up, down) <= limit
        assert max(left, right) <= width and max(up, down) <= height
        width, height = width + left + right, height + up + down
    assert len(found) <= math.ceil(max(sides) / min(limit, *size)) + 1


def test_passes_are_even_and_keep_to_eights():
    assert passes((512, 512), 128, 0, 0, 0, 256) == [(128, 0, 0, 0)]
    assert passes((512, 512), 512, 0, 100, 0, 256) == [(256, 0, 56, 0), (256, 0, 44, 0)]
    assert passes((512, 512), 264, 0, 0, 0, 256) == [(136, 0, 0, 0), (128, 0, 0, 0)]
    assert passes((64, 64), 0, 256, 0, 0, 256) == [(0, 64, 0, 0), (0, 96, 0, 0), (0, 96, 0, 0)]
    for size, sides, limit, word in [
        ((0, 5), (1, 0, 0, 0), 8, "size=0x5"),
        ((5, 5), (0, 0, 0, 0), 8, "all 0"),
        ((5, 5), (0, 0, -1, 0), 8, "up=-1"),
        ((5, 5), (1, 0, 0, 0), 0, "limit=0"),
    ]:
        with pytest.raises(ValueError, match=word):
            passes(size, *sides, limit)


# --- seams


BOX = (40, 30, 100, 90)


def with_step(picture, step):
    stepped = picture.astype(int) + step
    stepped[30:90, 40:100] = picture[30:90, 40:100]
    return stepped.clip(0, 255).astype(np.uint8)


def test_seam_of_a_smooth_picture_is_one():
    y, x = np.mgrid[:120, :140]
    ramp = np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)
    assert seam(ramp, BOX) == pytest.approx(1, abs=0.1)
    assert seam(np.full_like(ramp, 9), BOX) == 1
    for seed in range(5):
        assert seam(photograph(seed=seed), BOX) == pytest.approx(1, abs=0.25)


def test_seam_of_a_step():
    numbers = [seam(with_step(photograph(), step), BOX) for step in (0, 4, 12, 40)]
    assert numbers == sorted(numbers) and numbers[2] > 1.5 and numbers[3] > 2
    smooth = np.full((120, 140, 3), 100, np.uint8)
    assert seam(with_step(smooth, 2), BOX) > 2


@pytest.mark.parametrize(
    ("side", "box"),
    [("left", (40, 0, 140, 120)), ("right", (0, 0, 100, 120)), ("up", (0, 30, 140, 120)), ("down", (0, 0, 140, 90))],
)
def test_seam_of_each_side(side, box):
    picture = photograph()
    assert seam(picture, box) == pytest.approx(1, abs=0.35)
    stepped = picture.astype(int) + 40
    left, top, right, bottom = box
    stepped[top:bottom, left:right] = picture[top:bottom, left:right]
    assert seam(stepped.clip(0, 255).astype(np.uint8), box) > 2


def test_seam_needs_a_side_inside():
    for box in ((0, 0, 140, 120), (1, 1, 140, 120), (5, 5, 5, 9), (-1, 0, 9, 9), (0, 0, 141, 9)):
        with pytest.raises(ValueError, match="box="):
            seam(photograph(), box)


# --- membranes


MASK = np.ones((120, 140), np.float32)
MASK[30:90, 40:100] = 0


def test_a_constant_step_is_removed_entirely():
    picture = photograph() // 2 + 60
    drawn = (picture + np.array([13, -21, 40])).astype(np.uint8)
    assert np.array_equal(without_step(picture, drawn, MASK), picture)


def test_known_part_is_old_and_the_seam_is_gone():
    picture = photograph()
    y = np.linspace(0, 3, 120)[:, None, None]
    drawn = np.clip(0.9 * picture + 15 + 12 * np.sin(y) + rng().normal(0, 1, picture.shape), 0, 255).astype(np.uint8)
    pasted = np.where(MASK[..., None] > 0, drawn, picture)
    result = without_step(picture, drawn, MASK)
    assert np.array_equal(result[MASK == 0], picture[MASK == 0])
    assert seam(pasted, BOX) > 1.5 and abs(seam(result, BOX) - seam(picture, BOX)) < 0.15
    assert np.abs(result.astype(int) - picture).mean() < 0.6 * np.abs(pasted.astype(int) - picture).mean()


@pytest.mark.parametrize("reach", [5.0, 15.0])
def test_reach(reach):
    """Along a straight border the correction is exp(-d / reach), in pixels."""
    old, drawn, mask = np.full((40, 200, 3), 200, np.uint8), np.full((40, 200, 3), 50, np.uint8), np.zeros((40, 200))
    mask[:, 20:] = 1
    moved = without_step(old, drawn, mask, reach).astype(float) - drawn
    d = np.arange(1, 181)
    assert np.abs(moved[:, 20:, 1] - 150 * np.exp(-d / reach)).max() < 1.5
    assert (moved[:, -20:] == 0).all()


def direct(step, unknown, screen):
    """The same equations by sparse elimination."""
    height, width = unknown.shape
    index = np.arange(height * width).reshape(height, width)
    pairs = [(index[:, 1:], index[:, :-1]), (index[1:], index[:-1])]
    one = np.concatenate([a.ravel() for a, _ in pairs])
    two = np.concatenate([b.ravel() for _, b in pairs])
    links = sparse.coo_matrix((np.ones(len(one)), (one, two)), (height * width,) * 2).tocsr()
    links = links + links.T
    matrix = sparse.diags(np.asarray(links.sum(axis=1)).ravel() + screen) - links
    free = unknown.ravel()
    solved = step.reshape(-1, 3).astype(float)
    solved[free] = spsolve(matrix.tocsr()[free][:, free].tocsc(), -(matrix.tocsr()[free][:, ~free] @ solved[~free]))
    return solved.reshape(step.shape)


@pytest.mark.parametrize("reach", [math.inf, 20.0])
@pytest.mark.parametrize("shape", ["right", "frame", "blobs"])
def test_membrane_solves_the_equation(shape, reach):
    unknown = np.zeros((101, 130), bool)
    if shape == "right":
        unknown[:, 50:] = True
    elif shape == "frame":
        unknown[:] = True
        unknown[31:70, 40:100] = False
    else:
        unknown = ndimage.gaussian_filter(rng(3).normal(size=unknown.shape), 8) > 0
    step = ndimage.gaussian_filter(rng().normal(size=(*unknown.shape, 3)), (10, 10, 0))
    step = np.rint(step / np.abs(step).max() * 60)
    old, drawn = (128 + step).astype(np.uint8), np.full((*unknown.shape, 3), 128, np.uint8)
    result = without_step(old, drawn, unknown.astype(np.float32), reach)
    off = np.abs(result - 128.0 - direct(step, unknown, 1 / reach**2))[unknown]
    assert off.max() < 2 and off.mean() < 0.5  # a quarter of it is rounding


def test_nothing_and_everything_unknown():
    old, drawn = photograph(seed=1), photograph(seed=2)
    assert np.array_equal(without_step(old, drawn, np.zeros_like(MASK)), old)
    assert np.array_equal(without_step(old, drawn, np.ones_like(MASK)), drawn)


def test_what_membranes_refuse():
    picture = photograph()
    with pytest.raises(ValueError, match="reach=0"):
        without_step(picture, picture, MASK, 0)
    with pytest.raises(ValueError, match="mask="):
        without_step(picture, picture, MASK[1:])
    with pytest.raises(ValueError, match="picture="):
        without_step(picture, picture / 255, MASK)
