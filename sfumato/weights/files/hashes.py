"""The hashes that name a file of weights, and the cache that spares reading 4 GB again for one.

The cache is a convenience: where it cannot be read or written, hashes are computed, and nothing is said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from sfumato.weights.files.mapped import blamed_on, is_there

log = logging.getLogger(__name__)

SETTLED_SECONDS = 2  # a file written later than that ago may change again within the same tick of its clock
MAX_ENTRIES = 4096  # of the cache, the oldest go first


def sha256(path: str | Path) -> str:
    """The file's SHA-256, 64 hex digits; from the cache where path, size and time of change are the same."""
    path = Path(path)
    with blamed_on(path):
        is_there(path)
        name, before = str(path.resolve()), path.stat()
        entry = _entries().get(name)
        if entry and (entry["size"], entry["mtime_ns"]) == (before.st_size, before.st_mtime_ns):
            return entry["sha256"]
        digest = _digest(path)
        after = path.stat()
    unchanged = (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    if unchanged and time.time_ns() - after.st_mtime_ns > SETTLED_SECONDS * 10**9:
        _remember(name, {"size": after.st_size, "mtime_ns": after.st_mtime_ns, "sha256": digest})
    return digest


def file_hash(path: str | Path) -> str:
    """First 10 hex digits of the file's SHA-256: the model hash that A1111 writes into pictures."""
    return sha256(path)[:10]


def old_hash(path: str | Path) -> str:
    """A1111's former model hash: 8 hex digits of the SHA-256 of 64 KiB at 1 MiB, of what a shorter file has there."""
    path = Path(path)
    with blamed_on(path):
        is_there(path)
        with path.open("rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """$SFUMATO_CACHE, or sfumato/ in $XDG_CACHE_HOME, or in ~/.cache. OSError where there is no home."""
    if own := os.environ.get("SFUMATO_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # as its specification wants
        return base / "sfumato"
    try:
        return Path.home() / ".cache" / "sfumato"
    except RuntimeError as error:
        raise OSError("no home folder") from error


def _entries() -> dict[str, Any]:
    """The sound entries of the cache; none where it is missing or damaged."""
    try:
        entries = json.loads((cache_folder() / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {name: entry for name, entry in entries.items() if _is_sound(entry)}


def _is_sound(entry: Any) -> bool:
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    sound = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    return bool(sound) and {"size", "mtime_ns"} <= set(entry)


def _remember(name: str, entry: dict[str, Any]) -> None:
    """Add an entry: the whole cache is written beside, then renamed."""
    beside: Path | None = None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        entries = {other: kept for other, kept in _entries().items() if other != name} | {name: entry}
        text = json.dumps(dict(list(entries.items())[-MAX_ENTRIES:]), indent=1)
        with tempfile.NamedTemporaryFile("w", prefix=".hashes.", dir=folder, delete=False) as file:
            beside = Path(file.name)
            file.write(text)
        beside.replace(folder / "hashes.json")
    except OSError as error:
        log.debug("hash of %s not kept: %s", name, error)
        if beside:
            beside.unlink(missing_ok=True)
