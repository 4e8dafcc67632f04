"""What a run will take, from one step that is measured and leaves no trace; and forward passes that keep less of it.

Knows no file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfumato.models.unet import Block
from sfumato.train.batches import on_device
from sfumato.train.config import LoopConfig
from sfumato.train.data import Examples, indices_of
from sfumato.train.logs import GIB, SavedActivations, memory_line
from sfumato.train.loop import DTYPES, Objective
from sfumato.train.state import State


@dataclass(frozen=True)
class Cost:
    """`prepare` seconds to read and encode the pictures of a batch, `learn` seconds of its loss and gradients.

    `num_bytes`: all networks, gradients, moments, averages, and what a forward pass keeps.
    """

    prepare: float
    learn: float
    num_bytes: int

    def seconds(self, steps: int, config: LoopConfig, pictures: int | None = None) -> float:
        """Of `steps` steps; `pictures` where each is encoded once alone (None: anew for each batch)."""
        batches = steps * config.accumulate
        anew = batches if pictures is None else min(batches, pictures / config.batch_size)
        return batches * self.learn + anew * self.prepare

    def line(self, steps: int, config: LoopConfig, pictures: int | None = None) -> str:
        """For people."""
        seconds = self.seconds(steps, config, pictures)
        spent = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
        return f"about {spent} for {steps} steps, {self.num_bytes / GIB:.1f} GiB"


def measure(
    objective: Objective, examples: Examples, config: LoopConfig, networks: nn.ModuleList, ranks: int = 1
) -> Cost:
    """One loss with its gradients on the run's first pictures; parameters and random numbers stay as they were.

    `networks` are all that lie in memory, those of the objective among them or not. Of `ranks` it is the first's step.
    """
    device = next(objective.network.parameters()).device
    state = State(nn.ModuleList([objective.network, networks]), config)
    saved = SavedActivations(state)
    half = DTYPES.get(config.precision)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        objective.network.train()
        began = time.perf_counter()
        batch = on_device(
            examples.batch(indices_of(examples, 0, config.batch_size * ranks, config.seed, 0, ranks)), device
        )
        ready = time.perf_counter()
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda value: value),
            torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None),
        ):
            loss, _ = objective.loss(batch, torch.Generator().manual_seed(config.seed))
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done = time.perf_counter()
    for parameter in state.parameters.values():
        parameter.grad = None
    own = memory_line(state)[1]  # parameters, moments and averages
    frozen = sum(p.numel() * p.element_size() for p in state.network.parameters() if not p.requires_grad)
    gradients = sum(p.numel() * p.element_size() for p in state.parameters.values())
    return Cost(ready - began, done - ready, own + frozen + gradients + saved.num_bytes)


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Inside, each block of a U-Net or ControlNet keeps its input alone and is computed again for its gradients.

    Chen et al. 2016: memory for activations falls to about a block's, a step takes about a third longer. The numbers
    are the same bits. What changes the blocks' forward passes must stay on until the gradients are there.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]

    def forward(block: Block, *args: object) -> object:
        if not torch.is_grad_enabled():
            return Block.forward(block, *args)  # type: ignore[arg-type]
        return checkpoint(Block.forward, block, *args, use_reentrant=False)

    try:
        for block in blocks:
            block.forward = MethodType(forward, block)  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
