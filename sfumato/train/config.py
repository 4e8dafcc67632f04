"""What a training run is told: steps, batches, learning rates, precision, how often it writes. Knows no network.

A step takes `batch_size * accumulate * ranks` examples. Names follow torch where torch has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

DECAYS = ("constant", "cosine", "linear")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
FINAL = 0.1  # the share of the learning rate that is left at the end of a cosine or a line
LOWEST = {
    "steps": 0, "batch_size": 1, "warmup": 0, "accumulate": 1, "log_every": 1, "checkpoint_every": 1, "keep": 0,
    "sample_every": 0, "nan_patience": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class LoopConfig:
    """Learning rate warms up linearly, then stays ("constant") or falls to a tenth ("cosine", "linear").

    lr, critic_lr      highest learning rates, > 0; None: the critic learns at `lr`
    part_lr            and those of parameters whose names begin so, as {"text": 1e-6}; the longest beginning counts
    clip_norm          longest gradient; infinity: any
    accumulate         batches a step
    precision          of the forward pass; parameters, moments and averages are always float32
    optimizer          adamw, adamw8bit (Dettmers et al. 2022, needs bitsandbytes), or muon (Jordan et al. 2024), which
                       turns matrices and takes AdamW for the rest; not with `shard`
    checkpoint_every   steps between checkpoints, of which `keep` older ones stay beside the last
    sample_every       steps between calls of `on_sample`, which is also called at step 0; 0: never
    nan_patience       steps without a finite gradient, one after another, that end the run
    shard              parameters, gradients and moments lie in parts on the ranks (FSDP2)
    save_every         what checkpoint_every was called first
    """

    steps: int
    batch_size: int
    lr: float = 1e-4
    warmup: int = 100
    decay: str = "constant"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 20
    save_every: InitVar[int | None] = None
    checkpoint_every: int = 200
    keep: int = 1
    sample_every: int = 0
    precision: str = "fp32"
    optimizer: str = "adamw"
    compile: bool = False
    critic_lr: float | None = None
    nan_patience: int = 10
    shard: bool = False
    part_lr: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self, save_every: int | None) -> None:
        if save_every is not None:
            object.__setattr__(self, "checkpoint_every", save_every)
        for name, allowed in (("decay", DECAYS), ("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)}")
        if self.optimizer == "muon" and self.shard:
            raise ValueError("optimizer='muon': needs whole matrices, so not with shard; or take adamw")
        for name, lowest in LOWEST.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)!r}: {lowest} or more")
        for name in ("lr", "critic_lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r}: a number above 0")
        for name, value in self.part_lr.items():
            if not (name and value > 0 and math.isfinite(value)):
                raise ValueError(f"part_lr={dict(self.part_lr)!r}: names, and for each a number above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r}: from 0 up to, but without, 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = min(1.0, step / max(1, self.steps))
        if self.decay == "constant":
            return self.lr * warm
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.lr * warm * (FINAL + (1 - FINAL) * left)

    def critic_lr_at(self, step: int) -> float:
        """Learning rate of the critic, whose course is that of the network."""
        return self.lr_at(step) * (self.critic_lr or self.lr) / self.lr

    def share_of(self, name: str) -> float:
        """How much of the network's learning rate a parameter of this name has."""
        fitting = [start for start in self.part_lr if name.startswith(start)]
        return self.part_lr[max(fitting, key=len)] / self.lr if fitting else 1.0

    def examples_per_step(self, ranks: int) -> int:
        """Examples that `ranks` processes see together in one step."""
        return self.batch_size * self.accumulate * ranks


FREE = {"steps", "log_every", "checkpoint_every", "keep", "sample_every", "compile", "nan_patience", "shard"}
SHARED = {"batch_size", "accumulate"}  # only their product with the ranks counts
BINDING = ("seed", "optimizer")  # with these changed, it is another run


def differences(stored: Mapping[str, Any], config: LoopConfig, ranks: int) -> tuple[list[str], list[str]]:
    """What differs from the config a checkpoint was written with: (what forbids to resume, what is only told).

    `stored` is that config as a mapping, with `examples_per_step`; keys that it lacks are not compared.
    """
    now = asdict(config) | {"examples_per_step": config.examples_per_step(ranks), "betas": list(config.betas)}
    if stored.keys() >= SHARED:  # the first checkpoints of this program had one rank and did not say so
        stored = {"examples_per_step": stored["batch_size"] * stored["accumulate"]} | dict(stored)
    forbidden: list[str] = []
    told: list[str] = []
    for name in now:
        before = stored.get(name)
        if name not in stored or before == now[name] or name in FREE | SHARED:
            continue
        line = f"{name} was {before}, is {now[name]}"
        (forbidden if name in BINDING or name == "examples_per_step" else told).append(line)
    return forbidden, told
