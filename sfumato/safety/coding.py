"""Bits that are found again through noise: a check sum, a convolutional code, and the reading of soft bits.

The code: constraint length 7, rate 1/3, generators 133, 171, 165 octal (Lin & Costello 2004, table 12.1c); read by
Viterbi 1967. Letters: B words read at once, L bytes, n bits with check and tail, S states.
"""

from __future__ import annotations

import zlib

import numpy as np

GENERATORS = (0o133, 0o171, 0o165)
MEMORY, CHECK = 6, 32  # bits
STATES = 1 << MEMORY


def coded_length(length: int) -> int:
    """How many coded bits `length` bytes become."""
    return len(GENERATORS) * (8 * length + CHECK + MEMORY)


def encode(data: bytes) -> np.ndarray:
    """Bytes, their CRC-32 and a tail of zeros -> coded bits (3 n,) of 0 and 1."""
    whole = data + zlib.crc32(data).to_bytes(4, "big")
    bits = np.concatenate([np.unpackbits(np.frombuffer(whole, np.uint8)), np.zeros(MEMORY, np.uint8)])
    taps = np.array([[generator >> (MEMORY - at) & 1 for at in range(MEMORY + 1)] for generator in GENERATORS])
    coded = np.stack([np.convolve(bits, tap)[: len(bits)] % 2 for tap in taps], axis=1)
    return coded.ravel().astype(np.uint8)


def decode(soft: np.ndarray, length: int) -> list[bytes | None]:
    """Soft coded bits (B, 3 n), above 0 for a likely 1, to the likeliest `length` bytes; None where the check fails.

    Of noise, one in 2**32 passes.
    """
    words = np.packbits(_likeliest(soft)[:, : 8 * length + CHECK], axis=1)
    found = [word.tobytes() for word in words]
    return [word[:-4] if zlib.crc32(word[:-4]).to_bytes(4, "big") == word[-4:] else None for word in found]


def _likeliest(soft: np.ndarray) -> np.ndarray:
    """Soft coded bits (B, 3 n) -> the bits (B, n) of the likeliest way through the code that ends in state 0."""
    steps = soft.reshape(len(soft), -1, len(GENERATORS))
    # A state is the last six bits, the newest highest. Into state s came bit s >> 5, from one of two states before.
    state = np.arange(STATES)
    before = np.stack([state << 1 & STATES - 1, (state << 1 & STATES - 1) | 1], axis=1)  # (S, 2)
    register = (state[:, None] >> MEMORY - 1) << MEMORY | before
    ones = np.array([[[bin(int(r) & g).count("1") % 2 for g in GENERATORS] for r in pair] for pair in register])
    signs = 2.0 * ones - 1  # (S, 2, 3)
    score = np.full((len(soft), STATES), -np.inf)
    score[:, 0] = 0
    came = np.empty((steps.shape[1], len(soft), STATES), bool)
    for at in range(steps.shape[1]):
        ways = score[:, before] + np.einsum("bg,swg->bsw", steps[:, at], signs)
        came[at] = ways[..., 1] > ways[..., 0]
        score = ways.max(axis=2)
    bits = np.empty((len(soft), steps.shape[1]), np.uint8)
    now, row = np.zeros(len(soft), int), np.arange(len(soft))
    for at in reversed(range(steps.shape[1])):
        bits[:, at] = now >> MEMORY - 1
        now = before[now, came[at, row, now].astype(int)]
    return bits
