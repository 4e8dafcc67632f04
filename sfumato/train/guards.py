"""What keeps a run from being lost: a folder that can be written, one run in it, whole steps, steps without NaN.

Knows no network. A lock is held by the process that has the file locked (it dies with it, kill -9 or not); of other
machines only the file's age tells, which `Lock.touch` keeps young.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sfumato.train.batches import write_batches

try:
    import fcntl
except ImportError:  # not on Windows; there only the file's age tells
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = "run.lock"
STALE_AFTER = 900.0  # seconds without a sign of life from another machine
TOUCH_EVERY = 60.0  # seconds


class NotFiniteError(ValueError, FloatingPointError):
    """Training came apart: too many steps in a row without a finite gradient."""


def writable(folder: Path, num_bytes: int) -> None:
    """Make a folder; ValueError in one line where nothing, or less than `num_bytes`, can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"folder={str(folder)!r}: cannot be written to ({error.strerror or error})") from error
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        need, there = num_bytes / 2**30, free / 2**30
        raise ValueError(
            f"folder={str(folder)!r}: a checkpoint takes {need:.2f} GiB, the disk has {there:.2f} GiB left"
        )


class Lock:
    """The right to train in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None
        self._touched = 0.0

    def take(self) -> None:
        """ValueError, naming the other run's process, where there is one. A dead one's lock is taken over."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            free = _locked(file)
            file.seek(0)
            owner = _owner(file.read())
            age = time.time() - self.path.stat().st_mtime
            if not free or (owner and _is_elsewhere(owner) and age < STALE_AFTER):
                who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
                last = f"last sign {age:.0f} s ago; if it is dead, remove {LOCK}"
                raise ValueError(f"folder={str(self.path.parent)!r}: {who} trains there already ({last})")
        except BaseException:
            file.close()
            raise
        if owner:
            log.warning("took over the folder of process %s on %s, which is gone", owner.get("pid"), owner.get("host"))
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self._file = file

    def touch(self) -> None:
        """Show other machines that this run is alive; at most once a minute."""
        if self._file is not None and time.monotonic() - self._touched > TOUCH_EVERY:
            self._touched = time.monotonic()
            os.utime(self.path)

    def release(self) -> None:
        """Give the folder up."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()  # and with it the system's lock
            self._file = None


def lock_owner(folder: Path) -> dict[str, Any]:
    """{pid, host} of the run that is, or was when it died, in a folder; empty where it ended well."""
    path = folder / LOCK
    return _owner(path.read_text("utf-8")) if path.exists() else {}


def is_locked(folder: Path) -> bool:
    """Whether a process, of this machine as far as can be told, trains in a folder now."""
    path = folder / LOCK
    if not path.exists():
        return False
    owner = lock_owner(folder)
    if owner and _is_elsewhere(owner):
        return time.time() - path.stat().st_mtime < STALE_AFTER
    with path.open("r", encoding="utf-8") as file:
        return not _locked(file)


def _owner(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_elsewhere(owner: Mapping[str, Any]) -> bool:
    return fcntl is None or owner.get("host") != socket.gethostname()


def _locked(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def polite_stop() -> Iterator[list[int]]:
    """A list that is empty until a signal asks to stop, so that no step is ever cut in two. A second signal raises."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_bad_step(
    folder: Path, step: int, rank: int, batches: Sequence[tuple[Sequence[int], Any]], figures: Mapping[str, float]
) -> Path | None:
    """Save the batches of a step that had no finite gradient; None, with a warning, where that fails."""
    path = folder / (f"bad-step-{step}.safetensors" if rank == 0 else f"bad-step-{step}-rank-{rank}.safetensors")
    try:
        write_batches(path, batches, {"step": step, "figures": dict(figures)})
    except OSError as error:
        log.warning("the batch of step %d could not be saved (%s)", step, error)
        return None
    return path
