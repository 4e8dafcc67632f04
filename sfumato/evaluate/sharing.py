"""Several processes at one folder's work: who makes which piece, by the system's locks, which end with their process.

One file holds the claims of a folder, a byte for each piece, so nothing is stale after a kill. Knows no pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: one process is alone
    fcntl = None  # type: ignore[assignment]

CLAIMS = ".claims"


class Claims:
    """The claims of a folder. Locks are the process's: its own threads do not shut one another out."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / CLAIMS).open("ab")

    def close(self) -> None:
        """Give up every claim."""
        self._file.close()

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
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, piece)
        except (BlockingIOError, PermissionError):  # either, by the system
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)
