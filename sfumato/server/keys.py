"""API keys and what each allows. Only hashes are kept: whoever reads the file can call nothing with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sfumato.images.files import written_beside

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PREFIX = "sfm_"
MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """What one user may ask for: requests a minute, and of a job pixels of all pictures, steps, pictures.

    `waiting` is how many unfinished jobs there may be.
    """

    requests: int = 600
    pixels: int = 64 * 1024 * 1024
    steps: int = 200
    count: int = 64
    waiting: int = 1000


@dataclass(frozen=True)
class User:
    """Who asks."""

    name: str
    limits: Limits


class Keys:
    """The keys in a file, which is read again when it has changed. Without a file, or an empty one, nobody has any."""

    def __init__(self, path: Path, usual: Limits | None = None) -> None:
        self.path, self.usual = path, usual or Limits()
        self._stamp: tuple[int, int] | None = None
        self._users: dict[str, User] = {}
        self._lock = threading.Lock()

    def add(self, name: str, **limits: int | None) -> str:
        """Make a user's key, which nobody can read again; returns it. Limits of None are the usual ones."""
        if not NAME.fullmatch(name):
            raise ValueError(f"name={name!r}: letters, digits, dots and dashes are needed, 64 at most")
        kept = self._read()
        if name in kept:
            raise ValueError(f"name={name!r}: there is such a key; remove it first")
        said = {field: value for field, value in limits.items() if value is not None}
        _limits(self.usual, said)
        key = PREFIX + secrets.token_urlsafe(32)
        self._write({**kept, name: {"sha256": _hash(key), "limits": said}})
        return key

    def remove(self, name: str) -> None:
        """Let a user's key open nothing any more; ValueError where there is none."""
        kept = self._read()
        if name not in kept:
            raise ValueError(f"name={name!r}: there is no such key; there are {', '.join(kept) or 'none'}")
        self._write({other: entry for other, entry in kept.items() if other != name})

    def names(self) -> list[str]:
        """Who has a key."""
        return list(self._read())

    def user(self, key: str) -> User | None:
        """Whose key it is."""
        return self._fresh().get(_hash(key))

    @property
    def any(self) -> bool:
        """Whether there are keys, so that each request needs one."""
        return bool(self._fresh())

    def _fresh(self) -> dict[str, User]:
        with self._lock:
            stamp = _stamp(self.path)
            if stamp != self._stamp:
                kept = self._read()
                self._users = {
                    entry["sha256"]: User(name, _limits(self.usual, entry.get("limits", {})))
                    for name, entry in kept.items()
                }
                self._stamp = stamp
            return self._users

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if not all(isinstance(entry["sha256"], str) for entry in found.values()):
                raise TypeError
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"keys={str(self.path)!r}: not a file of keys") from error
        return found

    def _write(self, kept: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(self.path) as beside:
            beside.touch(mode=0o600)
            beside.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


class Meter:
    """Counts the requests of each user within the last minute."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def wait(self, user: User) -> float:
        """0 and one request more; or how many seconds are left until there may be one."""
        now = time.monotonic()
        with self._lock:
            times = self._times.setdefault(user.name, deque())
            while times and times[0] <= now - MINUTE:
                times.popleft()
            if len(times) >= user.limits.requests:
                return times[0] + MINUTE - now if times else MINUTE
            times.append(now)
            return 0.0


def _hash(key: str) -> str:
    """A key has 256 random bits, so that a plain hash of it cannot be turned back."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _limits(usual: Limits, said: dict[str, Any]) -> Limits:
    known = {field.name for field in fields(Limits)}
    for name, value in said.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number from 1 on is needed, for one of {', '.join(known)}")
    return replace(usual, **said)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - one call, whether it is there or not
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino
