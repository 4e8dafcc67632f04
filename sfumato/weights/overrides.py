"""What a person said a file's family is, remembered for that file by its content: one entry a file, as JSON.

Kept in $SFUMATO_CONFIG, else $XDG_CONFIG_HOME/sfumato, else ~/.config/sfumato. A file that moves keeps its entry.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from sfumato.families import FAMILIES, Family
from sfumato.weights.files import sha256

log = logging.getLogger(__name__)


def _store() -> Path:
    if own := os.environ.get("SFUMATO_CONFIG"):
        return Path(own) / "families.json"
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "sfumato" / "families.json"


def _entries() -> dict[str, dict[str, str | int]]:
    """SHA-256 -> {"family", "size"}; empty where there is no readable store."""
    try:
        entries = json.loads(_store().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {key: value for key, value in entries.items() if isinstance(value, dict)} if isinstance(entries, dict) else {}
    )


def recall(path: Path) -> Family | None:
    """The family remembered for a file. Its content is hashed only where an entry has the file's size."""
    size = path.stat().st_size
    entries = {digest: entry for digest, entry in _entries().items() if entry.get("size") == size}
    if not entries:
        return None
    found = entries.get(sha256(path), {}).get("family")
    return FAMILIES.get(str(found))


def remember(path: Path, family: Family | None) -> None:
    """Remember a family for a file, or forget (None). Where the store cannot be written, a warning says so."""
    entries, store = _entries(), _store()
    digest = sha256(path)
    if family is None and digest not in entries:
        return
    entries.pop(digest, None)
    if family is not None:
        entries[digest] = {"family": family.name, "size": path.stat().st_size}
    beside = store.with_name(f".{store.name}.{os.getpid()}.part")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        beside.replace(store)
    except OSError as error:
        log.warning("%s: the family is not remembered (%s)", store, error.strerror)
    finally:
        beside.unlink(missing_ok=True)
