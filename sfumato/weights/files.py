"""Named tensors on disk: reading and writing .safetensors, whole or not at all, and the hash that names a file.

Knows nothing of families or key layouts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside, then rename: the file is there whole or not at all. Tensors are stored contiguous."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(beside), dict(metadata))
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(f"{path}: not written ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def load_safetensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata; ValueError, naming the file, where it is missing or not safetensors."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"ckpt={str(path)!r}: {'a folder' if path.is_dir() else 'no such file'}")
    if path.suffix != ".safetensors":
        raise ValueError(f"ckpt={str(path)!r}: only .safetensors files can be loaded")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"ckpt={str(path)!r}: not a readable .safetensors file ({error})") from error


def file_hash(path: str | Path) -> str:
    """First 10 hex digits of the file's SHA-256: the model hash that A1111 writes into pictures."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:10]
