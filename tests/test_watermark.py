"""Marks: the original scripts' is read by the public decoder and the other way round; the strong one is found again."""

from __future__ import annotations

import io
import zlib

import cv2
import numpy as np
import pytest
from imwatermark import WatermarkDecoder, WatermarkEncoder
from PIL import Image

from sfumato.evaluate.quality import psnr
from sfumato.safety import coding, dwtdct, strong

DATA = dwtdct.TEXT.encode()


def scene(seed: int, width: int = 512, height: int = 384) -> np.ndarray:
    """A picture of noise at many sizes, as photographs have, with edges and a bright sky."""
    random = np.random.default_rng(seed)
    whole = np.zeros((height, width, 3))
    for size in (4, 8, 16, 32, 64, 128):
        coarse = random.uniform(-255, 255, (size, size, 3)).astype(np.float32)
        whole += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / size**0.9
    whole = 120 + whole
    whole[: height // 3, width // 2 :] = (235, 240, 250)
    whole[height // 2 :, : width // 3] += 60
    return np.rint(whole).clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def theirs_written(pixels: np.ndarray, data: bytes) -> np.ndarray:
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", data)
    return encoder.encode(pixels[..., ::-1].copy(), "dwtDct")[..., ::-1]


def theirs_read(pixels: np.ndarray, length: int) -> bytes:
    return WatermarkDecoder("bytes", 8 * length).decode(pixels[..., ::-1].copy(), "dwtDct")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quality", [None, 90])
def test_the_public_decoder_reads_ours(seed, quality):
    marked = dwtdct.write(scene(seed), DATA)
    assert psnr(marked, scene(seed)) > 36
    seen = marked if quality is None else jpeg(marked, quality)
    assert theirs_read(seen, len(DATA)) == DATA
    assert dwtdct.read(seen, len(DATA)) == DATA


def differing(a: bytes, b: bytes) -> int:
    """How many bits differ."""
    return int(np.unpackbits(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_ours_reads_what_the_public_encoder_wrote(seed):
    """Softened, as its writer loses bits where U is flat and where a lowered value is the largest no more."""
    random = np.random.default_rng(seed)
    picture = (scene(seed).astype(int) // 2 + random.integers(0, 120, (384, 512, 1))).astype(np.uint8)
    picture = np.stack([picture[..., 0], picture[..., 1], random.integers(90, 160, (384, 512))], -1).astype(np.uint8)
    marked = theirs_written(picture, b"abcd")
    assert theirs_read(marked, 4) == b"abcd" == dwtdct.read(marked, 4)


def test_both_read_the_same_from_pictures_without_a_mark():
    for seed in range(3):
        ours, theirs = dwtdct.read(scene(seed), 17), theirs_read(scene(seed), 17)
        assert differing(ours, theirs) <= 9  # of 136: theirs rounds Y, then U, in fixed point, and ties are many here
        assert differing(ours, DATA) > 30


def test_a_jpeg_leaves_more_of_ours_than_of_theirs():
    """The reason to write in another way than that program does."""
    whole = scene(2)
    theirs = dwtdct.read(jpeg(theirs_written(whole, DATA), 90), len(DATA))
    assert differing(theirs, DATA) > 30
    assert differing(dwtdct.read(jpeg(dwtdct.write(whole, DATA), 75), len(DATA)), DATA) <= 3


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_pictures_too(level):
    """Where their own writer's bits are lost: a value that is lowered is no longer the largest, or has no room."""
    marked = dwtdct.write(np.full((256, 256, 3), level, np.uint8), DATA)
    assert theirs_read(marked, len(DATA)) == DATA == dwtdct.read(marked, len(DATA))


def test_edges_beyond_whole_blocks_stay():
    whole = scene(1, 303, 301)
    marked = dwtdct.write(whole, DATA)
    assert marked.shape == whole.shape and marked.dtype == np.uint8
    assert np.array_equal(marked[296:], whole[296:]) and np.array_equal(marked[:, 296:], whole[:, 296:])
    assert dwtdct.read(marked, len(DATA)) == DATA


@pytest.mark.parametrize(
    "pixels, data, words",
    [
        (np.zeros((255, 256, 3), np.uint8), DATA, "256 x 255 px; 256 x 256"),
        (np.zeros((256, 256), np.uint8), DATA, r"\(H, W, 3\) uint8 are needed"),
        (np.zeros((256, 256, 3), np.float32), DATA, "pixels=float32"),
        (np.zeros((256, 256, 3), np.uint8), b"", "0 bytes; 1 to 128"),
        (np.zeros((256, 256, 3), np.uint8), bytes(129), "129 bytes; 1 to 128"),
    ],
)
def test_what_cannot_be_marked_is_said(pixels, data, words):
    with pytest.raises(ValueError, match=words):
        dwtdct.write(pixels, data)


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def turned(pixels: np.ndarray, degrees: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC))


ATTACKS = {
    "none": lambda pixels: pixels,
    "JPEG 50": lambda pixels: jpeg(pixels, 50),
    "half": lambda pixels: resized(pixels, 0.5),
    "twice": lambda pixels: resized(pixels, 2),
    "cut": lambda pixels: pixels[13:-22, 31:-17],
    "1 degree": lambda pixels: turned(pixels, 1),
    "15 degrees": lambda pixels: turned(pixels, 15),
    "upside down": lambda pixels: turned(pixels, 180),
    "all": lambda pixels: jpeg(turned(resized(pixels, 0.8), 5)[10:, 5:], 75),
}


@pytest.fixture(scope="module")
def strongly_marked() -> np.ndarray:
    return strong.write(scene(5), DATA)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_strong_mark_survives(strongly_marked, name):
    assert strong.read(ATTACKS[name](strongly_marked), len(DATA)) == DATA


def test_the_strong_mark_is_hard_to_see(strongly_marked):
    assert 38 < psnr(strongly_marked, scene(5)) < 45
    white = np.full((320, 320, 3), 255, np.uint8)
    assert psnr(strong.write(white, DATA), white) > 42


def test_the_strong_mark_is_found_without_its_length():
    for data in (b"a", bytes(24), "Müller".encode()):
        marked = strong.write(scene(6, 300, 256), data)
        assert strong.find(marked) == data
        assert strong.read(marked, len(data)) == data and strong.read(marked, len(data) % 24 + 1) is None


def test_unmarked_pictures_and_noise_hold_no_strong_mark():
    random = np.random.default_rng(0)
    pictures = [scene(seed, 256, 256) for seed in range(4)]
    pictures += [random.integers(0, 256, (256, 256, 3)).astype(np.uint8) for _ in range(4)]
    pictures += [np.full((256, 256, 3), 255, np.uint8), dwtdct.write(scene(1, 256, 256), DATA)]
    assert [strong.find(picture) for picture in pictures] == [None] * len(pictures)


def test_the_check_passes_noise_as_seldom_as_its_bits_say():
    """One in 2**32 cannot be counted, one in 2**6 can: six bits of the check, over words that noise was read as."""
    soft = np.random.default_rng(1).standard_normal((4096, coding.coded_length(2)))
    bits = coding._likeliest(soft)
    assert coding.decode(soft, 2) == [None] * 4096
    words = np.packbits(bits[:, : 8 * 2 + 32], axis=1)
    passed = sum((zlib.crc32(word[:2].tobytes()) ^ int.from_bytes(word[2:].tobytes(), "big")) < 2**26 for word in words)
    assert 32 <= passed <= 100  # 64 of 4096 expected, deviation 8
    assert len({word.tobytes() for word in words}) > 4000
    # and it is asked seldom enough: turns x half turns x lengths
    assert strong.TRIES * 2 * strong.MAX_LENGTH / 2**32 < 1e-6


def test_the_code_mends_what_noise_breaks():
    coded = 2.0 * coding.encode(DATA) - 1
    assert len(coded) == coding.coded_length(len(DATA))
    noisy = coded + 0.8 * np.random.default_rng(2).standard_normal((20, len(coded)))
    assert (np.sign(noisy) != coded).mean() > 0.08
    assert coding.decode(noisy, len(DATA)) == [DATA] * 20
    assert coding.decode(-coded[None], len(DATA)) == [None]


def test_what_the_strong_mark_cannot_is_said():
    with pytest.raises(ValueError, match="192 px or more"):
        strong.write(np.zeros((190, 500, 3), np.uint8), DATA)
    with pytest.raises(ValueError, match="25 bytes; 1 to 24"):
        strong.write(scene(0), bytes(25))
    with pytest.raises(ValueError, match="length=0: 1 to 24"):
        strong.read(scene(0), 0)
