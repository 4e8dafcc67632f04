"""Looks into built packages: `python -m docs_tools.package dist` tells files and bytes, and fails on what is amiss."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

MOST = {"wheel": 45_000_000, "source": 60_000_000}  # bytes; the box is 39 MB of them
NEEDED = (
    "sfumato/box.safetensors",
    "sfumato/py.typed",
    "sfumato/__init__.pyi",
    "sfumato/cli/main.py",
    "sfumato/kernels/winograd.cpp",
    "sfumato/kernels/vectors.h",
)
FORBIDDEN = ("tests/", "runs/", "data/", "outputs/", "docs_tools/", "recipes/", "__pycache__/")


def contents(path: Path) -> dict[str, int]:
    """Name -> bytes of the files in a wheel or a source archive, whose own folder is left out of the names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {each.filename: each.file_size for each in wheel.infolist() if not each.is_dir()}
    with tarfile.open(path) as source:
        return {each.name.partition("/")[2]: each.size for each in source.getmembers() if each.isfile()}


def problems(name: str, files: dict[str, int], size: int) -> list[str]:
    """What is wrong with a package of `size` bytes; its files as `contents` gives them."""
    kind = "wheel" if name.endswith(".whl") else "source"
    found = [f"{name}: {each} is missing" for each in NEEDED if each not in files]
    if not any(each.startswith("sfumato/models/") and each.endswith(".gz") for each in files):
        found.append(f"{name}: the tokenizer's vocabulary is missing")
    if not any("LICENSES/" in each for each in files):
        found.append(f"{name}: the licences of data and vocabulary are missing")
    if kind == "wheel":
        found += [f"{name}: {each} does not belong there" for each in files if each.startswith(FORBIDDEN)]
    if size > MOST[kind]:
        found.append(f"{name}: {size} bytes, {MOST[kind]} are allowed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Tell of every package in a folder; exit code 1 where something is amiss or there is none."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    packages = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    amiss = [] if packages else [f"{folder}: no package"]
    for path in packages:
        files, size = contents(path), path.stat().st_size
        largest = sorted(files, key=lambda name: files[name], reverse=True)[:3]
        print(f"{path.name}: {len(files)} files, {size / 1e6:.1f} MB; largest: {', '.join(largest)}")
        amiss += problems(path.name, files, size)
    print("\n".join(amiss) or "all is there, and nothing else")
    return 1 if amiss else 0


if __name__ == "__main__":
    raise SystemExit(main())
