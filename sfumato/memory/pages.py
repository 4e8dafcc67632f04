"""Handing a file's pages back to the system while networks rest: they come again from its cache when they are read.

Owns what the system says of pages, Linux alone (pagemap, madvise); elsewhere nothing is handed back. Whatever was
written to stays, whoever wrote it. Knows nothing of plans, files or the order in which networks work.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor, nn

# Of the kernel's Documentation/admin-guide/mm/pagemap.rst: 64 bits a page.
PRESENT, SWAPPED, OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))
PAGEMAP = Path("/proc/self/pagemap")


def hand_back(networks: Iterable[nn.Module]) -> int:
    """Take out of this process's memory what networks' weights view of files, unchanged; the bytes that were there.

    A tensor goes that is mapped from a file and of which no page was written to since, but for the pages that it
    shares with its neighbours. The numbers stay as they are: what is read again is mapped again, from the system's
    cache where it has room for the file. Nothing else may write to the weights meanwhile.
    """
    if not sys.platform.startswith("linux") or not PAGEMAP.exists():
        return 0
    library = ctypes.CDLL(None, use_errno=True)
    given = 0
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        for first, last in _ranges(networks):
            there = _present(pagemap, first, last)
            if there:
                address, size = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
                if library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED):
                    raise OSError(ctypes.get_errno(), f"madvise of {size} bytes of weights failed")
                given += there * mmap.PAGESIZE
    return given


def _ranges(networks: Iterable[nn.Module]) -> Iterator[tuple[int, int]]:
    """The first page that lies wholly in a weight of a CPU, and that after the last."""
    seen: set[int] = set()
    for network in networks:
        for tensor in chain(network.parameters(), network.buffers()):
            start = _start(tensor)
            if start is None or start in seen:
                continue
            seen.add(start)
            first = -(-start // mmap.PAGESIZE)
            last = (start + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE
            if last > first:
                yield first, last


def _start(tensor: Tensor) -> int | None:
    """The address of a tensor's first byte; None where it lies elsewhere than in this process, or with gaps."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    dense = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for step, size in dense:
        if size > 1 and step != expected:
            return None
        expected *= size
    return tensor.data_ptr()


def _present(pagemap: BinaryIO, first: int, last: int) -> int:
    """How many of the pages are here, if all of those that are belong to a file as they are; else 0."""
    pagemap.seek(8 * first)
    entries = np.frombuffer(pagemap.read(8 * (last - first)), dtype=np.uint64)
    if len(entries) != last - first:
        return 0
    here = (entries & PRESENT) != 0
    changed = (here & ((entries & OF_FILE) == 0)) | ((entries & SWAPPED) != 0)
    return 0 if changed.any() else int(here.sum())
