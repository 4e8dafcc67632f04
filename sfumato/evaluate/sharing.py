"""Several processes at one folder's work: who makes which piece, by the system's locks, which end with their process.

One file holds the claims of a folder, a byte for each piece, so nothing is stale after a kill. A process opens it once,
as long as it has claims there: closing any handle of a file gives up all locks that the process has on it.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: one process is alone
    fcntl = None  # type: ignore[assignment]

CLAIMS = ".claims"

Place = tuple[int, int, int]  # a process, and the device and number of its folder


@dataclass
class _Handle:
    """A folder's open file: how many use it, and how often each piece is claimed."""

    file: IO[bytes]
    users: int = 0
    pieces: Counter[int] = field(default_factory=Counter)


_HANDLES: dict[Place, _Handle] = {}
_CHANGING = threading.Lock()


class Claims:
    """The claims of a folder. Locks are the process's: its own threads do not shut one another out."""

    def __init__(self, folder: Path) -> None:
        found = folder.stat()
        self._place: Place = (os.getpid(), found.st_dev, found.st_ino)
        with _CHANGING:
            if self._place not in _HANDLES:
                _HANDLES[self._place] = _Handle((folder / CLAIMS).open("ab"))
            self._handle = _HANDLES[self._place]
            self._handle.users += 1
        self._is_open = True

    def close(self) -> None:
        """Give up every claim that no other Claims of this folder and process has."""
        with _CHANGING:
            if not self._is_open:
                return
            self._is_open = False
            self._handle.users -= 1
            if not self._handle.users:
                del _HANDLES[self._place]
                self._handle.file.close()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def claimed(self, piece: int) -> Iterator[bool]:
        """Whether piece number `piece` is this process's until the end of the block; False: another makes it now."""
        if fcntl is None:
            yield True
            return
        if not self._claim(piece):
            yield False
            return
        try:
            yield True
        finally:
            self._let_go(piece)

    def _claim(self, piece: int) -> bool:
        with _CHANGING:
            try:
                fcntl.lockf(self._handle.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, piece)
            except (BlockingIOError, PermissionError):  # either, by the system
                return False
            self._handle.pieces[piece] += 1
            return True

    def _let_go(self, piece: int) -> None:
        with _CHANGING:
            self._handle.pieces[piece] -= 1
            if not self._handle.pieces[piece]:
                fcntl.lockf(self._handle.file, fcntl.LOCK_UN, 1, piece)
