"""Where the files lie that prompts and jobs name beside the model: LoRAs, hypernetworks, embeddings, ControlNets.

A name is a file's name without its suffix, as in A1111; the usual folders of each kind are looked through first.
Opens no file.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
# The folders, in lower case, in which programs keep each kind.
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora", "loras", "lycoris"),
    "hypernet": ("hypernetworks", "hypernetwork", "hypernets"),
    "embedding": ("embeddings", "embedding", "textual_inversion"),
    "control": ("controlnet", "controlnets", "control", "t2i_adapter", "ipadapter", "ip_adapter"),
    "vision": ("clip_vision", "image_encoder", "image_encoders"),
}
USUAL = ("models", "embeddings")  # of the working directory, where nothing else is said
VARIABLE = "SFUMATO_ADAPTERS"
MOST = 100_000  # files looked at
SETTLED = 2 * 10**9  # ns, more than any file system's clock ticks


def usual_folders() -> list[Path]:
    """Those that the environment variable names, separated as PATH is; else `models` and `embeddings`, if there."""
    said = os.environ.get(VARIABLE)
    if said is not None:
        return [Path(part) for part in said.split(os.pathsep) if part]
    return [Path(name) for name in USUAL if Path(name).is_dir()]


class Shelf:
    """Files by kind and name under `folders`. With `paths` a name may also be the path of a file."""

    def __init__(self, folders: Sequence[str | Path] = (), paths: bool = True) -> None:
        self.folders = tuple(Path(folder) for folder in folders)
        self.paths = paths
        self._seen: tuple[list[tuple[Path, set[str]]], dict[Path, int | None]] | None = None
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"adapters={str(folder)!r}: no such folder")

    def files(self, kind: str) -> dict[str, Path]:
        """Name -> file of a kind: those of its own folders; then, but for embeddings, those of no kind's folder."""
        every = self._files()
        found = [path for path, kinds in every if kind in kinds]
        if kind != "embedding":
            found += [path for path, kinds in every if not kinds]
        names: dict[str, Path] = {}
        for path in found:
            names.setdefault(path.name if path.is_dir() else path.stem, path)
        return names

    def find(self, kind: str, name: str) -> Path:
        """The file of a name; ValueError, naming near ones, where there is none."""
        if self.paths and Path(name).exists() and (Path(name).suffix in SUFFIXES or Path(name).is_dir()):
            return Path(name)
        names = self.files(kind)
        if name in names:
            return names[name]
        folded = {each.lower(): path for each, path in names.items()}
        if name.lower() in folded:
            return folded[name.lower()]
        near = difflib.get_close_matches(name, names, n=3)
        if not self.folders:
            where = f"no folder of adapters is known ({VARIABLE}, --adapters)"
        else:
            where = f"there is none in {', '.join(map(str, self.folders))}"
        raise ValueError(f"{kind}={name!r}: {where}{f'; did you mean {near[0]!r}?' if near else ''}")

    def _files(self) -> list[tuple[Path, set[str]]]:
        """What `_walk` finds, kept until one of the folders changes."""
        seen = self._seen
        if seen is None or any(_stamp(folder) != stamp for folder, stamp in seen[1].items()):
            seen = self._seen = self._walk()
        return seen[0]

    def _walk(self) -> tuple[list[tuple[Path, set[str]]], dict[Path, int | None]]:
        """All files with a known suffix and diffusers' folders, in order, with the kinds whose folders they lie in.

        And when each folder last changed; None where that is too near for a later change to be told from it.
        """
        found: list[tuple[Path, set[str]]] = []
        stamps: dict[Path, int | None] = {}
        settled = time.time_ns() - SETTLED
        for folder in self.folders:
            for place, folders, files in os.walk(folder, followlinks=True):
                here = Path(place)
                stamp = _stamp(here)
                stamps[here] = stamp if stamp < settled else None
                kinds = _kinds((folder.absolute().name, *here.relative_to(folder).parts))
                if "config.json" in files:  # a diffusers folder is one thing
                    found.append((here, kinds))
                    folders.clear()
                    continue
                folders.sort()
                found += [(here / name, kinds) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES]
                if len(found) > MOST:
                    raise ValueError(f"adapters={str(folder)!r}: more than {MOST} files; name a smaller folder")
        return found, stamps


def _stamp(folder: Path) -> int:
    """When names in a folder last changed, ns; 0 where it is gone."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _kinds(parts: Sequence[str]) -> set[str]:
    """The kinds that folders of these names are for."""
    lower = {part.lower() for part in parts}
    return {kind for kind, names in FOLDERS.items() if not lower.isdisjoint(names)}
