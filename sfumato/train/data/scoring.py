"""Scores of pictures from their CLIP embeddings: the aesthetics predictors of LAION, in their public weight formats.

Letters: N pictures, E width of an embedding. Embeddings come from clip-retrieval's .npy files or from a CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.train.data.pictures import Pictures, read
from sfumato.weights.files import open_tensors
from sfumato.weights.towers import ImageTower, load_tower, prepared

__all__ = ["ImageTower", "Predictor", "load_predictor", "load_tower", "prepared"]


class Predictor(nn.Module):
    """Embeddings (N, E) of any length -> scores (N,): linear layers one after another, on unit vectors.

    One is LAION's linear predictor, five (768-1024-128-64-16-1) are their improved one's, between which it has only
    dropout in training and no non-linearity.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def width(self) -> int:
        """E, the width that it takes."""
        return int(self.layers[0].in_features)  # type: ignore[arg-type]

    @torch.inference_mode()
    def forward(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise ValueError(f"embeddings={tuple(embeddings.shape)}: the predictor takes (N, {self.width})")
        x = F.normalize(embeddings.float(), dim=-1)
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


def load_predictor(path: str | Path) -> Predictor:
    """A predictor's file: `weight` and `bias` (linear), or `layers.N.weight` and `.bias`, N counting dropouts as well.

    ValueError where it holds anything else, or layers that do not fit on one another.
    """
    with open_tensors(path) as file:
        tensors = {name: file.read(name).float().clone() for name in file.names()}
    if set(tensors) == {"weight", "bias"}:
        numbers = [""]
    else:
        found = {re.fullmatch(r"(layers\.\d+\.)(weight|bias)", name) for name in tensors}
        if None in found or not found:
            raise ValueError(f"predictor={str(path)!r}: weight and bias, or layers.N.weight and .bias, are needed")
        numbers = sorted({match[1] for match in found if match}, key=lambda name: int(name.split(".")[1]))
    layers: list[nn.Linear] = []
    for prefix in numbers:
        weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
        before = layers[-1].out_features if layers else None
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"predictor={str(path)!r}: {prefix}weight and {prefix}bias do not belong together")
        if before not in (None, weight.shape[1]):
            raise ValueError(f"predictor={str(path)!r}: {prefix}weight takes {weight.shape[1]} numbers, gets {before}")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if layers[-1].out_features != 1:
        raise ValueError(f"predictor={str(path)!r}: it gives {layers[-1].out_features} numbers, not one score")
    return Predictor(layers).eval()


def embedding_files(path: str | Path) -> list[Path]:
    """A path's .npy files in clip-retrieval's order: the file, or img_emb_0.npy, img_emb_1.npy, ... of a folder."""
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / "img_emb" if (path / "img_emb").is_dir() else path
    files = sorted(folder.glob("*.npy"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)])
    if not files:
        raise ValueError(f"embeddings={str(path)!r}: no .npy files there")
    return files


def stored_embeddings(path: str | Path) -> Iterator[np.ndarray]:
    """Embeddings (n, E), file by file, mapped into memory. ValueError names a file that has none."""
    for file in embedding_files(path):
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"embeddings={str(file)!r}: not a readable .npy file ({error})") from error
        if not isinstance(found, np.ndarray):
            raise ValueError(f"embeddings={str(file)!r}: not a readable .npy file (an archive of several)")
        if found.ndim != 2 or found.dtype.kind != "f":
            raise ValueError(f"embeddings={str(file)!r}: {found.dtype} {found.shape}; numbers (N, E) are needed")
        yield found


def scores_of_stored(predictor: Predictor, path: str | Path, batch_size: int = 4096) -> np.ndarray:
    """Scores (N,) of stored embeddings, in their order."""
    found = []
    for embeddings in stored_embeddings(path):
        for start in range(0, len(embeddings), batch_size):
            piece = np.array(embeddings[start : start + batch_size], dtype=np.float32)
            found.append(predictor(torch.from_numpy(piece)).numpy())
    return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)


def scores_of_pictures(
    predictor: Predictor, tower: ImageTower, pictures: Pictures, batch_size: int = 32
) -> Iterator[tuple[int, float]]:
    """(number, score) of every picture that can be read; the others are in the pictures' report."""
    size = tower.config.image_size
    numbers: list[int] = []
    images: list[Tensor] = []
    for index in range(len(pictures)):
        got = read(pictures, index, (size, size), need_caption=False)
        if got is not None:
            numbers.append(index)
            images.append(prepared(got[0], size))
        if images and (len(images) == batch_size or index == len(pictures) - 1):
            scores = predictor(tower(torch.stack(images))).tolist()
            yield from zip(numbers, scores, strict=True)
            numbers, images = [], []
