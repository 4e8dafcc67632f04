"""Loaded models, kept while jobs use them: the same checkpoint is loaded once, and room is made before the next.

Knows nothing of jobs. Models are shared: whoever is given one must not move or change it.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfumato.families import Model
from sfumato.weights.checkpoint import load_model

Stamp = tuple[tuple[str, int, int], ...]  # (name, size, mtime in ns) of each file of a checkpoint
Key = tuple[Any, ...]


def stamp_of(path: Path) -> Stamp:
    """What changes when a checkpoint's file, or one of a folder's files, is written anew."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    told = [(each, each.stat()) for each in files]
    return tuple((str(each), stat.st_size, stat.st_mtime_ns) for each, stat in told)


class ModelCache:
    """At most `max_models` models, the longest unused leaving first; `load` is `load_model` unless a test says else.

    For any number of threads. A model that leaves is freed before the next is loaded, unless somebody still holds it;
    one model is loaded at a time, and those that are there can be had meanwhile.
    """

    def __init__(self, max_models: int = 1, load: Callable[..., Model] = load_model) -> None:
        if max_models < 1:
            raise ValueError(f"max_models={max_models}: 1 or more are needed")
        self.max_models = max_models
        self._load = load
        self._models: OrderedDict[Key, tuple[Stamp, Model]] = OrderedDict()
        self._lock = threading.Lock()  # held for moments, to look at _models
        self._loading = threading.Lock()  # held while one is loaded

    def get(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Model:
        """The model of a checkpoint, loaded where it is not there or its files have changed.

        `options` are those of `load_model`. Its ValueErrors pass through, and leave nothing behind.
        """
        path = Path(path).resolve()
        vae = options.get("vae")
        if vae is not None:
            options["vae"] = Path(vae).resolve()
        key = (path, torch.device(device), dtype, *sorted(options.items()))
        stamp = self._stamp(path) + (() if vae is None else self._stamp(options["vae"]))
        found = self._find(key, stamp)
        if found is not None:
            return found
        with self._loading:
            found = self._find(key, stamp)  # another thread may have loaded it meanwhile
            if found is not None:
                return found
            self._make_room()
            model = self._load(path, device, dtype, **options)
            with self._lock:
                self._models[key] = (stamp, model)
            return model

    def clear(self) -> None:
        """Let go of all models."""
        with self._lock:
            self._models.clear()
        _collect()

    def __len__(self) -> int:
        return len(self._models)

    @staticmethod
    def _stamp(path: Path) -> Stamp:
        try:
            return stamp_of(path)
        except OSError:
            return ()  # loading it says what is wrong

    def _find(self, key: Key, stamp: Stamp) -> Model | None:
        with self._lock:
            there = self._models.get(key)
            if there is None:
                return None
            if there[0] != stamp:
                del self._models[key]
                return None
            self._models.move_to_end(key)
            return there[1]

    def _make_room(self) -> None:
        with self._lock:
            while len(self._models) >= self.max_models:
                self._models.popitem(last=False)
        _collect()


def _collect() -> None:
    """Free what nobody holds now: networks hold themselves through their hooks until the collector comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
