"""The one training loop: optimiser, warm-up, EMA, log, atomic checkpoints and exact resume.

An objective brings a network and a loss; data brings the batch of any step. Randomness of step k comes from
(seed, k), so a resumed run equals the run that never stopped, bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.train.data import Examples, indices_at
from sfumato.weights.files import load_safetensors, save_safetensors

log = logging.getLogger(__name__)


class Objective(Protocol):
    """What is trained: `network` holds the parameters; `loss` gives a scalar and figures to log."""

    @property
    def network(self) -> nn.Module: ...

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class LoopConfig:
    """Learning rate warms up linearly, then stays ("constant") or falls to a tenth along a cosine ("cosine")."""

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
    save_every: int = 200

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay={self.decay!r}: one of constant, cosine")
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay == "constant":
            return self.lr * warm
        done = min(1.0, step / max(1, self.steps))
        return self.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


class State:
    """Everything a run is made of at one step: parameters, their running average, the optimiser's moments."""

    def __init__(self, network: nn.Module, config: LoopConfig) -> None:
        self.step = 0
        self.network = network
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.ema_decay = config.ema_decay
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        plain = [p for p in self.parameters.values() if p.ndim < 2]  # norms and biases are not decayed
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def update_ema(self) -> None:
        """Exponential average with the warm-up (1 + k) / (10 + k), as the original LitEma."""
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)

    def save(self, path: Path, config: LoopConfig) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = self.ema[name]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        save_safetensors(path, tensors, {"step": str(self.step), "config": json.dumps(asdict(config))})

    def load(self, path: Path) -> None:
        """Restore a run; ValueError where the checkpoint's parameters are not this network's."""
        tensors, metadata = load_safetensors(path)
        stored = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
        if stored != set(self.parameters):
            odd = sorted(stored ^ set(self.parameters))
            raise ValueError(f"checkpoint={str(path)!r}: {len(odd)} parameters differ, first {odd[0]}")
        self.step = int(metadata["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
                moments = {
                    key: tensors[f"optimizer.{key}.{name}"].clone(memory_format=torch.preserve_format)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{key}.{name}" in tensors
                }
                if moments:
                    self.optimizer.state[parameter] = moments


def ema_weights(path: str | Path) -> dict[str, Tensor]:
    """The averaged parameters in a checkpoint of `fit`, by the network's own names."""
    tensors, _ = load_safetensors(path)
    return {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}


def fit(
    objective: Objective,
    examples: Examples,
    config: LoopConfig,
    folder: str | Path,
    on_save: Callable[[State], None] | None = None,
) -> State:
    """Train to step `config.steps`, from the folder's checkpoint if there is one.

    SIGINT (Ctrl-C) and SIGTERM end it after the step in progress: it saves, then raises KeyboardInterrupt. Writes
    `state.safetensors` and `log.jsonl` in the folder; `on_save` runs after each save (samples, exports).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "state.safetensors"
    network = objective.network.train()
    state = State(network, config)
    if checkpoint.exists():
        state.load(checkpoint)
        log.info("resumed %s at step %d", folder, state.step)
        _cut_log(folder / "log.jsonl", state.step)
    generator = torch.Generator()
    began, began_at = time.perf_counter(), state.step
    bar = tqdm(total=config.steps, initial=state.step, desc=folder.name, unit="step", mininterval=5)
    with _polite_stop() as stop, bar:
        while state.step < config.steps:
            figures = _train_step(objective, examples, config, state, generator)
            bar.update()
            if state.step % config.log_every == 0:
                rate = (state.step - began_at) * config.batch_size * config.accumulate / (time.perf_counter() - began)
                line = {"step": state.step, "lr": config.lr_at(state.step - 1), "per_second": round(rate, 2)} | figures
                with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix({key: f"{value:.4f}" for key, value in figures.items()}, refresh=False)
            if stop or state.step % config.save_every == 0 or state.step == config.steps:
                state.save(checkpoint, config)
                if stop:
                    log.warning("stopped at step %d; the same command goes on from there", state.step)
                    raise KeyboardInterrupt
                if on_save:
                    on_save(state)
                    network.train()
    return state


@contextmanager
def _polite_stop() -> Iterator[list[int]]:
    """A list that is empty until a signal asks to stop, so that no step is ever cut in two. A second signal raises."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cut_log(path: Path, step: int) -> None:
    """Drop lines of steps that were done but not saved: they will be done again."""
    if path.exists():
        lines = [line for line in path.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _train_step(
    objective: Objective, examples: Examples, config: LoopConfig, state: State, generator: torch.Generator
) -> dict[str, float]:
    totals: dict[str, float] = {}
    for part in range(config.accumulate):
        number = state.step * config.accumulate + part
        generator.manual_seed((config.seed << 32) + number)
        batch = examples.batch(indices_at(number, config.batch_size, len(examples), config.seed))
        loss, figures = objective.loss(batch, generator)
        (loss / config.accumulate).backward()
        for key, value in figures.items():
            totals[key] = totals.get(key, 0.0) + float(value.detach()) / config.accumulate
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr_at(state.step)
    norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), config.clip_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {state.step}: the gradient is not finite (loss {totals})")
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.update_ema()
    return totals | {"grad_norm": float(norm)}
