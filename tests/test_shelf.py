"""The shelf of adapters: found by name, looked for anew only where a folder has changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sfumato.weights.shelf import SETTLED, Shelf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two LoRAs in a folder of their own, and one beside it."""
    for name in ("lora/ink.safetensors", "lora/deep/oil.pt", "loose.safetensors", "lora/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def settle(folder: Path) -> None:
    """Make all folders as old as their changes can be told from new ones."""
    for place in (folder, *(each for each in folder.rglob("*") if each.is_dir())):
        when = place.stat().st_mtime_ns - 2 * SETTLED
        os.utime(place, ns=(when, when))


def test_folders_are_walked_once_until_one_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = 0
    walk = os.walk

    def counted(*args: object, **named: object) -> object:
        nonlocal walks
        walks += 1
        return walk(*args, **named)

    monkeypatch.setattr(os, "walk", counted)
    settle(folder)
    shelf = Shelf([folder])
    assert sorted(shelf.files("lora")) == ["ink", "loose", "oil"] and sorted(shelf.files("hypernet")) == ["loose"]
    assert shelf.find("lora", "INK") == folder / "lora" / "ink.safetensors" and walks == 1
    (folder / "lora" / "deep" / "new.safetensors").write_bytes(b"")
    assert "new" in shelf.files("lora") and walks == 2
    (folder / "lora" / "deep" / "later.safetensors").write_bytes(b"")
    assert "later" in shelf.files("lora"), "what changed a moment ago is not taken for settled"
    settle(folder)
    shelf.files("lora")
    before = walks
    shelf.files("lora")
    assert walks == before
    (folder / "lora" / "ink.safetensors").unlink()
    assert "ink" not in shelf.files("lora")
    shutil.rmtree(folder / "lora" / "deep")
    assert sorted(shelf.files("lora")) == ["loose"]
