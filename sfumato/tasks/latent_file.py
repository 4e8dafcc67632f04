"""The latent as a compressed picture: encoded, rounded to a grid, and its whole numbers coded by arithmetic.

A file is a header, the coded numbers and a checksum; only the model that wrote it can show it. Nothing but whole
numbers decides how bits are read, so that every machine reads the same. Knows no samplers, prompts or flags.
Letters: H W pixels, f the autoencoder's factor, C latent channels, h w latent size of the padded picture.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.families import Model
from sfumato.images import from_uint8
from sfumato.tasks.checks import Range, require_number
from sfumato.tasks.decoding import decode_pixels, weights_in
from sfumato.tasks.encoding import encode

MAGIC, VERSION = b"SfLt", 1
HEAD = struct.Struct("<4sB5sHHHBfB")  # magic, version, hash, W, H, C, f, step, length of the name that follows
CHECK = struct.Struct("<I")  # CRC-32 of all before it
MAX_SIDE, MAX_PIXELS = 65535, 170_000_000
DENSEST = 6000  # numbers that a byte can hold at most: the surest bit costs log2(65536 / 65472) = 1/710 bit
PRECISION = 16  # bits of a probability
UNARY = 12  # sizes up to this one have a bit for each step, the rest is Exp-Golomb
LEVELS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90)  # bounds of `_surroundings`
RATES = tuple(int(65536 / (count + 1.6)) for count in range(60))  # how far a probability moves at its count-th bit


@dataclass(frozen=True)
class Header:
    """What a file says of itself: picture size in pixels, latent channels, grid step, and the model that wrote it."""

    width: int
    height: int
    channels: int
    factor: int
    step: float
    model_name: str
    model_hash: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        return self.channels, -(-self.height // self.factor), -(-self.width // self.factor)


def step_of(quality: float) -> float:
    """The grid's step in deviations of the latents: 2 at quality 0, half as wide every 20, 1/16 at 100."""
    require_number("quality", quality, Range(0, 100))
    return float(np.float32(2.0 ** (1 - quality / 20)))


def compress(picture: np.ndarray, model: Model, quality: float = 50, refine: int = 0, tile: int | None = None) -> bytes:
    """A picture (H, W, 3) uint8 of any size -> the bytes of a file that `expand` shows again.

    It is padded by reflection to whole latent cells. `quality` in [0, 100] is the fineness of the grid; the
    autoencoder's own loss comes on top. `refine` steps of gradient descent through the decoder move the latents to
    where their rounded decode is nearest to the picture: slow (whole, in float32), for a
    likeness beyond the autoencoder's own; it costs bytes too, and changes no format.
    `tile` is the side of encoded tiles in pixels. ValueError names field and value.
    """
    step = step_of(quality)
    require_number("refine", refine, Range(0, 10_000, whole=True))
    padded = _padded(picture, model.family.autoencoder.factor)
    latents = _latents(padded, model, tile)
    if refine:
        latents = _refined(latents, padded, model, step, refine)
    height, width = picture.shape[:2]
    header = Header(
        width, height, latents.shape[0], model.family.autoencoder.factor, step, model.name[:255], model.hash
    )
    whole = np.round(latents.double().cpu().numpy() / step).astype(np.int64)
    body = _head_bytes(header) + _encode(whole)
    return body + CHECK.pack(zlib.crc32(body))


def expand(data: bytes, model: Model, any_model: bool = False, tile: int | None = None) -> np.ndarray:
    """The picture (H, W, 3) uint8 of a file's bytes. `tile` is the side of decoded tiles in pixels.

    ValueError where they are damaged or of another kind, and, unless `any_model`, where another model wrote them: it
    may show something like the picture if its autoencoder is the same.
    """
    header, coded = _read(data)
    family = model.family
    if header.model_hash != model.hash and not any_model:
        theirs, ours = f"{header.model_name} [{header.model_hash}]", f"{model.name} [{model.hash}]"
        raise ValueError(
            f"latent file: it was written by {theirs}, this is {ours}; any_model=True shows it all the same"
        )
    if (header.channels, header.factor) != (family.autoencoder.latent_channels, family.autoencoder.factor):
        found = f"{header.channels} channels at 1/{header.factor}"
        needed = f"{family.autoencoder.latent_channels} at 1/{family.autoencoder.factor}"
        raise ValueError(f"latent file: its latents are {found} size, {model.name} has {needed}")
    latents = torch.from_numpy((_decode(coded, header.shape) * header.step).astype(np.float32))
    pictures = decode_pixels(latents[None].to(model.device), 0.0, model, tile=tile)
    return pictures[0, : header.height, : header.width]


def read_header(data: bytes) -> Header:
    """What a file says of itself; ValueError where it is damaged or of another kind."""
    return _read(data)[0]


def _padded(picture: np.ndarray, factor: int) -> np.ndarray:
    """The picture with its right and lower edge reflected up to a multiple of `factor`."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or picture.size == 0:
        raise ValueError(f"picture: it is {picture.shape} {picture.dtype}, (H, W, 3) uint8 is needed")
    height, width = picture.shape[:2]
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(
            f"picture: it is {width} x {height} px, a side of {MAX_SIDE} and {MAX_PIXELS} px in all are most"
        )
    return np.pad(picture, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="symmetric")


@torch.inference_mode()
def _latents(padded: np.ndarray, model: Model, tile: int | None) -> Tensor:
    """Latents (C, h, w) float32 in diffusion's scale. ValueError where they are not finite."""
    return encode(torch.from_numpy(padded).permute(2, 0, 1)[None], model, tile)[0]


def _refined(latents: Tensor, padded: np.ndarray, model: Model, step: float, rounds: int) -> Tensor:
    """The latents (C, h, w) whose rounded decode is nearest to the picture, of those that descent comes by.

    Rounding passes gradients as if it were not there (Bengio et al. 2013). What is best so far is kept.
    """
    network, scale = model.autoencoder, model.family.latent_scale
    with torch.inference_mode(False), torch.enable_grad(), weights_in(torch.float32, network):
        goal = from_uint8(padded[None]).to(model.device)
        z = latents.clone()[None].requires_grad_()
        best, least = z.detach().clone(), math.inf
        optimiser = torch.optim.Adam([z], lr=0.25 * step)
        for round_ in range(rounds + 1):
            rounded = z + (torch.round(z / step) * step - z).detach()
            error = F.mse_loss(network.decode(rounded / scale).clamp(-1, 1), goal)
            if error.item() < least:
                best, least = z.detach().clone(), error.item()
            if round_ < rounds:
                optimiser.zero_grad()
                error.backward()
                optimiser.step()
    return best[0]


def _head_bytes(header: Header) -> bytes:
    name = header.model_name.encode()[:255]
    sizes = (header.width, header.height, header.channels, header.factor)
    return HEAD.pack(MAGIC, VERSION, bytes.fromhex(header.model_hash), *sizes, header.step, len(name)) + name


def _read(data: bytes) -> tuple[Header, bytes]:
    """A file's header and its coded numbers. ValueError where it is damaged or of another kind."""
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"latent file: it begins with {data[: len(MAGIC)]!r}, not as a latent file does")
    if len(data) < HEAD.size + CHECK.size:
        raise ValueError(f"latent file: it ends after {len(data)} bytes, within its header")
    _, version, digest, width, height, channels, factor, step, length = HEAD.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"latent file: version {version} is not known, {VERSION} is")
    body, check = data[: -CHECK.size], data[-CHECK.size :]
    if CHECK.unpack(check)[0] != zlib.crc32(body):
        raise ValueError("latent file: it is damaged or cut off (its checksum does not match)")
    name, coded = body[HEAD.size : HEAD.size + length], body[HEAD.size + length :]
    header = Header(width, height, channels, factor, step, name.decode(errors="replace"), digest.hex())
    sound = width and height and channels and factor and math.isfinite(step) and step > 0
    if not sound or width * height > MAX_PIXELS or math.prod(header.shape) > DENSEST * (len(coded) + 8):
        raise ValueError(f"latent file: {width} x {height} px of {channels} channels cannot be in {len(coded)} bytes")
    return header, coded


# Coding whole numbers: each is bits (zero? sign? larger?) whose probabilities are learnt from those before it.

Coder = Callable[[int, int], int]
"""(probability in 2^16 that the bit is 1, the bit, of any value where it is read) -> the bit."""


class _Odds:
    """Learnt probabilities by context: each starts where it is told to and moves less the more bits it has seen."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], list[int]] = {}

    def bit(self, code: Coder, context: tuple[int, ...], bit: int, start: int = 32768) -> int:
        entry = self.seen.setdefault(context, [start, 2])
        bit = code(entry[0], bit)
        goal = 65535 if bit else 0
        moved = entry[0] + ((goal - entry[0]) * RATES[entry[1]] >> 16)
        entry[0] = min(max(moved, 64), 65472)
        entry[1] = min(entry[1] + 1, len(RATES) - 1)
        return bit


def _walk(code: Coder, numbers: np.ndarray) -> np.ndarray:
    """Code whole numbers (C, h, w), cell by cell; returns them as they are, or where `code` reads as it read them."""
    channels, height, width = numbers.shape
    odds, typical = _Odds(), [16] * channels  # 16 times the running mean of sizes
    framed = np.pad(np.moveaxis(numbers, 0, -1), ((1, 0), (1, 1), (0, 0)))  # a row above, a column at either side
    rows: list[list[list[int]]] = framed.tolist()  # plain numbers: several times as fast as an array's
    for y in range(height):
        above, row = rows[y], rows[y + 1]
        for x in range(width):
            cell, left, up, corner, right = row[x + 1], row[x], above[x + 1], above[x], above[x + 2]
            for c in range(channels):
                near = (left[c], up[c], corner[c], right[c])
                size = _surroundings(near, typical[c], x > 0, y > 0)
                lean = (left[c] + up[c] > 0) - (left[c] + up[c] < 0)
                cell[c] = value = _number(code, odds, cell[c], size, lean, c)
                typical[c] += (16 * abs(value) - typical[c] + 4) >> 3
    return np.moveaxis(np.array(rows, dtype=np.int64)[1:, 1:-1], -1, 0)


def _surroundings(near: tuple[int, int, int, int], typical: int, has_left: bool, has_up: bool) -> int:
    """A class of how large a number is to be expected: left, above, both corners above, and its channel's mean."""
    left, up, corner, right = (abs(value) for value in near)
    total, weight = typical // 4, 4  # sixteenths of the expected size times the weights
    if has_left:
        total, weight = total + 8 * left, weight + 2
    if has_up:
        total, weight = total + 8 * up + 4 * (corner + right) // 2, weight + 3
    expected = 4 * total // weight
    return sum(expected >= bound for bound in LEVELS)


def _number(code: Coder, odds: _Odds, value: int, size: int, lean: int, channel: int) -> int:
    """Code one whole number in its context; returns it."""
    if not odds.bit(code, (0, size), int(value != 0), min(63000, 6000 * (size + 1))):
        return 0
    negative = odds.bit(code, (1, lean, channel), int(value < 0))
    rest, found = abs(value) - 1, 0
    while found < UNARY and odds.bit(code, (2, size, found), int(rest > found), min(60000, 5000 * (size + 1))):
        found += 1
    if found == UNARY:
        found += _golomb(code, odds, rest - UNARY)
    return -found - 1 if negative else found + 1


def _golomb(code: Coder, odds: _Odds, value: int) -> int:
    """Exp-Golomb: how many bits value + 1 has, then those after the first."""
    bits = (value + 1).bit_length() if value >= 0 else 1
    count = 1
    while odds.bit(code, (3, count), int(bits > count)):
        count += 1
        if count > 40:
            raise ValueError("latent file: it is damaged (a number is too large)")
    found = 1
    for place in reversed(range(count - 1)):
        found = 2 * found + code(32768, (value + 1) >> place & 1)
    return found - 1


class _Writer:
    """A binary arithmetic coder of 32 bits (Witten, Neal & Cleary 1987, without counts of pending bits: whole bytes
    go out where both ends of the interval agree on them)."""

    def __init__(self) -> None:
        self.low, self.high, self.out = 0, 0xFFFFFFFF, bytearray()

    def __call__(self, odds: int, bit: int) -> int:
        middle = self.low + ((self.high - self.low) * odds >> PRECISION)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.out.append(self.high >> 24)
            self.low, self.high = self.low << 8 & 0xFFFFFFFF, (self.high << 8 & 0xFFFFFFFF) | 0xFF
        return bit

    def finish(self) -> bytes:
        """The bytes, as few as tell the interval: those missing behind them are read as zeros."""
        for count in (1, 2, 3, 4):
            shift = 32 - 8 * count
            top = -(-self.low >> shift)  # the smallest number of so many bytes that is not below the interval
            if top << shift <= self.high:
                return bytes(self.out) + top.to_bytes(count, "big")
        raise AssertionError("four bytes tell any number")


class _Reader:
    """What reads a _Writer's bytes."""

    def __init__(self, data: bytes) -> None:
        self.low, self.high, self.data, self.place = 0, 0xFFFFFFFF, data, 4
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def __call__(self, odds: int, bit: int) -> int:
        middle = self.low + ((self.high - self.low) * odds >> PRECISION)
        found = int(self.code <= middle)
        if found:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            following = self.data[self.place] if self.place < len(self.data) else 0
            self.place += 1
            self.low, self.high = self.low << 8 & 0xFFFFFFFF, (self.high << 8 & 0xFFFFFFFF) | 0xFF
            self.code = (self.code << 8 & 0xFFFFFFFF) | following
        return found


def _encode(numbers: np.ndarray) -> bytes:
    """Whole numbers (C, h, w) as bytes; nothing but these and the shape is needed to have them back."""
    writer = _Writer()
    _walk(writer, numbers)
    return writer.finish()


def _decode(coded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Whole numbers (C, h, w) int64 of `_encode`'s bytes."""
    return _walk(_Reader(coded), np.zeros(shape, dtype=np.int64))
