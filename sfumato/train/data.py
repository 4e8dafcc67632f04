"""Training data: captioned pictures in WebDataset shards, caches of latents, and the order in which they are seen.

Knows no network and no loss. The batch of step k is a function of (seed, k) alone, so a run can resume anywhere.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from sfumato.weights.files import save_safetensors


class Examples(Protocol):
    """Anything with a length whose `batch(indices)` gives what an objective's loss takes."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> object: ...


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def indices_at(step: int, batch_size: int, length: int, seed: int) -> list[int]:
    """The examples of training step `step`: every epoch is its own permutation, batches run across its end."""
    if length < 1:
        raise ValueError("data: the set is empty")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(length, seed, p // length)[p % length]) for p in positions]


@dataclass(frozen=True)
class CaptionedBatch:
    """pixels (B, 3, H, W) in [-1, 1] and one caption each."""

    pixels: Tensor
    captions: list[str]


class CaptionedShards:
    """Pictures with captions (`key.png|jpg|webp` + `key.txt`) in the tar files of folders, read by random access.

    All pictures must have the size `size` x `size`. Small sets are kept decoded in memory.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

    def __init__(self, folders: Sequence[str | Path], size: int, keep_in_memory: bool = True) -> None:
        self.size = size
        self._kept: dict[int, np.ndarray] | None = {} if keep_in_memory else None
        self._pictures: list[tuple[Path, int, int]] = []
        self.captions: list[str] = []
        for folder in folders:
            shards = sorted(Path(folder).glob("*.tar"))
            if not shards:
                raise ValueError(f"data={str(folder)!r}: no .tar shards there")
            for shard in shards:
                self._index(shard)

    def _index(self, shard: Path) -> None:
        pictures: dict[str, tuple[Path, int, int]] = {}
        captions: dict[str, str] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.rpartition(".")
                if f".{suffix}" in self.SUFFIXES:
                    pictures[key] = (shard, member.offset_data, member.size)
                elif suffix == "txt":
                    source = archive.extractfile(member)
                    captions[key] = source.read().decode("utf-8").strip() if source else ""
        for key, place in pictures.items():
            if key not in captions:
                raise ValueError(f"data={str(shard)!r}: {key} has no caption (.txt)")
            self._pictures.append(place)
            self.captions.append(captions[key])

    def __len__(self) -> int:
        return len(self._pictures)

    def _pixels(self, index: int) -> np.ndarray:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        shard, offset, size = self._pictures[index]
        with shard.open("rb") as file:
            file.seek(offset)
            picture = Image.open(io.BytesIO(file.read(size))).convert("RGB")
        if picture.size != (self.size, self.size):
            raise ValueError(f"data={str(shard)!r}: a picture of {picture.size}, expected {self.size} x {self.size}")
        pixels = np.asarray(picture)
        if self._kept is not None:
            self._kept[index] = pixels
        return pixels

    def batch(self, indices: Sequence[int]) -> CaptionedBatch:
        stacked = np.stack([self._pixels(index) for index in indices])
        pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return CaptionedBatch(pixels, [self.captions[index] for index in indices])


@dataclass(frozen=True)
class LatentBatch:
    """Posterior mean and std of unscaled latents, each (B, C, h, w) float32, and one caption each."""

    mean: Tensor
    std: Tensor
    captions: list[str]


class CachedLatents:
    """Latents of a whole set in one file: `mean` and `std` (N, C, h, w) in fp16, captions in the header.

    Several files are read as one set.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        means, stds = [], []
        self.captions: list[str] = []
        for path in paths:
            with safe_open(str(path), framework="pt") as file:
                means.append(file.get_tensor("mean"))
                stds.append(file.get_tensor("std"))
                self.captions += json.loads(file.metadata()["captions"])
        self.mean, self.std = torch.cat(means), torch.cat(stds)

    @staticmethod
    def write(path: str | Path, mean: Tensor, std: Tensor, captions: list[str]) -> None:
        save_safetensors(path, {"mean": mean.half(), "std": std.half()}, {"captions": json.dumps(captions)})

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int]) -> LatentBatch:
        rows = torch.as_tensor(indices)
        captions = [self.captions[index] for index in indices]
        return LatentBatch(self.mean[rows].float(), self.std[rows].float(), captions)
