"""A mark that survives other sizes, turns, cuts and JPEG: waves all over the picture, one pattern of TILE px.

Some waves are a template that tells how the picture was turned (see `finding`); the others carry the bits, spread over
all of them (Cox et al. 1997), coded, and louder where the picture itself says the contrary (Malvar & Florencio 2003).
Read without the original (blind).
Letters: H W pixels, K waves, L bytes, J places of bits: two of each wave.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

from sfumato.safety import coding
from sfumato.safety.dwtdct import LUMA, check_size
from sfumato.safety.finding import levelled, likely, placed, sharpened, waves

TILE = 128  # px
LOWEST, HIGHEST = 7.5, 28.0  # waves in a tile: coarser is drowned by pictures, finer is lost at half the size
GUIDES, GUIDE_SHARE = 24, 0.3  # waves of the template, and their share of the mark's power
MAX_LENGTH = 24  # bytes
SHORTEST_SIDE = 192  # px to write on
LARGEST = 2048  # px of a side that are looked at
LOUDNESS = 3.0  # levels, root mean square: 38.6 dB
FLAT, BUSY = 2.2, 6.0  # levels where there is nothing, and at most
INFORMED, AMPLITUDES = 0.5, (0.3, 2.5)  # how much of what the picture says is countered, and the bounds
TRIES = (
    4  # turns and sizes that are tried; with MAX_LENGTH and two half turns, 192 words: 4.5e-8 that one of noise fits
)
KEY = b"sfumato strong mark 1"


def write(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """pixels (H, W, 3) uint8 with `data` in them, 38.5 dB or nearer. ValueError where there is no room for it."""
    check_size(pixels)
    if min(pixels.shape[:2]) < SHORTEST_SIDE:
        raise ValueError(f"watermark: the strong one needs {SHORTEST_SIDE} px or more on either side")
    if not 1 <= len(data) <= MAX_LENGTH:
        raise ValueError(f"data: {len(data)} bytes; 1 to {MAX_LENGTH} are allowed")
    once = _laid_over(pixels, _tile(data, 1.0))
    before, after = (_heard(each) for each in (pixels, once))
    wanted = _places(data, len(before))
    mark = ((after - before) * wanted).mean()  # what the mark adds to each place of a bit
    return _laid_over(pixels, _tile(data, (1 - INFORMED * before * wanted / mark).clip(*AMPLITUDES)))


def _laid_over(pixels: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """Pixels with the pattern (TILE, TILE) all over them, louder where they are busy."""
    height, width = pixels.shape[:2]
    mark = np.tile(tile, (-(-height // TILE), -(-width // TILE)))[:height, :width]
    luma = pixels @ LUMA
    busy = np.sqrt(gaussian_filter((luma - gaussian_filter(luma, 3)) ** 2, 6))
    mark = mark * (FLAT + 0.3 * busy).clip(FLAT, BUSY)
    mark *= min(1.0, LOUDNESS / np.sqrt((mark**2).mean()))
    return np.rint(pixels + mark[..., None]).clip(0, 255).astype(np.uint8)


def _heard(pixels: np.ndarray) -> np.ndarray:
    """What each place of a bit (J,) is in a picture as it is written on, unturned."""
    carriers = _waves()[2] / TILE
    middle = (np.array(pixels.shape[1::-1]) - 1) / 2
    found = waves(levelled(pixels @ LUMA), carriers) * np.exp(-2j * np.pi * carriers @ middle)
    return np.concatenate([found.real, -found.imag])


def read(pixels: np.ndarray, length: int) -> bytes | None:
    """The `length` bytes that are written in pixels (H, W, 3) uint8, or None where none are."""
    return _read(pixels, range(length, length + 1))


def find(pixels: np.ndarray) -> bytes | None:
    """The bytes, however many, that are written in pixels (H, W, 3) uint8, or None."""
    return _read(pixels, range(1, MAX_LENGTH + 1))


def _read(pixels: np.ndarray, lengths: range) -> bytes | None:
    if not 1 <= lengths[0] <= lengths[-1] <= MAX_LENGTH:
        raise ValueError(f"length={lengths[0]}: 1 to {MAX_LENGTH} are allowed")
    height, width = pixels.shape[:2]
    top, left = max(0, height - LARGEST) // 2, max(0, width - LARGEST) // 2
    level = levelled(pixels[top : top + LARGEST, left : left + LARGEST] @ LUMA)
    guides, phases, carriers = _waves()
    for guess in likely(level, guides / TILE, TRIES):
        place = sharpened(level, guides / TILE, guess)
        found, carried = waves(level, guides / TILE @ place.T), waves(level, carriers / TILE @ place.T)
        soft = []
        for heard, bits in ((found, carried), (found.conj(), carried.conj())):  # or turned by half
            where, _ = placed(heard, guides / TILE, phases, TILE)
            soft.append(_soft(bits * np.exp(-2j * np.pi * (carriers / TILE) @ where), carriers))
        for length in lengths:
            for data in coding.decode(np.stack([_gathered(each, length) for each in soft]), length):
                if data is not None:
                    return data
    return None


def _soft(carried: np.ndarray, carriers: np.ndarray) -> np.ndarray:
    """What each place of a bit (J,) says, over the noise power around it."""
    side = int(2 * HIGHEST) + 3
    power, known = np.zeros((side, side)), np.zeros((side, side))
    for sign in (1, -1):
        x, y = (sign * carriers.T + side // 2).astype(int)
        power[y, x], known[y, x] = np.abs(carried) ** 2, 1
    around = gaussian_filter(power, 1.5) / np.maximum(gaussian_filter(known, 1.5), 1e-6)
    x, y = (carriers.T + side // 2).astype(int)
    noise = around[y, x] + around.mean() * 1e-3 + 1e-12
    return np.concatenate([carried.real, -carried.imag]) / np.concatenate([noise, noise])


def _gathered(soft: np.ndarray, length: int) -> np.ndarray:
    """What places say (J,) -> soft coded bits."""
    signs, order = _spread(len(soft))
    count = coding.coded_length(length)
    return np.bincount(order % count, soft * signs, minlength=count)


def _places(data: bytes, count: int) -> np.ndarray:
    """The sign (J,) of each place of a bit."""
    coded = 2.0 * coding.encode(data) - 1
    signs, order = _spread(count)
    return coded[order % len(coded)] * signs


def _tile(data: bytes, amplitudes: np.ndarray | float) -> np.ndarray:
    """The pattern (TILE, TILE) of some bytes, root mean square 1; `amplitudes` (J,) of the places of bits."""
    guides, phases, carriers = _waves()
    cosines, sines = np.split(_places(data, 2 * len(carriers)) * amplitudes, 2)
    bits = _laid(carriers, cosines - 1j * sines)
    guide = _laid(guides, np.exp(1j * phases))
    parts = [part / np.sqrt((part**2).mean()) for part in (bits, guide)]
    return parts[0] * np.sqrt(1 - GUIDE_SHARE) + parts[1] * np.sqrt(GUIDE_SHARE)


def _laid(waves: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """The sum (TILE, TILE) of waves (K, 2) by (x, y), of complex amplitudes (K,)."""
    grid = np.zeros((TILE, TILE), complex)
    grid[waves[:, 1] % TILE, waves[:, 0] % TILE] = amplitudes
    return np.fft.ifft2(grid).real


@lru_cache
def _waves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The template's waves (K, 2) and their phases (K,), and the waves of the bits: whole numbers in a tile, (x, y)."""
    reach = int(HIGHEST)
    y, x = np.mgrid[0 : reach + 1, -reach : reach + 1]
    half = (y > 0) | (x > 0)
    inside = half & (x**2 + y**2 >= LOWEST**2) & (x**2 + y**2 <= HIGHEST**2)
    every = np.stack([x[inside], y[inside]], axis=1)
    words = _words("template", 2 * GUIDES) / 2**32
    radius = 12 + (HIGHEST - 1 - 12) * words[:GUIDES]
    angle = np.pi * (np.arange(GUIDES) + 0.2 + 0.6 * words[GUIDES:]) / GUIDES
    guides = np.rint(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)).astype(int)
    taken = {tuple(guide) for guide in guides.tolist()}
    carriers = np.array([wave for wave in every.tolist() if tuple(wave) not in taken])
    return guides, 2 * np.pi * _words("phases", GUIDES) / 2**32, carriers


def _spread(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A sign (J,) for each place of a bit, and the order (J,) in which they take turns: the same for ever."""
    return 2.0 * (_words("signs", count) % 2) - 1, _words("order", count).argsort(kind="stable")


def _words(purpose: str, count: int) -> np.ndarray:
    """Fixed numbers (count,) below 2**32."""
    return np.frombuffer(hashlib.shake_256(KEY + purpose.encode()).digest(4 * count), "<u4").astype(np.int64)
