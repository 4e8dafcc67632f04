"""Memory on a device: a plan that fits a picture into it, moving networks on and off, and files' pages handed back."""

from __future__ import annotations

from sfumato.memory.bounds import MAX_PICTURES, MAX_ROWS, Bounds, bounds_of
from sfumato.memory.moving import Offload, offload
from sfumato.memory.planning import GIB, Plan, apply, budget, describe, free_memory, plan

__all__ = [
    "GIB",
    "MAX_PICTURES",
    "MAX_ROWS",
    "Bounds",
    "Offload",
    "Plan",
    "apply",
    "bounds_of",
    "budget",
    "describe",
    "free_memory",
    "offload",
    "plan",
]
