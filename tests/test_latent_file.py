"""Latent files: what goes in comes out, on any size; damaged and foreign files; the coder itself; PSNR and SSIM."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.evaluate.quality import psnr, ssim
from sfumato.families import Model
from sfumato.images import from_uint8, to_uint8
from sfumato.tasks.decoding import decode
from sfumato.tasks.latent_file import CHECK, HEAD, _decode, _encode, compress, expand, read_header, step_of
from sfumato.tasks.previews import drawings
from sfumato.weights.checkpoint import load_model


@pytest.fixture(scope="module")
def box() -> Model:
    return load_model(Path(sfumato.__file__).parent / "box.safetensors")


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


def signed(data: bytes) -> bytes:
    """A file's body with a right checksum."""
    return data + CHECK.pack(zlib.crc32(data))


@pytest.mark.parametrize("height, width", [(16, 16), (1, 1), (17, 3), (5, 30), (2, 64)])
def test_any_size_comes_back_as_the_decode_of_the_rounded_latents(small: Model, height: int, width: int) -> None:
    picture = drawings(1, 64)[0][:height, :width]
    data = compress(picture, small, quality=70)
    shown = expand(data, small)
    assert shown.shape == picture.shape and shown.dtype == np.uint8
    step = step_of(70)
    padded = np.pad(picture, ((0, -height % 2), (0, -width % 2), (0, 0)), mode="symmetric")
    with torch.inference_mode():
        z = small.autoencoder.encode(from_uint8(padded[None])).mean * small.family.latent_scale
        expected = to_uint8(decode((z / step).round() * step, 0.0, small))[0, :height, :width]
    assert np.abs(shown.astype(int) - expected).max() <= 1
    header = read_header(data)
    assert (header.width, header.height, header.step) == (width, height, step)
    assert (header.model_name, header.model_hash) == (small.name, small.hash)


def test_quality_buys_likeness_with_bytes(box: Model) -> None:
    """Nearer to the autoencoder's own decode, and more bytes, with each step; the bytes are few."""
    picture = drawings(1, 64, seed=2)[0]
    with torch.inference_mode():
        z = box.autoencoder.encode(from_uint8(picture[None])).mean * box.family.latent_scale
    exact = to_uint8(decode(z, 0.0, box))[0]
    files = [compress(picture, box, quality) for quality in (0, 50, 100)]
    likeness = [psnr(expand(data, box), exact) for data in files]
    assert likeness == sorted(likeness) and likeness[0] > 12 and likeness[-1] > 34
    sizes = [len(data) for data in files]
    assert sizes == sorted(sizes) and sizes[0] < 250 and sizes[-1] < 900


def test_refining_comes_nearer_to_the_picture(box: Model) -> None:
    picture = drawings(1, 64, seed=3)[0]
    plain, refined = (compress(picture, box, 80, refine) for refine in (0, 5))
    assert psnr(expand(refined, box), picture) > psnr(expand(plain, box), picture) + 0.1
    assert compress(picture, box, 80) == plain  # the weights are as they were


def test_an_even_picture_is_tiny(small: Model) -> None:
    data = compress(np.full((128, 128, 3), 128, np.uint8), small, quality=0)
    assert expand(data, small).shape == (128, 128, 3)  # 16,384 numbers
    assert len(data) < 4_096


def test_tiles_may_be_asked_for(small: Model) -> None:
    picture = drawings(1, 32)[0]
    data = compress(picture, small, 80, tile=16)
    assert data != compress(picture, small, 80)
    assert expand(data, small, tile=16).shape == picture.shape


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_flipped_bit_is_found(small: Model, place: int) -> None:
    data = bytearray(compress(drawings(1, 16)[0], small))
    data[place % len(data)] ^= 0x10
    with pytest.raises(ValueError, match="^latent file: ") as found:
        expand(bytes(data), small)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("length", [0, 3, 4, 10, HEAD.size, HEAD.size + CHECK.size, -5, -1])
def test_a_cut_file_is_found(small: Model, length: int) -> None:
    data = compress(drawings(1, 16)[0], small)
    with pytest.raises(ValueError, match="^latent file: "):
        expand(data[:length], small)


def test_foreign_files_are_named(small: Model) -> None:
    body = compress(drawings(1, 16)[0], small)[: -CHECK.size]
    with pytest.raises(ValueError, match=r"begins with b'\\x89PNG'"):
        expand(b"\x89PNG\r\n\x1a\n" + bytes(40), small)
    with pytest.raises(ValueError, match="version 9 is not known"):
        expand(signed(body[:4] + b"\x09" + body[5:]), small)
    huge = struct.pack("<HH", 10_000, 10_000)
    with pytest.raises(ValueError, match="10000 x 10000 px of 4 channels cannot be in"):
        expand(signed(body[:10] + huge + body[14:]), small)
    with pytest.raises(ValueError, match="0 x 16 px"):
        expand(signed(body[:10] + struct.pack("<HH", 0, 16) + body[14:]), small)


def test_another_models_file_is_refused_by_both_names(small: Model, box: Model) -> None:
    other = replace(small, name="other", hasher=lambda: "0123456789")
    data = compress(drawings(1, 16)[0], small)
    with pytest.raises(ValueError, match=rf"written by tiny \[{small.hash}\], this is other \[0123456789\]"):
        expand(data, other)
    assert (expand(data, other, any_model=True) == expand(data, small)).all()
    with pytest.raises(ValueError, match=r"4 channels at 1/2 size, box has 4 at 1/8"):
        expand(data, box, any_model=True)


def test_what_cannot_be_compressed_is_said_in_a_line(small: Model) -> None:
    picture = drawings(1, 16)[0]
    for call, message in (
        (lambda: compress(picture, small, quality=101), "quality=101: a number from 0 to 100"),
        (lambda: compress(picture, small, refine=-1), "refine=-1"),
        (lambda: compress(picture.astype(float), small), r"\(16, 16, 3\) float64"),
        (lambda: compress(picture[..., 0], small), r"\(H, W, 3\) uint8 is needed"),
        (lambda: compress(picture[:0], small), r"\(0, 16, 3\)"),
        (lambda: compress(np.zeros((1, 70_000, 3), np.uint8), small), "70000 x 1 px"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(0, 24))
def test_the_coder_gives_back_any_numbers(channels: int, height: int, width: int, seed: int, bits: int) -> None:
    generator = np.random.default_rng(seed)
    numbers = generator.integers(-(2**bits), 2**bits + 1, (channels, height, width))
    numbers[generator.random(numbers.shape) < 0.3] = 0
    assert (_decode(_encode(numbers), numbers.shape) == numbers).all()


def test_the_coder_comes_near_the_entropy() -> None:
    """Independent numbers of one distribution: within a tenth of their entropy, which no coder can go below."""
    generator = np.random.default_rng(1)
    numbers = np.round(generator.laplace(0, 1.0, (4, 32, 32))).astype(np.int64)
    _, counts = np.unique(numbers, return_counts=True)
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum() * numbers.size / 8
    assert 0.98 * entropy < len(_encode(numbers)) < 1.1 * entropy
    assert len(_encode(numbers)) < 0.85 * len(zlib.compress(numbers.astype(np.int8).tobytes(), 9))


def test_the_coder_uses_likeness_of_neighbours() -> None:
    generator = np.random.default_rng(1)
    busy = np.zeros((2, 32, 32), np.int64)
    busy[:, 8:16, 8:16] = generator.integers(-6, 7, (2, 8, 8))
    scattered = generator.permutation(busy.flatten()).reshape(busy.shape)
    assert len(_encode(busy)) < 0.75 * len(_encode(scattered))


def test_psnr_by_hand() -> None:
    a = np.zeros((2, 2, 3), np.uint8)
    b = a.copy()
    b[0, 0] = 10
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / 25))
    assert psnr(a, a) == float("inf")


def test_ssim_is_wangs() -> None:
    """Against the definition, window by window."""
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (14, 13, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + generator.integers(-60, 61, a.shape), 0, 255).astype(np.uint8)
    places = np.arange(-5, 6)
    window = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[..., None]
    found = []
    for top in range(4):
        for left in range(3):
            x, y = (picture[top : top + 11, left : left + 11].astype(float) for picture in (a, b))
            mx, my = ((window * part).sum(axis=(0, 1)) for part in (x, y))
            vx, vy = (window * (x - mx) ** 2).sum(axis=(0, 1)), (window * (y - my) ** 2).sum(axis=(0, 1))
            cov = (window * (x - mx) * (y - my)).sum(axis=(0, 1))
            c1, c2 = 6.5025, 58.5225
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-9)
    assert ssim(a, a) == 1.0 and ssim(a, b) == pytest.approx(ssim(b, a))
    assert ssim(np.stack([a, a]), np.stack([a, b])) == pytest.approx((1 + np.mean(found)) / 2)


def test_pictures_that_cannot_be_compared() -> None:
    a = np.zeros((12, 12, 3), np.uint8)
    for call, message in (
        (lambda: psnr(a, a[:6]), r"b: it is \(6, 12, 3\)"),
        (lambda: psnr(a.astype(float), a), "a: it is .* float64"),
        (lambda: ssim(a[:6], a[:6]), "12 x 6 px, 11 px or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
