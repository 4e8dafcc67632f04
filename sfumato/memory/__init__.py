"""Memory on a device: a plan that fits a picture into it, said beforehand, and moving networks on and off."""

from __future__ import annotations

from sfumato.memory.moving import Offload, offload
from sfumato.memory.planning import GIB, Plan, apply, budget, describe, free_memory, plan

__all__ = ["GIB", "Offload", "Plan", "apply", "budget", "describe", "free_memory", "offload", "plan"]
