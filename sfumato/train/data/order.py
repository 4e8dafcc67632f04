"""The order in which examples are seen: a function of (seed, position) alone, so that a run resumes anywhere.

Knows no picture. The position is the number of the step; ranks share the batch of a step, they never change it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

WINDOW = 16  # blocks of a set that are mixed; enough that no batch is of one shard
ROUNDS = 6  # of the Feistel network; Luby & Rackoff 1988 prove four for perfect round functions


class Examples(Protocol):
    """Anything with a length whose `batch(indices)` gives what an objective's loss takes."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> object: ...


@runtime_checkable
class Ordered(Protocol):
    """Examples with an order of their own, such as batches of one size each."""

    batch_size: int

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> object: ...

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]: ...


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def share(indices: Sequence[int], rank: int, ranks: int) -> list[int]:
    """Rank `rank`'s part of a batch: ranks take turns in whole runs, so that all parts in a row are the batch."""
    if not 0 <= rank < ranks:
        raise ValueError(f"rank={rank}: 0 to {ranks - 1} are allowed with ranks={ranks}")
    if len(indices) % ranks:
        raise ValueError(f"batch_size={len(indices)}: not a multiple of the {ranks} ranks")
    each = len(indices) // ranks
    return list(indices[rank * each : (rank + 1) * each])


def indices_at(step: int, batch_size: int, length: int, seed: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Rank `rank`'s examples of step `step`: every epoch is its own permutation, batches run across its end.

    `batch_size` is that of all `ranks` together.
    """
    if length < 1:
        raise ValueError("data: the set is empty")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(length, seed, p // length)[p % length]) for p in share(positions, rank, ranks)]


def indices_of(examples: Examples, step: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Rank `rank`'s part of the batch of step `step`: in the examples' own order if they have one, else shuffled.

    ValueError where `batch_size`, that of all ranks together, is not the one that such examples were made for.
    """
    if not isinstance(examples, Ordered):
        return indices_at(step, batch_size, len(examples), seed, rank, ranks)
    if examples.batch_size != batch_size:
        raise ValueError(f"batch_size={batch_size}: the examples were put into batches of {examples.batch_size}")
    return examples.indices_at(step, rank, ranks)


def shuffled(positions: np.ndarray, length: int, key: Sequence[int]) -> np.ndarray:
    """Where a random permutation of 0 ... length - 1 sends `positions` (int64); `key` says which permutation.

    Nothing of the size of the set is kept: a Feistel network (Luby & Rackoff 1988) permutes the next power of four,
    and is walked until it comes out below `length` (Black & Rogaway 2002).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64)
    found = np.asarray(positions, dtype=np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for one in keys:
            left, right = right, left ^ (_mixed(right ^ one) & mask)
        found = found.copy()
        found[outside] = (left << np.uint64(half)) | right
        outside = found >= length
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits: SplitMix64's last steps (Steele, Lea & Flood 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled_near(positions: np.ndarray, length: int, key: Sequence[int], near: int) -> np.ndarray:
    """As `shuffled`, but positions that follow one another go to few places: what lies together is read together.

    The set is cut into blocks of `near`, which change places whole; then every WINDOW of them are mixed. What is less
    than a block comes last. near = 0: no blocks.
    """
    blocks = length // near if near else 0
    if blocks <= WINDOW:
        return shuffled(positions, length, key)
    full, span = blocks * near, WINDOW * near
    found = np.array(positions, dtype=np.int64)
    for window in np.unique(np.minimum(found, full) // span):
        start, stop = int(window) * span, min(full, (int(window) + 1) * span)
        chosen = (positions >= start) & (positions < stop)
        if chosen.any():
            mixed = start + shuffled(positions[chosen] - start, stop - start, [*key, 1, int(window)])
            found[chosen] = shuffled(mixed // near, blocks, [*key, 2]) * near + mixed % near
    return found


class BatchOrder:
    """Batches of one group each (a group: pictures of one size), every example once in each pass over its group.

    Group g of counts[g] examples is an endless row of shuffled passes, cut into batches. Epoch e holds the batches
    that end within pass e + 1, the groups in random turns. Nothing is dropped or filled up. All counts >= batch_size.
    near: how many examples of the whole lie together, see `shuffled_near`; 0 where it does not matter.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int, near: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: 1 or more are needed")
        if not counts or min(counts) < batch_size:
            raise ValueError(f"batch_size={batch_size}: more than a group has ({min(counts, default=0)} pictures)")
        self.counts = list(counts)
        self.batch_size = batch_size
        self.seed = seed
        self.near = [-(-near * count // sum(counts)) for count in counts]
        self._turns: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int32))

    def batches_before(self, epoch: int) -> int:
        """How many batches the epochs before this one hold."""
        return sum(epoch * count // self.batch_size for count in self.counts)

    def turns(self, epoch: int) -> np.ndarray:
        """The group of each step of an epoch, in random turns."""
        if self._turns[0] != epoch:
            size = self.batch_size
            held = [(epoch + 1) * count // size - epoch * count // size for count in self.counts]
            groups = np.repeat(np.arange(len(held), dtype=np.int32), held)
            self._turns = (epoch, groups[shuffled(np.arange(len(groups)), len(groups), [self.seed, epoch])])
        return self._turns[1]

    def at(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Step -> its group, its examples' numbers in the group (batch_size,), and the pass of each (batch_size,)."""
        if step < 0:
            raise ValueError(f"step={step}: 0 or more is needed")
        guess = step * self.batch_size // sum(self.counts)
        epochs = range(max(0, guess - 1), guess + len(self.counts) + 2)
        epoch = epochs[bisect.bisect_right([self.batches_before(e) for e in epochs], step) - 1]
        within = step - self.batches_before(epoch)
        turns = self.turns(epoch)
        group = int(turns[within])
        batch = epoch * self.counts[group] // self.batch_size + int(np.count_nonzero(turns[:within] == group))
        positions = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        passes, inside = np.divmod(positions, self.counts[group])
        members = np.empty_like(inside)
        for number in np.unique(passes):
            chosen = passes == number
            key = [self.seed, int(number), group + 1]
            members[chosen] = shuffled_near(inside[chosen], self.counts[group], key, self.near[group])
        return group, members, passes
