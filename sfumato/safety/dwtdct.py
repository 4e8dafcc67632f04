"""The original scripts' invisible mark, `dwtDct` of invisible-watermark 0.2.0: its decoder reads ours, ours reads its.

Bit k of the data is in every block of 4 x 4 values of U's Haar average band whose number, by rows, is k modulo the
length: the block's largest value but the first lies at 1/4 or 3/4 of a step of 36. In spite of the name that program
takes no cosine transform. It says nothing of whether there is a mark. Letters: H W pixels, N blocks.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

TEXT = "StableDiffusionV1"  # what the original scripts write
STEP = 36.0  # invisible-watermark's scale of U
BLOCK = 4
ROUNDS, MARGIN = 4, 4.0  # of the writer: looks at a JPEG, levels within a half step
SHARES = (0.7, 0.85, 1.0)  # of votes that are made right: the first with which all can be read
SMALLEST = 256 * 256  # px in all: that program refuses fewer
LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B: ITU-R BT.601, 2.5.1
TO_U = 0.492  # U = 0.492 (B - Y) + 128, OpenCV's RGB2YUV


def check_size(pixels: np.ndarray) -> None:
    """ValueError where pixels are not (H, W, 3) uint8, or fewer than 256 x 256."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels={pixels.dtype} {pixels.shape}: (H, W, 3) uint8 are needed")
    if pixels.shape[0] * pixels.shape[1] < SMALLEST:
        raise ValueError(
            f"watermark: a picture of {pixels.shape[1]} x {pixels.shape[0]} px; 256 x 256 or as many are needed"
        )


def write(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """pixels (H, W, 3) uint8 with the data in them; ValueError where there are fewer blocks (of 8 x 8 px) than bits.

    That program moves one value of each block, which no JPEG of usual tables leaves there. This writer moves whole
    blocks, as few and as little as give each bit most of its votes, before and after a JPEG of quality 90; its reader
    cannot tell. In a picture of little but full and empty colours, or of noise, some bits may be lost all the same.
    """
    check_size(pixels)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    blocks, shape = _blocks(_u(pixels.astype(float)))
    if not 1 <= len(bits) <= len(blocks):
        raise ValueError(f"data: {len(data)} bytes; 1 to {len(blocks) // 8} go into {len(blocks)} blocks of 8 x 8 px")
    marked = pixels
    for share in SHARES:
        marked = _written(pixels, bits, shape, share)
        if read(marked, len(data)) == data == read(_jpeg(marked), len(data)):
            break
    return marked


def _written(pixels: np.ndarray, bits: np.ndarray, shape: tuple[int, int], share: float) -> np.ndarray:
    """Pixels with that share of each bit's votes made right; shape: blocks below and beside one another."""
    place = np.arange(shape[0] * shape[1]) % len(bits)
    wanted = bits[place]
    shift, chosen, marked = np.zeros(len(place)), np.ones(len(place), bool), pixels
    for turn in range(ROUNDS):
        moves = [_missing(_tops(seen), wanted) for seen in (marked, _jpeg(marked))]
        if turn == 0:
            chosen = _cheapest(np.abs(moves[0]) + np.abs(moves[1]), place, share)
        shift += np.where(chosen, (moves[0] + moves[1]) / 2, 0)
        change = shift.reshape(shape).repeat(2 * BLOCK, axis=0).repeat(2 * BLOCK, axis=1) / 2
        marked = _moved(pixels, change)
    return marked


def read(pixels: np.ndarray, length: int) -> bytes:
    """The `length` bytes that are written in pixels (H, W, 3) uint8, or any bytes where none are."""
    check_size(pixels)
    tops = _tops(pixels)
    if not 1 <= length * 8 <= len(tops):
        raise ValueError(f"length={length}: 1 to {len(tops) // 8} bytes go into {len(tops)} blocks of 8 x 8 px")
    votes = tops % STEP > STEP / 2
    place = np.arange(len(tops)) % (8 * length)
    share = np.bincount(place, votes) / np.bincount(place)
    return np.packbits(share * 255 > 127).tobytes()  # that program's threshold


def _u(rgb: np.ndarray) -> np.ndarray:
    """rgb (H, W, 3) -> U (H, W), 0 to 255."""
    return TO_U * (rgb[..., 2] - rgb @ LUMA) + 128


def _blocks(u: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """U (H, W) -> the Haar average band's blocks (N, 16), and how many there are below and beside one another."""
    height, width = (size // 4 * 4 for size in u.shape)
    u = u[:height, :width]
    average = (u[::2, ::2] + u[::2, 1::2] + u[1::2, ::2] + u[1::2, 1::2]) / 2  # Haar 1910, orthonormal
    rows, columns = average.shape[0] // BLOCK, average.shape[1] // BLOCK
    whole = average[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return whole.swapaxes(1, 2).reshape(-1, BLOCK * BLOCK), (rows, columns)


def _tops(pixels: np.ndarray) -> np.ndarray:
    """The value (N,) that tells the bit of each block, from U in 8 bits as that program's reader has it."""
    blocks, _ = _blocks(np.rint(_u(pixels.astype(float))).clip(0, 255))
    return blocks[:, 1:].max(axis=1)


def _missing(tops: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The least move (N,) of values that takes them into the half steps of their bits, MARGIN from its ends."""
    away = (tops / STEP - 0.25 - 0.5 * bits + 0.5) % 1 - 0.5  # from the middle of the half step, in steps
    room = 0.25 - MARGIN / STEP
    return (away.clip(-room, room) - away) * STEP


def _cheapest(costs: np.ndarray, place: np.ndarray, share: float) -> np.ndarray:
    """Which blocks (N,) to move: that share of each bit's votes that cost least."""
    order = np.lexsort((costs, place))
    first = np.searchsorted(place[order], place[order])  # where its bit's blocks begin
    rank = np.empty(len(costs))
    rank[order] = np.arange(len(costs)) - first
    return rank < share * np.bincount(place)[place]


def _jpeg(pixels: np.ndarray) -> np.ndarray:
    """Pixels as a JPEG of quality 90 shows them."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    return np.asarray(Image.open(file).convert("RGB"))


def _moved(pixels: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Pixels whose U is changed by `change` (h, w) in their upper left; Y and V stay unless blue has no room left."""
    height, width = change.shape
    rgb = pixels[:height, :width].astype(float)
    wanted = _u(rgb) + change
    blue = 1 / TO_U
    rgb += change[..., None] * np.array([0.0, -blue * LUMA[2] / LUMA[1], blue])
    rgb = rgb.clip(0, 255)
    rest = (wanted - _u(rgb)) * (change != 0)
    rgb[..., :2] -= (rest / (TO_U * (LUMA[0] + LUMA[1])))[..., None]
    out = pixels.copy()
    out[:height, :width] = np.rint(rgb).clip(0, 255)
    return out
