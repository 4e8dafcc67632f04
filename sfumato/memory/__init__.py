"""Memory on a device: a plan that fits a picture into it, moving networks on and off, and files' pages handed back."""

from __future__ import annotations

from sfumato.memory.moving import Offload, offload
from sfumato.memory.planning import GIB, Plan, apply, budget, describe, free_memory, plan

__all__ = ["GIB", "Offload", "Plan", "apply", "budget", "describe", "free_memory", "offload", "plan"]
