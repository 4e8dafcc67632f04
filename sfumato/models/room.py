"""Memory that layers need for a moment, kept from one to the next: fresh pages from the system are slow.

Owns who has which piece of it and when it comes back. float32 on a CPU only. Knows nothing of what is computed there.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Room:
    """Memory for what a convolution needs for a moment, kept from one to the next: new pages are slow.

    For one thread at a time. A few pieces of a map, a map with zeros around it, what is kept for a backward pass, and
    weights' gradients.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A float32 tensor of this shape, its numbers left over; it is good until the name is taken again."""
        numbers = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < numbers:
            with torch.inference_mode(False):
                held = self._held[name] = torch.empty(numbers)
        return held[:numbers].view(shape)

    def lend(self, *shape: int) -> Tensor:
        """A float32 tensor of this shape for as long as anybody holds it or a view of it; then its memory comes back.

        Gradients, and what a backward pass needs, are freed and asked for in every step, as large every time.
        """
        free = self._free.setdefault(math.prod(shape), [])
        memory = free.pop() if free else np.empty(math.prod(shape), np.float32)
        lent = memory[:]  # the tensor holds this view, and nobody else does
        weakref.finalize(lent, free.append, memory).atexit = False
        with torch.inference_mode(False):
            return torch.from_numpy(lent).view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        return Room()

    def __reduce__(self) -> tuple[type[Room], tuple[Any, ...]]:
        return Room, ()
