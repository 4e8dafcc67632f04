"""Adapters out of weights, and into them: what a tuned model learned over its base, another rank, a merged checkpoint.

Truncated singular values (Eckart & Young 1936), computed in float64 from the smaller Gram matrix, so that nothing is
random. Letters: O outputs, N inputs times kernel, r rank, s singular values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from sfumato.families import Family, Model
from sfumato.models.deltas import Change, Difference, DoRA, LoHa, LoKr, LoRA, moved
from sfumato.weights.adapters.adapter import Adapter, Changes, Key
from sfumato.weights.adapters.wearing import Step, Worn, applied, steps_of
from sfumato.weights.lazy import Lazy
from sfumato.weights.parts import Checkpoint, shapes_of
from sfumato.weights.writing import parts_of

log = logging.getLogger(__name__)

Parts: TypeAlias = Mapping[str, Mapping[str, Lazy]]
SMALLEST = 1e-6  # of the largest singular value: below it is what rounding left


@dataclass(frozen=True)
class Ranks:
    """How many directions to keep: at most `rank` (`conv` for kernels above 1 x 1, where given, 0: none of these).

    `share` in (0, 1] keeps as few as hold that share of the energy, the sum of s^2.
    """

    rank: int
    conv: int | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: 1 or more are needed")
        if self.conv is not None and self.conv < 0:
            raise ValueError(f"conv_rank={self.conv}: 0 or more are needed")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: above 0 and at most 1 is needed")

    def of(self, shape: Sequence[int]) -> int:
        """The most for a weight of a shape."""
        large = len(shape) == 4 and shape[2] * shape[3] > 1
        return self.conv if large and self.conv is not None else self.rank


def factors(matrix: Tensor, rank: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """matrix (O, N) -> up (O, r), down (r, N), float32, both with the roots of s: the nearest of rank r or less."""
    wide = matrix.shape[0] <= matrix.shape[1]
    exact = (matrix if wide else matrix.T).double()
    energy, vectors = torch.linalg.eigh(exact @ exact.T)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    kept = int((energy > energy[0] * SMALLEST**2).sum())
    if share < 1:
        kept = min(kept, int((energy.cumsum(0) < share * energy.sum()).sum()) + 1)
    kept = max(1, min(kept, rank))
    vectors, roots = vectors[:, :kept], energy[:kept].clamp(min=1e-300) ** 0.25
    left, right = vectors * roots, (vectors.T @ exact) / roots[:, None]
    up, down = (left, right) if wide else (right.T, left.T)
    return up.float().contiguous(), down.float().contiguous()


def extract(
    tuned: Model | Checkpoint,
    base: Model | Checkpoint,
    ranks: Ranks,
    parts: Sequence[str] | None = None,
    rest: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[Key, tuple[Change, ...]]:
    """LoRAs of the differences of linear layers and convolutions, in the form that `save_adapter` takes.

    `parts`: of these networks alone (None: the U-Net and the text encoders). `rest` takes differences of biases and
    norms along, whole. `progress` is told 1 a tensor. ValueError: the models are of different shapes, or the same.
    """
    family = base.family
    allowed = ("unet", *family.text_parts)
    if unknown := set(parts or ()) - set(allowed):
        raise ValueError(f"parts={min(unknown)!r}: one of {', '.join(allowed)}")
    one, other = _tensors(tuned), _tensors(base)
    made: dict[Key, tuple[Change, ...]] = {}
    for key in _shared(one, other, parts or allowed):
        part, name = key
        difference = one[part][name].read().float() - other[part][name].read().float()
        change = _small(difference, name, ranks, rest)
        if change is not None:
            made[key] = (change,)
        if progress:
            progress(1)
    if not made:
        raise ValueError("tuned: its weights are those of the base, there is nothing to extract")
    return made


def _tensors(source: Model | Checkpoint) -> Parts:
    if isinstance(source, Checkpoint):
        return parts_of(source)
    return {
        part: {
            name: Lazy(tuple(t.shape), t.dtype, lambda t=t: t.detach().cpu())  # type: ignore[misc]
            for name, t in network.state_dict().items()
        }
        for part, network in source.networks.items()
    }


def _shared(one: Parts, other: Parts, parts: Iterable[str]) -> Iterator[Key]:
    """Every parameter of the parts; ValueError names the first that the two have not alike."""
    for part in parts:
        for name in other.get(part, {}):
            theirs = one.get(part, {}).get(name)
            if theirs is None or theirs.shape != other[part][name].shape:
                raise ValueError(f"tuned: its {part} is not like the base's, first {name}")
            yield part, name


def _small(difference: Tensor, name: str, ranks: Ranks, rest: bool) -> Change | None:
    """A small form of a parameter's difference; None where there is none, or it is not wanted."""
    if not difference.any():
        return None
    if difference.ndim < 2 or "embedding" in name:
        return Difference(difference) if rest and difference.ndim < 2 else None
    rank = ranks.of(difference.shape)
    if not rank:
        return None
    up, down = factors(difference.flatten(1), rank, ranks.share)
    return LoRA(up, down.reshape(-1, *difference.shape[1:]), float(up.shape[1]))


def resized(adapter: Adapter | Changes, family: Family, ranks: Ranks) -> dict[Key, tuple[Change, ...]]:
    """The same changes at other ranks: LoRA, also within DoRA, and LoHa and LoKr, which become LoRA; others stay."""
    changes = adapter.changes if isinstance(adapter, Adapter) else adapter
    shapes = shapes_of(family)
    return {
        (part, name): tuple(
            each for change in made if (each := _resized(change, shapes[part][name], ranks)) is not None
        )
        for (part, name), made in changes.items()
    }


def _resized(change: Change, shape: tuple[int, ...], ranks: Ranks) -> Change | None:
    if isinstance(change, DoRA):
        inner = _resized(change.inner, shape, ranks)
        return replace(change, inner=inner) if isinstance(inner, LoRA) else change
    if not isinstance(change, LoRA | LoHa | LoKr):
        return change
    rank = ranks.of(shape)
    if not rank:
        return None
    if isinstance(change, LoRA) and change.mid is None:
        up, down = _thinner(change, rank, ranks.share)
    else:
        weight = torch.zeros(shape)
        up, down = factors(moved(change, "cpu").difference(weight).flatten(1), rank, ranks.share)
    return LoRA(up, down.reshape(-1, *shape[1:]), float(up.shape[1]))


def _thinner(change: LoRA, rank: int, share: float) -> tuple[Tensor, Tensor]:
    """Of up down, by way of the two's QR: the values of a small (r, r) matrix are theirs."""
    scale = 1.0 if change.alpha is None else change.alpha / change.rank
    left, small_left = torch.linalg.qr(change.up.flatten(1).double() * scale)
    right, small_right = torch.linalg.qr(change.down.flatten(1).double().T)
    up, down = factors(small_left @ small_right.T, rank, share)
    return (left @ up.double()).float(), (down.double() @ right.T).float()


def merged(parts: Parts, worn: Sequence[Worn]) -> dict[str, dict[str, Lazy]]:
    """A checkpoint's tensors with adapters in them, in their own precision, computed when they are read.

    ValueError names a parameter that an adapter changes and the checkpoint has not.
    """
    out = {part: dict(tensors) for part, tensors in parts.items()}
    for (part, name), steps in steps_of(worn).items():
        if name not in out.get(part, {}):
            raise ValueError(f"{part} has no {name}: the adapter was read for another model")
        out[part][name] = _with(out[part][name], steps)
    return out


def _with(lazy: Lazy, steps: Sequence[Step]) -> Lazy:
    @torch.no_grad()
    def read() -> Tensor:
        return applied(lazy.read().float(), steps).to(lazy.dtype)

    return replace(lazy, read=read)
