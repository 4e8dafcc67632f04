"""Latents of a whole set, computed once, with the states of their captions if wanted. Knows no network's kind.

A cache is some .safetensors files; those of one size (bucket) may be several. Letters: N pictures, C channels,
h w latent size, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.train.data.bucketed import Bucketed
from sfumato.train.data.order import BatchOrder, share
from sfumato.weights.files import load_safetensors, save_safetensors

log = logging.getLogger(__name__)

PER_FILE = 4096  # pictures; at 64 x 64 x 4 that is 268 MB
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
States = Callable[[list[str]], Tensor]


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's weights, names and shapes; the same on every device, another once rounded to 16 bits."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class LatentBatch:
    """Posterior mean and std of unscaled latents, each (B, C, h, w) float32, and one caption each.

    `context` (B, L, D) float32: the captions' states, where the cache has them.
    """

    mean: Tensor
    std: Tensor
    captions: list[str]
    context: Tensor | None = None


@dataclass(frozen=True)
class _File:
    """One file of a cache; tensors are views of it, read when they are used."""

    path: Path
    mean: Tensor
    std: Tensor
    context: Tensor | None
    captions: list[str]
    autoencoder: str
    text: str


def _opened(path: Path) -> _File:
    tensors, metadata = load_safetensors(path)
    if lacking := [name for name in ("mean", "std") if name not in tensors]:
        raise ValueError(f"latents={str(path)!r}: no cache of latents, there is no {lacking[0]!r}")
    mean, std, context = tensors["mean"], tensors["std"], tensors.get("context")
    captions = json.loads(metadata.get("captions", "[]"))
    if mean.ndim != 4 or std.shape != mean.shape or len(captions) != len(mean):
        raise ValueError(
            f"latents={str(path)!r}: {tuple(mean.shape)}, {tuple(std.shape)} and {len(captions)} captions do not fit"
        )
    if context is not None and len(context) != len(mean):
        raise ValueError(f"latents={str(path)!r}: {len(context)} captions' states for {len(mean)} latents")
    return _File(path, mean, std, context, captions, metadata.get("autoencoder", ""), metadata.get("text", ""))


def _check_maker(files: Sequence[_File], what: str, wanted: str | None) -> None:
    """ValueError where a file was made by another network than `wanted`, or than the first file."""
    for file in files:
        made: str = getattr(file, what)
        expected = wanted or next((known for one in files if (known := getattr(one, what))), "")
        if not made and wanted:
            log.warning("%s does not say which %s made it; whether it is this one is not known", file.path, what)
        elif made and expected and made != expected:
            raise ValueError(
                f"latents={str(file.path)!r}: made by another {what} ({made[:10]}, not {expected[:10]}); make it anew"
            )


class CachedLatents:
    """Latents in some files, read as one set: `mean` and `std` (N, C, h, w) in fp16, captions in the header.

    Where sizes differ, a batch has one of them: see `in_batches`. `autoencoder` and `text` are the fingerprints of the
    networks that will be used: a cache made by others is refused, and so are files that differ in that.
    """

    def __init__(self, paths: Sequence[str | Path], autoencoder: str | None = None, text: str | None = None) -> None:
        if not paths:
            raise ValueError("latents: no files are given")
        self.paths = [Path(path) for path in paths]
        self._wanted = (autoencoder, text)
        self._open()

    def _open(self) -> None:
        self._files = [_opened(path) for path in self.paths]
        _check_maker(self._files, "autoencoder", self._wanted[0])
        _check_maker(self._files, "text", self._wanted[1])
        if len({file.context is None for file in self._files}) > 1:
            raise ValueError(f"latents={str(self.paths[0])!r}: only some of the files have the captions' states")
        self.captions = [caption for file in self._files for caption in file.captions]
        self._ends = np.cumsum([len(file.captions) for file in self._files])
        if not self.captions:
            raise ValueError(f"latents={str(self.paths[0])!r}: the cache is empty")

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_wanted": self._wanted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @staticmethod
    def write(
        path: str | Path,
        mean: Tensor,
        std: Tensor,
        captions: list[str],
        autoencoder: str = "",
        context: Tensor | None = None,
        text: str = "",
    ) -> None:
        """One file: mean and std (N, C, h, w), context (N, L, D), the fingerprints of what made them."""
        tensors = {"mean": mean.half(), "std": std.half()}
        if context is not None:
            tensors["context"] = context.half()
        save_safetensors(path, tensors, {"captions": json.dumps(captions), "autoencoder": autoencoder, "text": text})

    def __len__(self) -> int:
        return len(self.captions)

    def _place(self, index: int) -> tuple[_File, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[number], index - (int(self._ends[number - 1]) if number else 0)

    def sizes(self) -> dict[tuple[int, int], np.ndarray]:
        """(h, w) -> the numbers of the latents that have it."""
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        for file, end in zip(self._files, self._ends, strict=True):
            height, width = file.mean.shape[2:]
            found.setdefault((height, width), []).append(np.arange(end - len(file.captions), end))
        return {size: np.concatenate(parts) for size, parts in found.items()}

    def batch(self, indices: Sequence[int]) -> LatentBatch:
        places = [self._place(index) for index in indices]
        shapes = {tuple(file.mean.shape[1:]) for file, _ in places}
        if len(shapes) > 1:
            raise ValueError(f"indices={list(indices)[:4]}: latents of the shapes {sorted(shapes)} in one batch")
        mean, std = (torch.stack([getattr(file, name)[row] for file, row in places]) for name in ("mean", "std"))
        context = None
        if self._files[0].context is not None:
            context = torch.stack([file.context[row] for file, row in places if file.context is not None]).float()
        return LatentBatch(mean.float(), std.float(), [file.captions[row] for file, row in places], context)

    def in_batches(self, batch_size: int, seed: int) -> LatentBatches:
        """The same latents with an order of their own, in which every batch has one size."""
        return LatentBatches(self, batch_size, seed)


class LatentBatches:
    """Cached latents of several sizes in batches of one size each. ValueError where a size has less than a batch."""

    def __init__(self, latents: CachedLatents, batch_size: int, seed: int) -> None:
        self.latents = latents
        self.batch_size = batch_size
        self._members = list(latents.sizes().values())
        for (height, width), members in latents.sizes().items():
            if len(members) < batch_size:
                raise ValueError(f"batch_size={batch_size}: only {len(members)} latents are {height} x {width}")
        self.order = BatchOrder([len(members) for members in self._members], batch_size, seed)

    def __len__(self) -> int:
        return len(self.latents)

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """Rank `rank`'s latents of step `step`."""
        group, inside, _ = self.order.at(step)
        return share(self._members[group][inside].tolist(), rank, ranks)

    def batch(self, indices: Sequence[int]) -> LatentBatch:
        return self.latents.batch(indices)


@torch.inference_mode()
def cache_latents(
    data: Bucketed,
    encode: Encode,
    folder: str | Path,
    autoencoder: str,
    states: States | None = None,
    text: str = "",
    per_file: int = PER_FILE,
) -> list[Path]:
    """Encode every picture that can be read, once; returns the files, in order. Called again, it goes on.

    encode: pixels (B, 3, H, W) in [-1, 1] -> mean and std (B, C, h, w); states: captions -> (B, L, D). A file that is
    there must be of the same networks. Pictures are cropped and flipped as in the first pass.
    """
    paths = []
    parts = [
        (Path(folder) / f"{width}x{height}-{number:05}.safetensors", tickets[start : start + per_file])
        for (width, height), tickets in zip(data.sizes, map(data.members, range(len(data.sizes))), strict=True)
        for number, start in enumerate(range(0, len(tickets), per_file))
    ]
    for path, tickets in tqdm(parts, desc="encoding", unit="files", disable=None):
        if path.exists():
            CachedLatents([path], autoencoder, text)
            paths.append(path)
            continue
        done: list[tuple[Tensor, ...]] = []
        captions: list[str] = []
        for start in range(0, len(tickets), data.batch_size):
            batch = data.readable(tickets[start : start + data.batch_size])
            if batch is not None:
                context = () if states is None else (states(batch.captions),)
                done.append(tuple(part.half().cpu() for part in (*encode(batch.pixels), *context)))
                captions += batch.captions
        if done:
            mean, std, *rest = (torch.cat(column) for column in zip(*done, strict=True))
            CachedLatents.write(path, mean, std, captions, autoencoder, rest[0] if rest else None, text)
            paths.append(path)
    return paths
