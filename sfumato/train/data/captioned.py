"""Captioned pictures of one size in shards, kept decoded in memory: what the box is trained on. Knows no network."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
