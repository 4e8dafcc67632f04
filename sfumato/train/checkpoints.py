"""Checkpoints of a run's folder: written whole or not at all, the newest found, older ones kept, weights taken out.

`state.safetensors` is the newest of one process, `state-NNNNNN.safetensors` are older ones. Shards of many ranks are
folders `state-NNNNNN` of torch.distributed.checkpoint; any number of ranks reads either kind.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sfumato.train.config import LoopConfig, differences
from sfumato.train.distributed import Ranks
from sfumato.train.state import State
from sfumato.weights.files import load_safetensors, open_tensors, save_safetensors

log = logging.getLogger(__name__)

Stored = tuple[tuple[int, ...], torch.dtype]

NEWEST = "state.safetensors"
FACTS = "facts.json"


def candidates(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first; a file that cannot be read comes by the step in its name, if it has one."""
    found = [path for path in folder.glob("state-*") if re.fullmatch(r"state-\d+(\.safetensors)?", path.name)]
    numbered = sorted(found, key=lambda path: int(path.name[6:].split(".")[0]), reverse=True)
    newest = folder / NEWEST
    if not newest.exists():
        return numbered
    step = step_of(newest)
    later = [path for path in numbered if step is not None and path.is_dir() and int(path.name[6:]) > step]
    return [*later, newest, *(path for path in numbered if path not in later)]


def step_of(checkpoint: Path) -> int | None:
    """The step at which a checkpoint was written; None where it cannot be read."""
    try:
        return int(read_facts(checkpoint)["step"])
    except (ValueError, OSError, KeyError):
        return None


def read_facts(checkpoint: Path) -> dict[str, str]:
    """What is no tensor in a checkpoint; ValueError or OSError where it cannot be read."""
    if checkpoint.is_dir():
        return dict(json.loads((checkpoint / FACTS).read_text("utf-8")))
    with open_tensors(checkpoint) as file:
        return dict(file.metadata)


def _stored(checkpoint: Path) -> dict[str, Stored]:
    if checkpoint.is_dir():
        entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()}  # type: ignore[union-attr]
    with open_tensors(checkpoint) as file:
        return {name: (file.shape(name), file.dtype(name)) for name in file.names()}


def load_tensors(checkpoint: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a checkpoint of either kind, whole, and its facts; ValueError where it cannot be read."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return load_safetensors(checkpoint)
    stored = _stored(checkpoint)
    tensors: dict[str, Any] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    _fill(tensors, checkpoint, alone=True)
    return tensors, read_facts(checkpoint)


def _fill(tensors: dict[str, Any], shards: Path, alone: bool) -> None:
    """Read a folder of shards into tensors; all ranks together unless `alone`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        load(tensors, checkpoint_id=shards, no_dist=alone)


def ema_weights(path: str | Path) -> dict[str, Tensor]:
    """The averaged parameters in a checkpoint of `fit`, by the network's own names."""
    return _under("ema.", load_tensors(path)[0])


def model_weights(path: str | Path) -> dict[str, Tensor]:
    """The parameters themselves in a checkpoint of `fit`, not averaged, by the network's own names."""
    return _under("model.", load_tensors(path)[0])


def export_weights(path: str | Path, target: str | Path, full: bool = False, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint's weights as one .safetensors file without what only training needs.

    The averaged parameters by the network's own names; with `full` also those that are not averaged, all under
    `model.` and `ema.`. `dtype` None keeps float32.
    """
    tensors, facts = load_tensors(path)
    kept = {n: v for n, v in tensors.items() if n.startswith(("model.", "ema."))} if full else _under("ema.", tensors)
    metadata = {"step": facts["step"], "weights": "full" if full else "ema"}
    save_safetensors(target, {name: value.to(dtype) if dtype else value for name, value in kept.items()}, metadata)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class Checkpoints:
    """The checkpoints of one run. All ranks must call `save` and `resume`, and must see the same folder."""

    def __init__(self, folder: Path, config: LoopConfig, ranks: Ranks) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        for rest in self.folder.glob(".state*.part"):
            _remove(rest)

    def resume(self, state: State) -> Path | None:
        """Restore the newest checkpoint that can be read, and return it; None where there is none.

        ValueError in one line where it was made by another network, batch size or seed, or where none can be read.
        """
        paths = candidates(self.folder)
        for path in paths:
            try:
                stored, facts = _stored(path), read_facts(path)
                step = int(facts["step"])
            except (ValueError, OSError, KeyError) as error:
                log.warning("checkpoint %s cannot be read (%s); the one before is tried", path.name, error)
                continue
            state.check({name: shape for name, (shape, _) in stored.items()}, str(path))
            self._compare(facts, path)
            state.restore(self._tensors(path, state, stored), facts)
            log.info("resumed %s at step %d", self.folder, step)
            return path
        if paths:
            raise ValueError(f"folder={str(self.folder)!r}: none of its {len(paths)} checkpoints can be read")
        return None

    def _tensors(self, path: Path, state: State, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        if not path.is_dir():
            return load_safetensors(path)[0]
        tensors: dict[str, Any] = {}
        for name, (shape, dtype) in stored.items():
            owner = state.owner(name)
            if owner is not None and tuple(owner.shape) == shape:  # so that each rank only reads its share
                tensors[name] = torch.empty_like(owner, dtype=dtype)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
        _fill(tensors, path, alone=not dist.is_initialized())
        return tensors

    def _compare(self, facts: Mapping[str, str], path: Path) -> None:
        if "config" not in facts:  # weights that a run begins with
            return
        forbidden, told = differences(json.loads(facts["config"]), self.config, self.ranks.count)
        if forbidden:
            raise ValueError(f"checkpoint={str(path)!r}: {'; '.join(forbidden)}; keep it, or begin in another folder")
        if told and self.ranks.first:
            log.warning("resumed with another config: %s", "; ".join(told))

    def save(self, state: State) -> None:
        """Write a checkpoint beside, make it the newest, remove those that are too old.

        OSError on all ranks where that fails; the checkpoint before is then untouched.
        """
        if self.config.shard:
            self._save_shards(state)
        else:
            self.ranks.first_does(lambda: self._save_file(state))

    def _save_file(self, state: State) -> None:
        newest = self.folder / NEWEST
        step = step_of(newest) if self.config.keep and newest.exists() else None
        if step is not None:
            older = self.folder / f"state-{step:06}.safetensors"
            older.unlink(missing_ok=True)
            _second_name(newest, older)
        state.save(newest, self.config, self.ranks.count)
        _flush(self.folder)
        self._prune([path for path in candidates(self.folder) if path != newest][self.config.keep :])

    def _save_shards(self, state: State) -> None:
        final = self.folder / f"state-{state.step:06}"
        beside = self.folder / f".{final.name}.part"
        self.ranks.first_does(lambda: _remove(beside))
        try:
            save(state.tensors(), checkpoint_id=beside)
        except CheckpointException as error:
            causes = "; ".join(str(cause[0]) for cause in error.failures.values())
            raise OSError(f"{final}: not written ({causes})") from error
        self.ranks.first_does(lambda: self._finish_shards(state, beside, final))

    def _finish_shards(self, state: State, beside: Path, final: Path) -> None:
        with (beside / FACTS).open("w", encoding="utf-8") as file:
            json.dump(state.facts(self.config, self.ranks.count), file)
            file.flush()
            os.fsync(file.fileno())
        _flush(beside)
        _remove(final)
        beside.replace(final)
        _flush(self.folder)
        self._prune([path for path in candidates(self.folder) if path != final][self.config.keep :])

    def _prune(self, old: list[Path]) -> None:
        for path in old:
            if path.name != NEWEST:
                _remove(path)


def _remove(path: Path) -> None:
    """A file or folder; a folder loses its name first, so that half of one never looks whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if path.name.endswith(".part") else path.with_name(f".{path.name}.old.part")
    if hidden != path:
        path.replace(hidden)
    shutil.rmtree(hidden)


def _second_name(path: Path, other: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        other.hardlink_to(path)
    except OSError:
        beside = other.with_name(f".{other.name}.part")
        shutil.copyfile(path, beside)
        beside.replace(other)


def _flush(folder: Path) -> None:
    """Names in a folder reach the disk, too, where the system can be asked for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
