"""The pictures that a command begins from: files and folders that flags name, each with its mask."""

from __future__ import annotations

import argparse
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def images_of(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Every picture that --image names, with its mask; ValueError where there is none, or no mask of one."""
    if not args.images:
        raise ValueError("image: say what to begin from with --image PATH")
    for field, name in [*(("image", name) for name in args.images), ("mask", getattr(args, "mask", None))]:
        if name == "":
            raise ValueError(f"{field}='': the path of a picture is needed")
    found = []
    for name in args.images:
        paths = pictures_in(Path(name)) if Path(name).is_dir() else [Path(name)]
        for path in paths:
            mask = getattr(args, "mask", None)
            if mask is not None and Path(mask).is_dir():
                mask = str(_mask_beside(path, Path(mask)))
            found.append((str(path), mask))
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name, without those that are another's mask. ValueError where there are none."""
    every = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    stems = {path.stem for path in every}
    found = [path for path in every if not (path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in stems)]
    if not found:
        raise ValueError(f"image={str(folder)!r}: the folder holds no picture ({', '.join(SUFFIXES)})")
    return found


def _mask_beside(path: Path, folder: Path) -> Path:
    """The mask of a picture among a folder's; ValueError where there is none."""
    for stem in (f"{path.stem}_mask", path.stem):
        for suffix in SUFFIXES:
            mask = folder / f"{stem}{suffix}"
            if mask.is_file() and mask.resolve() != path.resolve():
                return mask
    raise ValueError(
        f"mask={str(folder)!r}: it holds no mask of {path.name}, which would be {path.stem}_mask.png or {path.stem}.png"
    )
