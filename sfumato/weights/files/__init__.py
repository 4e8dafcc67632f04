"""Files of named tensors: reading them on demand, writing them whole or not at all, and the hashes that name them.

What a file is, its content decides, never its extension. Knows nothing of families or key layouts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfumato.weights.files.hashes import file_hash, old_hash, sha256
from sfumato.weights.files.mapped import Mapped, StoredTensor, blamed_on
from sfumato.weights.files.pickles import is_torch_file, named, read_root
from sfumato.weights.files.safetensors_header import is_safetensors, read_header, sort_metadata

__all__ = [
    "TensorFile",
    "file_hash",
    "load_safetensors",
    "old_hash",
    "open_tensors",
    "save_safetensors",
    "sha256",
]


class TensorFile:
    """Named tensors of one file, read on demand through a private (copy-on-write) memory map.

    `format` is "safetensors" or "pickle". `metadata` is the header's of the one, the plain scalars beside the weights
    (global_step, epoch, ...) of the other, as text.
    """

    def __init__(self, path: Path, format: str, tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> None:
        self.path = path
        self.format = format
        self.metadata = metadata
        self._tensors: dict[str, StoredTensor] | None = dict(tensors)

    def names(self) -> list[str]:
        """In the file's own order."""
        return list(self._open())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).dtype

    def read(self, name: str) -> Tensor:
        """A view of the map: nothing is copied or read until it is used, and writing to it never reaches the file.

        Only where a file has the data off its item size's grid (legacy pickles mostly), the tensor is a copy.
        """
        return self._stored(name).read()

    def release(self, name: str) -> None:
        """Hand the memory of a tensor back, but for the pages that it shares with its neighbours.

        Only for tensors that nobody views any more or that were never written: a view that lives on shows the file's
        bytes again, and what was written into it is lost. Does nothing where the platform cannot.
        """
        self._stored(name).release()

    def close(self) -> None:
        """Give the file up; tensors that were read stay good, the map goes with the last of them."""
        self._tensors = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> dict[str, StoredTensor]:
        if self._tensors is None:
            raise ValueError(f"ckpt={str(self.path)!r}: the file is closed")
        return self._tensors

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self._open()[name]
        except KeyError:
            raise ValueError(f"ckpt={str(self.path)!r}: there is no tensor {name!r}") from None


def open_tensors(path: str | Path) -> TensorFile:
    """Open a .safetensors or a torch file (.ckpt, .pt, .pth, .bin), by its content. Reads the table of contents only.

    A pickle is gone through without running anything of it. ValueError, naming the file, for what is missing,
    damaged, hostile or neither.
    """
    path = Path(path)
    with blamed_on(path):
        source = Mapped(path)
        head = source.read(0, 64)
        if is_safetensors(head):
            return TensorFile(path, "safetensors", *_header(source))
        if is_torch_file(head) and len(source) >= 8:
            return TensorFile(path, "pickle", *named(read_root(source)))
        raise ValueError(f"not a readable .safetensors or torch file ({_guess(head)})")


def _header(source: Mapped) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    try:
        return read_header(source)
    except ValueError as error:
        raise ValueError(f"not a readable .safetensors file: {error}") from error


def _guess(head: bytes) -> str:
    """What a file without tensors may be, to help a person whose download went wrong."""
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page: the download went wrong"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    return f"it begins with {head[:12]!r}"


def load_safetensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a .safetensors file and its metadata; ValueError, naming the file, where it is none."""
    path = Path(path)
    with blamed_on(path):
        source = Mapped(path)
        if not is_safetensors(head := source.read(0, 64)):
            raise ValueError(f"not a readable .safetensors file ({_guess(head)})")
        stored, metadata = _header(source)
    return {name: tensor.read().to(device) for name, tensor in stored.items()}, metadata


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside, then rename: the file is there whole or not at all. Tensors are stored contiguous, those that
    share memory each for itself. The file's mode is what the umask gives. Equal contents give equal bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        save_file(_apart(tensors), str(beside), dict(metadata) or None)
        beside.chmod(mode)
        with beside.open("r+b") as file:
            sort_metadata(file)
            os.fsync(file.fileno())
        beside.replace(path)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(f"{path}: not written ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, no two in the same memory, which the format cannot express."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if place in taken else whole
        taken.add(place)
    return apart
