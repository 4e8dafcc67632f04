"""The noise that a CUDA device draws for a seed, computed in NumPy: Philox 4x32-10 and cuRAND's Box-Muller.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". PyTorch gives each element of `torch.randn` a thread
of its own, and each call after the first the next block of the thread's stream. That holds for a tensor of no more
elements than the card runs threads at once: 40,960 on a T4, 200,000 and more on recent cards.
"""

from __future__ import annotations

import math

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))  # Salmon et al. 2011, table 2 and Random123's source
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, Random123's key schedule
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)


def philox_4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds on counters (4, n), each word a uint64 below 2^32, with one key; returns the random words (4, n)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> np.uint64(32)) ^ b ^ np.uint64(low),
            second & _LOW,
            (first >> np.uint64(32)) ^ d ^ np.uint64(high),
            first & _LOW,
        )
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d])


class PhiloxGenerator:
    """Draws as `torch.Generator("cuda").manual_seed(seed)` does: element i is thread i, a call is a counter."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}: 0 to 2^64 - 1 are allowed")
        self.key = seed & 0xFFFFFFFF, seed >> 32
        self.calls = 0

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 noise ~ N(0, 1); cuRAND's `_curand_box_muller`, of whose two numbers the first is used."""
        counter = np.zeros((4, math.prod(shape)), dtype=np.uint64)
        counter[0] = self.calls
        counter[2] = np.arange(counter.shape[1])
        self.calls += 1
        words = philox_4x32(counter, self.key)
        # cuRAND's constants are 2^-32 and 2 pi 2^-32 as single floats; the sum is kept double until the end.
        scale, turn = float(np.float32(2.0**-32)), float(np.float32(2.0**-32 * 2 * math.pi))
        u, v = words[0] * scale + scale / 2, words[1] * turn + turn / 2
        return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32).reshape(shape)
