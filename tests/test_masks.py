"""Masks, sizes and pictures handed over: blurs against a convolution written out, boxes in bounds, exact keeping."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms

from sfumato.images import Picture, read_picture
from sfumato.images.fitting import FITS, fitted
from sfumato.images.given import picture_from
from sfumato.images.masks import blurred, box_of, feathered, filled, laid_on, shaped_like

RNG = np.random.default_rng(3)
SIGMAS = st.sampled_from([0.0, 0.3, 1.0, 2.5, 4.0, 9.0])
MASKS = arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)),
               elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))  # fmt: skip


def convolved(mask: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """A Gaussian of int(2.5 sigma + 0.5) pixels to each side, sum by sum; the edge is a mirror that is not doubled."""
    if sigma == 0:
        return mask.astype(np.float64)
    radius = int(2.5 * sigma + 0.5)
    weights = np.array([np.exp(-(step**2) / (2 * sigma**2)) for step in range(-radius, radius + 1)])
    weights /= weights.sum()
    lines = np.moveaxis(mask.astype(np.float64), axis, 0)
    long = np.pad(lines, [(radius, radius), (0, 0)], mode="reflect")
    found = sum(weight * long[step : step + len(lines)] for step, weight in enumerate(weights))
    return np.moveaxis(np.asarray(found), 0, axis)


# --- blurs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_x, sigma_y", [(0.0, 0.0), (0.5, 0.5), (4.0, 4.0), (2.0, 0.0), (0.0, 7.0), (20.0, 3.0)])
def test_the_blur_is_a_gaussian_of_a1111s_width(sigma_x: float, sigma_y: float) -> None:
    mask = (RNG.random((23, 31)) > 0.6).astype(np.float32)
    found = blurred(mask, sigma_x, sigma_y)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, convolved(convolved(mask, sigma_x, 1), sigma_y, 0), atol=2e-6)


@pytest.mark.parametrize("sigma, reach", [(0.1, 0), (0.2, 1), (1.0, 3), (4.0, 10), (10.0, 25)])
def test_how_far_a_blur_reaches(sigma: float, reach: int) -> None:
    mask = np.zeros((61, 61), np.float32)
    mask[30, 30] = 1
    rows, columns = np.nonzero(blurred(mask, sigma, 0))
    assert set(rows) == {30} and (columns.min(), columns.max()) == (30 - reach, 30 + reach)


@given(MASKS, SIGMAS, SIGMAS)
@settings(max_examples=150, deadline=None)
def test_a_feather_stays_inside_the_mask(mask: np.ndarray, sigma_x: float, sigma_y: float) -> None:
    found = feathered(mask, sigma_x, sigma_y)
    assert found.shape == mask.shape and found.dtype == np.float32
    assert (found <= mask).all() and (found >= 0).all() and (found[mask == 0] == 0).all()


def test_a_feather_is_whole_far_inside_and_rises_from_the_edge() -> None:
    mask = np.zeros((60, 60), np.float32)
    mask[10:50, 10:50] = 1
    found = feathered(mask, 3.0, 3.0)
    assert (found[18:42, 18:42] == 1).all()
    across = found[30, 9:20]
    assert across[0] == 0 and across[1] < 0.25 and (np.diff(across) >= 0).all()
    assert np.array_equal(feathered(mask, 0, 0), mask)


# --- boxes -------------------------------------------------------------------------------------------------------


@given(MASKS.filter(np.any), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_the_box_is_the_smallest_around_all_that_is_not_0(mask: np.ndarray, padding: int) -> None:
    left, top, right, bottom = box_of(mask)
    outside = mask.copy()
    outside[top:bottom, left:right] = 0
    assert not outside.any()
    inside = mask[top:bottom, left:right]
    assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    height, width = mask.shape
    assert box_of(mask, padding) == (max(0, left - padding), max(0, top - padding), min(width, right + padding),
                                     min(height, bottom + padding))  # fmt: skip


def test_a_box_around_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="mask: nothing in it is white"):
        box_of(np.zeros((4, 5), np.float32))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], int, int, tuple[int, int]]:
    high, wide = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    left, top = draw(st.integers(0, wide - 1)), draw(st.integers(0, high - 1))
    right, bottom = draw(st.integers(left + 1, wide)), draw(st.integers(top + 1, high))
    return (left, top, right, bottom), draw(st.integers(8, 128)), draw(st.integers(8, 128)), (high, wide)


@given(boxes())
@settings(max_examples=400, deadline=None)
def test_a_box_is_shaped_like_the_picture_and_stays_within(
    case: tuple[tuple[int, int, int, int], int, int, tuple[int, int]],
) -> None:
    box, width, height, within = case
    left, top, right, bottom = found = shaped_like(box, width, height, within)
    assert 0 <= left <= box[0] and 0 <= top <= box[1] and box[2] <= right <= within[1] and box[3] <= bottom <= within[0]
    wide, high = right - left, bottom - top
    was_wide, was_high = box[2] - box[0], box[3] - box[1]
    assert wide == was_wide or high == was_high, "only one side grows"
    if was_wide * height < was_high * width:
        assert wide == min(within[1], max(was_wide, round(high * width / height)))
        assert wide == within[1] or abs(wide - high * width / height) <= 0.5
    else:
        assert high == within[0] or abs(high - wide * height / width) <= 0.5
    if left > 0 and right < within[1]:
        assert abs((left + right) - (box[0] + box[2])) <= 1, "about the same middle"
    assert all(isinstance(side, int) for side in found)


# --- what lies under a mask, and over it -------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [(200, 30, 90), (0, 0, 0), (255, 255, 255), (1, 128, 254)])
@pytest.mark.parametrize("side", [8, 30, 90])
def test_flat_surroundings_flow_into_what_is_free(colour: tuple[int, int, int], side: int) -> None:
    pixels = np.full((100, 110, 3), colour, np.uint8)
    mask = np.zeros((100, 110), np.float32)
    mask[5 : 5 + side, 9 : 9 + side] = 1
    pixels[mask > 0] = RNG.integers(0, 256, (side * side, 3), dtype=np.uint8)
    before = pixels.copy()
    found = filled(pixels, mask)
    assert found.shape == pixels.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - colour).max() <= 6
    assert np.array_equal(found[mask == 0], before[mask == 0]), "what is kept is not touched"
    assert np.array_equal(pixels, before), "nor is the picture itself"


def test_colours_flow_from_where_they_are() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40], pixels[:, 40:] = (255, 0, 0), (0, 0, 255)
    mask = np.zeros((40, 80), np.float32)
    mask[10:30, 20:60] = 1
    found = filled(pixels, mask).astype(int)
    assert found[20, 22, 0] > found[20, 22, 2] + 100 and found[20, 57, 2] > found[20, 57, 0] + 100
    assert np.array_equal(filled(pixels, np.zeros_like(mask)), pixels)


@given(arrays(np.float32, (5, 6), elements=st.floats(0, 1, width=32)), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_one_picture_over_another(weight: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight[0], weight[1] = 0, 1
    ground, drawn = (rng.integers(0, 256, (5, 6, 3), dtype=np.uint8) for _ in range(2))
    found = laid_on(ground, drawn, weight)
    assert found.dtype == np.uint8
    assert np.array_equal(found[0], ground[0]) and np.array_equal(found[1], drawn[1])
    assert np.array_equal(laid_on(ground, ground, weight), ground)
    exact = ground + weight[..., None].astype(np.float64) * (drawn.astype(np.float64) - ground)
    assert np.abs(found - exact).max() <= 0.5 + 1e-3


# --- sizes -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(FITS[1:]))
@settings(max_examples=200, deadline=None)
def test_what_is_fitted_has_the_size_and_can_be_written_to(
    tall: int, wide: int, height: int, width: int, fit: str
) -> None:
    pixels = RNG.integers(0, 256, (tall, wide, 3), dtype=np.uint8)
    found = fitted(pixels, width, height, fit)
    mask = fitted((pixels[..., 0] > 99).astype(np.float32), width, height, fit, "bilinear")
    assert found.shape == (height, width, 3) and found.dtype == np.uint8
    assert mask.shape == (height, width) and mask.dtype == np.float32 and 0 <= mask.min() <= mask.max() <= 1
    assert found.flags.writeable and mask.flags.writeable
    flat = np.full((tall, wide, 3), 77, np.uint8)
    assert (fitted(flat, width, height, fit) == 77).all()


def test_fits_crop_the_middle_fill_with_the_edge_and_keep_every_pixel() -> None:
    pixels = RNG.integers(0, 256, (10, 20, 3), dtype=np.uint8)
    assert np.array_equal(fitted(pixels, 10, 10, "crop"), pixels[:, 5:15])
    around = fitted(pixels, 20, 16, "fill")
    assert np.array_equal(around[3:13], pixels)
    assert (around[:3] == pixels[0]).all() and (around[13:] == pixels[-1]).all()
    kept = fitted(pixels, 22, 13, "keep")
    assert np.array_equal(kept[:10, :20], pixels)
    assert np.array_equal(kept[10:, :20], pixels[:-4:-1]) and np.array_equal(kept[:10, 20:], pixels[:, :-3:-1])
    mask = fitted(np.ones((10, 20), np.float32), 22, 13, "keep")
    assert mask[:10, :20].all() and not mask[10:].any() and not mask[:, 20:].any()
    with pytest.raises(ValueError, match="resize='keep': 20 x 10 px do not fit into 16 x 12"):
        fitted(pixels, 16, 12, "keep")


def test_a_mirror_is_repeated_where_the_picture_is_smaller_than_what_lacks() -> None:
    pixels = RNG.integers(0, 256, (1, 3, 3), dtype=np.uint8)
    kept = fitted(pixels, 16, 8, "keep")
    assert (kept == kept[:1]).all()
    assert np.array_equal(kept[0], pixels[0][[0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1, 2, 2]])


# --- pictures handed over ----------------------------------------------------------------------------------------

WAVE = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (4, 1))
COLOURS = np.stack([WAVE, WAVE[:, ::-1], 255 - WAVE // 2], axis=2)


def in_every_mode() -> dict[str, Image.Image]:
    """The same picture as Pillow may have it, in every mode that a file of some kind can hold."""
    rgb, grey = Image.fromarray(COLOURS), Image.fromarray(WAVE)
    rgba = Image.merge("RGBA", (*rgb.split(), grey))
    wide = rgb.copy()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    found = {"RGB": rgb, "L": grey, "RGBA": rgba, "LA": rgba.convert("LA"), "1": grey.convert("1"),
             "P": rgb.quantize(16), "CMYK": rgb.convert("CMYK")}  # fmt: skip
    found["opaque RGBA"] = rgb.convert("RGBA")
    found["I;16"] = Image.fromarray(WAVE.astype(np.uint16) * 257)
    found["P, one see-through"] = rgb.quantize(16)
    found["P, one see-through"].info["transparency"] = 3
    found["turned"] = rgb.copy()
    found["turned"].getexif()[0x0112] = 6
    wide.info["icc_profile"] = profile.tobytes()
    return found | {"with a profile": wide}


@pytest.mark.parametrize("mode", in_every_mode())
def test_a_picture_handed_over_is_the_same_as_its_file(tmp_path: Path, mode: str) -> None:
    image = in_every_mode()[mode]
    path = tmp_path / ("a.tif" if image.mode == "CMYK" else "a.png")
    image.save(path, exif=image.getexif(), **({"transparency": 3} if "see-through" in mode else {}))
    from_file = read_picture(path)
    with Image.open(path) as opened:
        handed = picture_from(opened)
    assert np.array_equal(handed.pixels, from_file.pixels)
    assert (handed.alpha is None) == (from_file.alpha is None)
    assert handed.alpha is None or np.array_equal(handed.alpha, from_file.alpha)
    assert handed.sha256 == from_file.sha256


def test_other_colours_become_srgb_as_from_a_file(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS).convert("LAB")
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF")
    (tmp_path / "lab.tif").write_bytes(buffer.getvalue())
    with Image.open(tmp_path / "lab.tif") as opened:
        assert picture_from(opened).sha256 == read_picture(tmp_path / "lab.tif").sha256


def test_arrays_of_every_shape() -> None:
    assert np.array_equal(picture_from(COLOURS).pixels, COLOURS) and picture_from(COLOURS).alpha is None
    for grey in (WAVE, WAVE[..., None]):
        assert np.array_equal(picture_from(grey).pixels, np.repeat(WAVE[..., None], 3, axis=2))
    four = picture_from(np.dstack([COLOURS, WAVE]))
    assert np.array_equal(four.pixels, COLOURS) and np.array_equal(four.alpha, WAVE)
    assert np.array_equal(picture_from(COLOURS[::-1, ::2]).pixels, COLOURS[::-1, ::2]), "not in one piece"
    picture = Picture(COLOURS)
    assert picture_from(picture) is picture
    mine = COLOURS.copy()
    kept = picture_from(mine)
    mine[:] = 0
    assert np.array_equal(kept.pixels, COLOURS), "a caller may go on with the array"


@pytest.mark.parametrize("value, words", [
    (np.zeros((4, 5, 3), np.float32), r"mask: an array \(H, W, 3\) uint8 is needed, got \(4, 5, 3\) float32"),
    (np.zeros((4, 5, 2), np.uint8), r"mask: an array .* got \(4, 5, 2\) uint8"),
    (np.zeros((2, 4, 5, 3), np.uint8), r"mask: an array"),
    (np.zeros((0, 5, 3), np.uint8), r"mask: an array"),
    (7, "mask=7: a path, an image of Pillow or an array is needed"),
    (Image.fromarray(np.full((4, 5), 7.5, np.float32)), "mask: floats from 7.5 to 7.5; only 0 to 1"),
])  # fmt: skip
def test_what_is_no_picture_is_one_clear_line(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        picture_from(value, "mask")
    assert "\n" not in str(caught.value)
