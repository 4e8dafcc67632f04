"""Files named by their content: results and uploaded pictures. A name is a SHA-256, never a path.

A file is there whole or not at all, also after a power cut. Knows no jobs.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

NAME = re.compile(r"[0-9a-f]{64}")


class Store:
    """The files of one folder, each `SHA-256 + suffix`."""

    def __init__(self, folder: Path, suffix: str = "") -> None:
        self.folder, self.suffix = folder, suffix
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes) -> str:
        """Keep a content; returns its name. One that is there already is as if it were new; one cut short is mended."""
        name = hashlib.sha256(content).hexdigest()
        path = self._path(name)
        if path.exists() and path.stat().st_size == len(content):
            os.utime(path)
            return name
        beside = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}.part"
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            _sync_folder(self.folder)
        finally:
            beside.unlink(missing_ok=True)
        return name

    def path(self, name: str) -> Path | None:
        """The file of a name; None where there is none, or where it is no SHA-256."""
        if not NAME.fullmatch(name):
            return None
        path = self._path(name)
        return path if path.is_file() else None

    def touch(self, name: str) -> None:
        """Keep a content as if it had been put now, if it is there."""
        path = self.path(name)
        if path is not None:
            os.utime(path)

    def remove(self, name: str) -> None:
        """Forget a content, if it is there."""
        if NAME.fullmatch(name):
            self._path(name).unlink(missing_ok=True)

    def older(self, seconds: float) -> Iterator[str]:
        """The names of the files that nobody has put for so long; half files of processes that died are removed."""
        before = time.time() - seconds
        for path in sorted(self.folder.iterdir()):
            if not path.is_file() or path.stat().st_mtime > before:
                continue
            if path.name.startswith(".") and path.name.endswith(".part"):
                path.unlink(missing_ok=True)
            elif NAME.fullmatch(path.name.removesuffix(self.suffix)):
                yield path.name.removesuffix(self.suffix)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"


def _sync_folder(folder: Path) -> None:
    """Make the renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
