"""Weights of tokens -> states of tokens: ways to apply them to what a text encoder returned, and joining chunks.

Letters: B chunks, L tokens of a chunk, D width, N tokens of a prompt. Knows no text and no network.
"""

from __future__ import annotations

import torch
from torch import Tensor

# "none": brackets are text, so the caller leaves emphasis() out. "ignore": brackets are read and their weights dropped.
WEIGHTINGS = ("original", "no norm", "comfy", "ignore", "none")


def weigh(z: Tensor, weights: Tensor, how: str = "original", empty: Tensor | None = None) -> Tensor:
    """States z (B, L, D), each row one chunk's, weighed by weights (B, L), in z's dtype and on its device.

    "original" (A1111): z w, scaled so that each row keeps its mean. "no norm" (A1111): z w. "comfy" (ComfyUI): from
    the states `empty` (1, L, D) or (L, D) of the empty prompt towards z, w = 1 being z. "ignore" and "none": z.
    ValueError: another `how`, or "comfy" without `empty` where a weight is not 1.
    """
    if how not in WEIGHTINGS:
        raise ValueError(f"weighting={how}: allowed are {', '.join(WEIGHTINGS)}")
    if how in ("ignore", "none") or bool((weights == 1).all()):
        return z
    w = weights.to(z)[..., None]
    if how == "comfy":
        if empty is None:
            raise ValueError("weighting=comfy: it needs the states of the empty prompt")
        base = empty.to(z).expand_as(z)
        return torch.where(w == 1, z, (z - base) * w + base)
    weighed = z * w
    if how == "no norm":
        return weighed
    before, after = z.mean(dim=(1, 2), keepdim=True), weighed.mean(dim=(1, 2), keepdim=True)
    return weighed * torch.where(after == 0, 1.0, before / after)


def join(z: Tensor, num_chunks: int) -> Tensor:
    """Chunks (B * num_chunks, L, D), those of one prompt together -> prompts (B, num_chunks * L, D)."""
    if num_chunks < 1 or len(z) % num_chunks:
        raise ValueError(f"num_chunks={num_chunks}: {len(z)} rows do not divide by it")
    return z.reshape(-1, num_chunks * z.shape[1], z.shape[2])


def pad_to(a: Tensor, b: Tensor, empty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Contexts (B, N, D) of equal length: the shorter one repeats its last vector.

    With `empty` (1, L, D) or (L, D), the states of an empty chunk, it is filled with those ("pad prompt/negative
    prompt" in A1111). ValueError: the lengths do not differ by whole chunks of L.
    """
    length = max(a.shape[1], b.shape[1])
    return _padded(a, length, empty), _padded(b, length, empty)


def _padded(z: Tensor, length: int, empty: Tensor | None) -> Tensor:
    missing = length - z.shape[1]
    if missing == 0:
        return z
    if empty is None:
        return torch.cat([z, z[:, -1:].expand(-1, missing, -1)], dim=1)
    if missing % empty.shape[-2]:
        raise ValueError(f"context={z.shape[1]}: {length} tokens are not reached by chunks of {empty.shape[-2]}")
    repeats = missing // empty.shape[-2]
    filler = empty.to(z).reshape(1, *empty.shape[-2:]).repeat(len(z), repeats, 1)
    return torch.cat([z, filler], dim=1)
