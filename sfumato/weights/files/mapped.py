"""The bytes of one file through a private memory map, and the tensors that lie in them. Knows no format.

Nothing is read before somebody looks at it. A tensor is a view of the map: writing into it copies the page and never
reaches the file. Letters: offsets and sizes in bytes, shapes and strides in elements.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path

import torch
from torch import Tensor

LARGEST = 2**63 - 1  # what an int64 of torch holds
MAX_DIMENSIONS = 64  # what torch's loops over elements and numpy can do


def short(value: object, limit: int = 80) -> str:
    """A foreign value for an error line: escaped and short. Never looks deep: `repr` of a nest could run for ever."""
    if isinstance(value, str | bytes):
        text = repr(value[:limit])
    elif isinstance(value, tuple | list):
        inner = [short(item, 20) if isinstance(item, str | int) else type(item).__name__ for item in value[:8]]
        text = f"[{', '.join(inner)}{', ...' if len(value) > 8 else ''}]"
    elif isinstance(value, int) and value.bit_length() > 99:
        text = "a huge number"
    elif value is None or isinstance(value, int | float | torch.dtype):
        text = repr(value)
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside into a ValueError of one line that begins with the file's name."""
    try:
        yield
    except (ValueError, OSError) as error:
        why = f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)
        raise ValueError(f"ckpt={str(path)!r}: {' '.join(why.split())[:170]}") from error


def is_there(path: Path) -> None:
    """ValueError where `path` is not a file with something in it."""
    if not path.is_file():
        raise ValueError("a folder" if path.is_dir() else "not a regular file" if path.exists() else "no such file")
    if not path.stat().st_size:
        raise ValueError("not a readable file of tensors (it is empty)")


def _private_map(file: int) -> mmap.mmap:
    """All of a file, copy-on-write. Linux refuses one larger than its memory, unless told that it will not be
    written to as a whole: MAP_NORESERVE."""
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    except OSError:
        if sys.platform != "linux":
            raise
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it since 3.13
        return mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


class Mapped:
    """A file mapped copy-on-write. The map lives as long as this object or any tensor that views it.

    A file that somebody cuts shorter meanwhile kills the process at the next look, as with every memory map:
    writers must write beside and rename.
    """

    def __init__(self, path: Path) -> None:
        is_there(path)
        self.path = path
        with path.open("rb") as file:
            self._map = _private_map(file.fileno())
        # Never closed by hand: torch.frombuffer keeps the map alive but does not lock it, so closing would pull the
        # pages away under living tensors.

    def __len__(self) -> int:
        return len(self._map)

    def read(self, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop), fewer where the file ends before."""
        return self._map[start:stop]

    def find(self, what: bytes, start: int, stop: int) -> int:
        """The first place of `what` within [start, stop), or -1."""
        return self._map.find(what, start, stop)

    def view(self, start: int, size: int) -> Tensor:
        """Bytes as a uint8 tensor (size,) on the map itself; size >= 1."""
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)

    def release(self, start: int, size: int) -> None:
        """Hand back the memory of the pages that lie wholly within `size` bytes from `start`."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = start + size
        last = len(self) if stop == len(self) else stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its first element lies and how the others follow. Holds no data."""

    source: Mapped = field(repr=False, compare=False)
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one."""
        return extent(self.shape, self.stride) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor as a view of the map; a copy only where the file has it off its item size's grid."""
        if not self.span:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.source.view(self.offset, self.span)
        if self.offset % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).as_strided(self.shape, self.stride)

    def release(self) -> None:
        """Hand its whole pages back. What was written into them is forgotten: the file's bytes come again."""
        self.source.release(self.offset, self.span)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    steps = accumulate((max(size, 1) for size in reversed(shape[1:])), mul, initial=1)
    return tuple(steps)[::-1] if shape else ()


def check_shape(shape: tuple[int, ...], itemsize: int) -> None:
    """ValueError where torch could not have a tensor of this shape, even an empty one."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    if prod(max(size, 1) for size in shape) * itemsize > LARGEST:
        raise ValueError(f"a tensor of shape {short(shape)} is too large for any machine")


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie from the first to the last one, both counted; 0 for an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
