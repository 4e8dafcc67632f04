"""What is inside a batch, whatever its class: its tensors, moved to a device or written to a file.

A batch is a tensor, or a dataclass, mapping or sequence of batches and plain values.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.weights.files import save_safetensors


def on_device(batch: Any, device: torch.device) -> Any:
    """The same batch with every tensor on `device`."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{name: on_device(value, device) for name, value in _fields(batch)})
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(on_device(value, device) for value in batch)
    return batch


def _fields(batch: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch) if field.init]


def contents(batch: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    """(dotted name, tensor or plain value) of everything in a batch."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = dict(_fields(batch))
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from contents(value, f"{name}.{key}")
    elif isinstance(batch, Sequence) and any(isinstance(value, Tensor) for value in batch):
        for place, value in enumerate(batch):
            yield from contents(value, f"{name}.{place}")
    else:
        yield name, batch


def write_batches(path: Path, batches: Sequence[tuple[Sequence[int], Any]], facts: Mapping[str, Any]) -> None:
    """Batches with the indices of their examples as one .safetensors file; what is no tensor goes into its metadata.

    Batch k has `k.indices` and its tensors under `k.`. OSError where the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, str] = {name: json.dumps(value, default=str) for name, value in facts.items()}
    for number, (indices, batch) in enumerate(batches):
        tensors[f"{number}.indices"] = torch.tensor(list(indices), dtype=torch.int64)
        for name, value in contents(batch, str(number)):
            if isinstance(value, Tensor):
                tensors[name] = value.detach().cpu()
            else:
                plain[name] = json.dumps(value, default=str, ensure_ascii=False)
    save_safetensors(path, tensors, plain)
