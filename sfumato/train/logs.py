"""What a run tells: the bar, log.jsonl, TensorBoard where it is installed, the memory line, and a run's status.

Knows a run by its folder and by named numbers only.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sfumato.train.checkpoints import candidates, read_facts
from sfumato.train.guards import is_locked, lock_owner
from sfumato.train.state import State, local

log = logging.getLogger(__name__)

LOG = "log.jsonl"
LATE = 20  # lines whose losses a status averages
GIB = 2**30


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl that are whole; a killed process may leave half of one."""
    path = folder / LOG
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def cut_log(folder: Path, step: int) -> None:
    """Drop lines of steps that were done but not saved: they will be done again."""
    path = folder / LOG
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_log(folder) if line["step"] <= step]
    beside = path.with_name(f".{LOG}.part")
    beside.write_text("".join(kept), "utf-8")
    beside.replace(path)


class RunLog:
    """Bar and log files of one run; silent on all ranks but the first."""

    def __init__(self, folder: Path, steps: int, step: int, silent: bool = False) -> None:
        self.folder, self.steps, self.silent = folder, steps, silent
        self._bar = tqdm(
            total=steps, initial=step, desc=folder.name, unit="step", mininterval=5, disable=True if silent else None
        )
        self._board = None if silent else _tensorboard(folder)
        self._began, self._began_at, self._seen = time.perf_counter(), step, 0
        self._failed = False

    def step(self, examples: int) -> None:
        """A step over `examples` pictures of all ranks is done."""
        self._seen += examples
        self._bar.update()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line: figures of `step`, null where not finite, with `per_second` (examples) and `eta` (seconds).

        A disk that is full is told once, and no reason to end.
        """
        if self.silent:
            return
        spent = time.perf_counter() - self._began
        done = max(1, step - self._began_at)
        rate = {"per_second": round(self._seen / spent, 2), "eta": round(spent / done * (self.steps - step))}
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | rate | _writable(figures)) + "\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s); training goes on", LOG, error)
            self._failed = True
        if self._board is not None:
            for name, value in (rate | dict(figures)).items():
                self._board.add_scalar(name, value, step)
        shown = {"loss": f"{figures['loss']:.4f}"} if "loss" in figures else {}
        self._bar.set_postfix(shown | {"samples/s": f"{rate['per_second']:.1f}"}, refresh=False)

    def close(self) -> None:
        """End the bar; TensorBoard's file is flushed."""
        self._bar.close()
        if self._board is not None:
            self._board.close()


def _writable(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))


def memory_line(state: State) -> tuple[str, int]:
    """What this rank keeps through a step, as a line for people, and the bytes a checkpoint of it takes.

    Two moments of 4 bytes (adamw) or 1 byte a number, one of 4 bytes for Muon's matrices; activations are told after
    the first step.
    """
    own = sum(_bytes(p) for part in state.parts for p in part.parameters.values())
    frozen = sum(_bytes(p) for p in state.network.parameters()) - sum(_bytes(p) for p in state.parameters.values())
    moments = sum(_moments(part.optimizer) for part in state.parts)
    ema = sum(_bytes(value) for value in state.ema.values())
    shares = {"parameters": own + frozen, "gradients": own, "moments": moments, "EMA": ema}
    told = ", ".join(f"{name} {size / GIB:.3f}" for name, size in shares.items())
    return f"memory: {told}; together {sum(shares.values()) / GIB:.3f} GiB, and activations", own + moments + ema


def _moments(optimizer: torch.optim.Optimizer) -> int:
    each = 0.5 if type(optimizer).__name__ == "AdamW8bit" else 2
    groups = [(group["params"], 1 if group.get("orthogonal") else each) for group in optimizer.param_groups]
    return int(sum(share * _bytes(p) for parameters, share in groups for p in parameters))


def _bytes(value: Tensor) -> int:
    share = local(value)
    return share.numel() * share.element_size()


class SavedActivations:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once; parameters are left out."""

    def __init__(self, state: State) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in map(local, state.network.parameters())}
        self.num_bytes = 0

    def pack(self, value: Tensor) -> Tensor:
        """Count a tensor that is kept."""
        storage = value.untyped_storage() if value.layout == torch.strided and not _is_wrapper(value) else None
        if storage is not None and storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return value


def _is_wrapper(value: Tensor) -> bool:
    return type(value) not in (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Status:
    """A run as its folder shows it. loss: mean of the last 20 log lines; eta in seconds; checkpoint_age in seconds."""

    folder: Path
    step: int
    steps: int | None
    loss: float | None
    per_second: float | None
    eta: float | None
    skipped: int
    overflows: int
    checkpoint: str | None
    checkpoint_step: int | None
    checkpoint_age: float | None
    running: bool
    owner: dict[str, Any]


def status_of(folder: str | Path) -> Status:
    """Read a run's folder; ValueError where there is no run."""
    folder = Path(folder)
    lines, paths = read_log(folder), candidates(folder) if folder.is_dir() else []
    if not lines and not paths:
        raise ValueError(f"run={str(folder)!r}: no training run there (neither {LOG} nor a checkpoint)")
    facts: dict[str, str] = {}
    newest = None
    for path in paths:
        try:
            facts, newest = read_facts(path), path
            break
        except (ValueError, OSError) as error:
            log.warning("checkpoint %s cannot be read (%s)", path.name, error)
    last = lines[-1] if lines else {}
    counts = json.loads(facts.get("counts", "{}"))
    losses = [line["loss"] for line in lines[-LATE:] if isinstance(line.get("loss"), float)]
    saved = int(facts["step"]) if "step" in facts else None
    return Status(
        folder=folder,
        step=max(int(last.get("step", 0)), saved or 0),
        steps=json.loads(facts.get("config", "{}")).get("steps"),
        loss=sum(losses) / len(losses) if losses else None,
        per_second=last.get("per_second"),
        eta=last.get("eta"),
        skipped=max(int(last.get("skipped", 0)), counts.get("skipped", 0)),
        overflows=max(int(last.get("overflows", 0)), counts.get("overflows", 0)),
        checkpoint=newest.name if newest else None,
        checkpoint_step=saved,
        checkpoint_age=time.time() - newest.stat().st_mtime if newest else None,
        running=is_locked(folder),
        owner=lock_owner(folder),
    )
