"""Merging checkpoints, tensor by tensor: weighted sum, add difference, another autoencoder. Computed in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.weights.lazy import Lazy
from sfumato.weights.parts import Checkpoint
from sfumato.weights.writing import parts_of


def weighted_sum(a: Checkpoint, b: Checkpoint, share: float) -> dict[str, dict[str, Lazy]]:
    """(1 - share) a + share b, in a's precision and of a's family."""
    return _merged(a, [a, b], (1 - share, share))


def add_difference(a: Checkpoint, b: Checkpoint, c: Checkpoint, share: float) -> dict[str, dict[str, Lazy]]:
    """a + share (b - c): what b learned over c, on top of a."""
    return _merged(a, [a, b, c], (1.0, share, -share))


def _merged(a: Checkpoint, models: list[Checkpoint], weights: tuple[float, ...]) -> dict[str, dict[str, Lazy]]:
    parts = [parts_of(model) for model in models]
    for model, other in zip(models[1:], parts[1:], strict=True):
        if (model.family.prediction, model.family.schedule) != (a.family.prediction, a.family.schedule):
            raise ValueError(
                f"ckpt={str(model.path)!r}: it predicts {model.family.prediction}, {a.path.name!r} "
                f"{a.family.prediction}, or their noise differs: these do not merge"
            )
        for part, tensors in parts[0].items():
            if part not in other or set(other[part]) != set(tensors):
                raise ValueError(f"ckpt={str(model.path)!r}: its {part} is not like that of {a.path.name!r}")
    return {
        part: {name: _combine(name, [other[part][name] for other in parts], weights) for name in tensors}
        for part, tensors in parts[0].items()
    }


def _combine(name: str, tensors: list[Lazy], weights: tuple[float, ...]) -> Lazy:
    """The weighted sum of one tensor of each model, in the first one's shape.

    A U-Net's first convolution may have more inputs in one model (inpainting): the first inputs, the latents, are
    merged, and what only the first model has is kept.
    """
    first = tensors[0]
    shared = min(lazy.shape[1] for lazy in tensors) if len(first.shape) > 1 else None
    for lazy in tensors[1:]:
        if lazy.shape != first.shape and not (name == "input_blocks.0.0.weight" and shared is not None):
            raise ValueError(f"the tensor {name} has shapes {first.shape} and {lazy.shape}: these do not merge")

    def read() -> Tensor:
        out = first.read().float().clone()
        inner = out[:, :shared] if shared is not None else out
        inner.mul_(weights[0])
        for lazy, weight in zip(tensors[1:], weights[1:], strict=True):
            other = lazy.read()
            inner.add_((other[:, :shared] if shared is not None else other).float(), alpha=weight)
        return out.to(first.dtype)

    def release() -> None:
        for lazy in tensors:
            lazy.release()

    return replace(first, read=read, release=release)


def with_autoencoder(parts: Mapping[str, Mapping[str, Lazy]], other: Checkpoint) -> dict[str, dict[str, Lazy]]:
    """The parts with another checkpoint's autoencoder, in the precision that the replaced one had."""
    taken = parts_of(other)["autoencoder"]
    dtype = next(iter(parts["autoencoder"].values())).dtype if parts.get("autoencoder") else torch.float32
    return {
        **{part: dict(tensors) for part, tensors in parts.items()},
        "autoencoder": {n: t.to(dtype) for n, t in taken.items()},
    }
