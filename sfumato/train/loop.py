"""The one training loop: whole steps over any objective and any data, on one rank or many, resumed exactly.

An objective brings a network and a loss; data brings the batch of any number. Batch m = (step * accumulate + part) * n
+ r belongs to rank r of n, and its randomness comes from (seed, m): a resumed run equals the one that never stopped,
bit for bit, and n ranks equal one rank that accumulates n times as many batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.memory.allocator import keep_freed_memory
from sfumato.train.batches import on_device
from sfumato.train.checkpoints import Checkpoints, ema_weights, export_weights, model_weights
from sfumato.train.config import LoopConfig
from sfumato.train.data import Examples, Ordered, indices_at, indices_of
from sfumato.train.distributed import Ranks, average_whole, clip_gradients, joined, spread, syncing
from sfumato.train.guards import Lock, NotFiniteError, keep_bad_step, polite_stop, writable
from sfumato.train.logs import GIB, RunLog, SavedActivations, cut_log, memory_line
from sfumato.train.optimizers import SHARE, part_rates
from sfumato.train.state import Part, State

__all__ = ["LoopConfig", "Objective", "State", "ema_weights", "export_weights", "fit", "model_weights"]

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOWEST_SCALE = 1.0  # a float16 gradient that overflows even with this factor is a bad one


class Objective(Protocol):
    """What is trained: `network` holds the parameters; `loss` gives a scalar and figures to log.

    The generator is on the CPU. An objective may also have `critic` (a network or None) with `critic_loss(batch,
    generator)`, called after the network's backward pass and trained by an optimiser of its own; and
    `begin_step(step)`, called before the losses of each step; and `partial`, whether parameters may get no gradient.
    """

    @property
    def network(self) -> nn.Module: ...

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]: ...


def fit(
    objective: Objective,
    examples: Examples,
    config: LoopConfig,
    folder: str | Path,
    on_save: Callable[[State], None] | None = None,
    on_sample: Callable[[State], None] | None = None,
) -> State:
    """Train to step `config.steps`, from the folder's checkpoint if there is one.

    SIGINT (Ctrl-C) and SIGTERM end it after the step in progress: it saves, then raises KeyboardInterrupt. Writes
    checkpoints (checkpoints.py), `log.jsonl`, and `bad-step-N.safetensors` where a step had no finite gradient.
    `on_save` runs after each save, `on_sample` at step 0 and every `config.sample_every` steps; both on the first rank
    only, or with `config.shard` on all. ValueError in one line, before the first step, for what cannot work;
    NotFiniteError after `config.nan_patience` bad steps in a row; OSError where the last checkpoint cannot be written.
    """
    folder = Path(folder)
    if len(examples) < 1:
        raise ValueError("data: the set is empty")
    first = next(objective.network.parameters(), None)
    if first is None:
        raise ValueError("objective: its network has no parameters")
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(first.device, alone_too=config.shard))
        devices = [first.device] if first.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))  # dropout has no generator of its own: see _train_step
        lock = Lock(folder)
        stack.callback(lock.release)
        ranks.first_does(lambda: _claim(folder, lock))
        if ranks.first and config.examples_per_step(ranks.count) > len(examples):
            wanted = config.examples_per_step(ranks.count)
            log.warning("a step takes %d examples, the set has %d: they repeat within a step", wanted, len(examples))
        if first.device.type == "cpu":
            keep_freed_memory()
        run = _Run.begin(objective, examples, config, folder, ranks)
        stop = stack.enter_context(polite_stop())
        stack.callback(run.log.close)
        return _steps(run, lock, stop, on_save, on_sample)


def _claim(folder: Path, lock: Lock) -> None:
    writable(folder, 0)
    lock.take()


def _steps(
    run: _Run,
    lock: Lock,
    stop: list[int],
    on_save: Callable[[State], None] | None,
    on_sample: Callable[[State], None] | None,
) -> State:
    state, config = run.state, run.config
    here = run.ranks.first or config.shard
    if state.step == 0 and on_sample and here:
        _call(on_sample, state)
    while state.step < config.steps:
        figures, stopped = _train_step(run, stop)
        run.log.step(config.examples_per_step(run.ranks.count))
        if state.step % config.log_every == 0:
            figures = run.ranks.mean(figures)
            counts = {"skipped": state.skipped, "overflows": state.overflows}
            run.log.write(state.step, {"lr": config.lr_at(state.step - 1)} | figures | counts)
            lock.touch()
        last = stopped or state.step == config.steps
        if last or state.step % config.checkpoint_every == 0:
            saved = _save(run, last)
            if stopped:
                log.warning("stopped at step %d; the same command goes on from there", state.step)
                raise KeyboardInterrupt
            if saved and on_save and here:
                _call(on_save, state)
        if on_sample and here and config.sample_every and state.step % config.sample_every == 0:
            _call(on_sample, state)
    return state


def _call(callback: Callable[[State], None], state: State) -> None:
    callback(state)
    for part in state.parts:
        part.network.train()


def _save(run: _Run, last: bool) -> bool:
    """Whether a checkpoint was written. Only the last one must be: others are tried again at the next turn."""
    try:
        run.checkpoints.save(run.state)
    except OSError as error:
        if last:
            raise
        log.warning("step %d could not be saved, the checkpoint before stays (%s)", run.state.step, error)
        return False
    return True


@dataclass
class _Run:
    """What stays the same through a run, and the state, which does not."""

    objective: Any
    examples: Examples
    config: LoopConfig
    folder: Path
    ranks: Ranks
    device: torch.device
    state: State
    loss: nn.Module  # the objective's losses, spread over the ranks
    critic_loss: nn.Module | None
    checkpoints: Checkpoints
    log: RunLog
    generator: torch.Generator
    measured: bool = False

    @classmethod
    def begin(cls, objective: Any, examples: Examples, config: LoopConfig, folder: Path, ranks: Ranks) -> _Run:
        """Spread the networks, restore the newest checkpoint, tell what memory is needed."""
        network: nn.Module = objective.network.train()
        critic: nn.Module | None = getattr(objective, "critic", None)
        if config.compile:
            for module in (network, *network.children()):
                module.compile()
        loss = spread(network, objective.loss, ranks, config.shard, partial=getattr(objective, "partial", False))
        critic_loss = None if critic is None else spread(critic.train(), objective.critic_loss, ranks, shard=False)
        state = State(network, config, critic, averaged=ranks.first or config.shard)
        part_rates(state.optimizer, state.trained.parameters, config)
        checkpoints = Checkpoints(folder, config, ranks)
        ranks.first_does(checkpoints.sweep)
        checkpoints.resume(state)
        if any(ranks.any(state.step != ranks.mean({"step": float(state.step)})["step"])):
            raise ValueError(f"folder={str(folder)!r}: the ranks find different checkpoints; it must be one for all")
        line, num_bytes = memory_line(state)
        ranks.first_does(lambda: _prepare(folder, state.step, num_bytes * (ranks.count if config.shard else 1)))
        if ranks.first:
            log.info(line)
        run_log = RunLog(folder, config.steps, state.step, silent=not ranks.first)
        device = next(network.parameters()).device
        return cls(
            objective, examples, config, folder, ranks, device, state, loss, critic_loss, checkpoints, run_log,
            torch.Generator(),
        )  # fmt: skip


def _prepare(folder: Path, step: int, num_bytes: int) -> None:
    writable(folder, num_bytes)
    cut_log(folder, step)


def _indices(run: _Run, batch: int) -> list[int]:
    """This rank's examples of batch number `batch`: in their own order, if they have one."""
    config, ranks = run.config, run.ranks
    if isinstance(run.examples, Ordered):
        whole = config.batch_size * ranks.count
        return indices_of(run.examples, batch, whole, config.seed, ranks.rank, ranks.count)
    return indices_at(batch * ranks.count + ranks.rank, config.batch_size, len(run.examples), config.seed)


def _train_step(run: _Run, stop: list[int]) -> tuple[dict[str, float], bool]:
    """One step; its figures, and whether any rank was asked to stop."""
    config, state, ranks = run.config, run.state, run.ranks
    if hasattr(run.objective, "begin_step"):
        run.objective.begin_step(state.step)
    totals: dict[str, float] = {}
    batches = []
    before = [part.copy_buffers() for part in state.parts]
    for part in range(config.accumulate):
        number = (state.step * config.accumulate + part) * ranks.count + ranks.rank
        run.generator.manual_seed((config.seed << 32) + number)
        torch.manual_seed((config.seed << 32) + number)
        indices = _indices(run, state.step * config.accumulate + part)
        batch = on_device(run.examples.batch(indices), run.device)
        batches.append((indices, batch))
        for key, value in _backward(run, batch, part == config.accumulate - 1).items():
            totals[key] = totals.get(key, 0.0) + value / config.accumulate
    scale = state.scale.value if config.precision == "fp16" else 1.0
    norms = [_clip(part, config.clip_norm, scale) for part in state.parts]
    sound = math.isfinite(totals["loss"]) and math.isfinite(totals.get("critic_loss", 0.0))
    bad, infinite, asked = ranks.any(not sound, not all(map(math.isfinite, norms)), bool(stop))
    if bad or infinite:
        for network, values in zip(state.parts, before, strict=True):
            network.set_buffers(values)
        _skip(run, batches, totals, overflow=not bad and scale > LOWEST_SCALE)
    else:
        _update(state, config)
    stopped = asked if ranks.count > 1 else bool(stop)  # among ranks, what came since waits for the next step
    return totals | dict(zip(("grad_norm", "critic_grad_norm"), norms, strict=False)), stopped


def _backward(run: _Run, batch: Any, last: bool) -> dict[str, float]:
    """Gradients of one batch's losses are added to those that there are."""
    config, state = run.config, run.state
    scale = state.scale.value if config.precision == "fp16" else 1.0
    figures: dict[str, Tensor] = {}
    for name, module, other in (
        ("loss", run.loss, state.critic),
        ("critic_loss", run.critic_loss, state.trained),
    ):
        if module is None:
            continue
        with _frozen(other), syncing(module, last):
            with _measuring(run), _autocast(run):
                loss, told = module(batch, run.generator)
            if loss.requires_grad:  # a critic may wait for its first step
                (loss * scale / config.accumulate if scale != 1.0 else loss / config.accumulate).backward()
        if last:
            average_whole(module, run.ranks)
        figures |= {name: loss} | told
    return {key: float(value.detach()) for key, value in figures.items()}


@contextmanager
def _frozen(part: Part | None) -> Iterator[None]:
    """Around the loss of one network: the other one gets no gradients from it."""
    parameters = [] if part is None else list(part.parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _autocast(run: _Run) -> torch.autocast:
    half = DTYPES.get(run.config.precision)
    return torch.autocast(run.device.type, dtype=half or torch.bfloat16, enabled=half is not None)


@contextmanager
def _measuring(run: _Run) -> Iterator[None]:
    """Tell once, at the first step of a run, what its forward pass keeps."""
    if run.measured or run.config.compile:
        with nullcontext():
            yield
        return
    run.measured = True
    saved = SavedActivations(run.state)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda value: value):
        yield
    if run.ranks.first:
        log.info("memory: activations of a batch of %d %.3f GiB", run.config.batch_size, saved.num_bytes / GIB)


def _clip(part: Part, longest: float, scale: float) -> float:
    """The length of a network's gradient, which is at most `longest` afterwards."""
    gradients = part.gradients()
    if scale != 1.0 and gradients:
        torch._foreach_mul_(gradients, 1 / scale)
    return clip_gradients(part.parameters.values(), longest)


def _update(state: State, config: LoopConfig) -> None:
    """Take the step."""
    rates = (config.lr_at(state.step), config.critic_lr_at(state.step))
    for part, rate in zip(state.parts, rates, strict=False):
        for group in part.optimizer.param_groups:
            group["lr"] = rate * group.get(SHARE, 1.0)
        part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)
    if config.precision == "fp16":
        state.scale.update(overflow=False)
    state.skipped_in_row = 0
    state.step += 1
    state.update_ema()


def _skip(run: _Run, batches: list[Any], totals: dict[str, float], overflow: bool) -> None:
    """Leave everything as it is but the counts; NotFiniteError where this happened too often."""
    state, step = run.state, run.state.step
    for part in state.parts:
        part.optimizer.zero_grad(set_to_none=True)
    if run.config.precision == "fp16":
        state.scale.update(overflow=True)
    state.step += 1
    if overflow:
        state.overflows += 1
        return
    state.skipped += 1
    state.skipped_in_row += 1
    path = keep_bad_step(run.folder, step, run.ranks.rank, batches, totals)
    if run.ranks.first:
        log.warning("step %d skipped: its loss or gradient is not finite (batch in %s)", step, path)
    if state.skipped_in_row >= run.config.nan_patience:
        raise NotFiniteError(
            f"step {step}: loss or gradient not finite for {state.skipped_in_row} steps in a row; a lower learning rate"
            f" may help, or look at {path or 'the data'}"
        )
