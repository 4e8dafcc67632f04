"""Writing a .safetensors file tensor by tensor, whole or not at all, in little memory.

The format: 8 bytes with the header's length, the header in JSON, then the data without gaps. As its library does,
tensors are ordered by the size of their items, then by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sfumato.weights.lazy import Lazy

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write beside, then rename. `progress` is told the bytes of each tensor written. ValueError for odd dtypes."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, lazy in ordered:
        if lazy.dtype not in DTYPES:
            raise ValueError(f"the tensor {name} is {lazy.dtype}: .safetensors files have no such numbers")
        size = lazy.dtype.itemsize * torch.Size(lazy.shape).numel()
        header[name] = {"dtype": DTYPES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, lazy in ordered:
                tensor = lazy.read().to("cpu").contiguous()
                if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
                    raise RuntimeError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was announced")
                size = file.write(tensor.flatten().view(torch.uint8).numpy().data)
                del tensor
                lazy.release()
                if progress:
                    progress(size)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
