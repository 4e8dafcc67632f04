"""How often each watermark is read after a picture was changed, and how far it is from the unmarked one.

`python benchmarks/watermark_survival.py [--pictures DIR]` prints a table and writes JSON to benchmarks/results/. The
pictures are squares cut evenly from the photographs of a folder; without one, from those that scikit-image carries.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.evaluate.quality import psnr
from sfumato.images import read_picture
from sfumato.safety import dwtdct, strong
from sfumato.safety.marks import METHODS, TEXT, Mark, marked

RESULTS = Path(__file__).parent / "results"
DATA = TEXT.encode()
# Photographs of scikit-image 0.26; its drawings, its text and its single-coloured textures are told apart.
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg",
               "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
               "brick.png", "grass.png", "gravel.png")  # fmt: skip


def as_jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    """A JPEG of a quality, chroma at half its size."""

    def change(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    return change


def resized(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """Another size, bicubic."""

    def change(pixels: np.ndarray) -> np.ndarray:
        size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    return change


def turned(degrees: float) -> Callable[[np.ndarray], np.ndarray]:
    """Turned about the middle, bicubic, of the same size; the corners black."""
    return lambda pixels: np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC))


def cut(pixels: np.ndarray) -> np.ndarray:
    """A tenth less of either side, more of it at the left and the top."""
    height, width = pixels.shape[:2]
    top, left = round(height * 0.07), round(width * 0.06)
    return pixels[top : top + round(height * 0.9), left : left + round(width * 0.9)]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda pixels: pixels,
    "JPEG 90": as_jpeg(90),
    "JPEG 50": as_jpeg(50),
    "half size": resized(0.5),
    "twice the size": resized(2),
    "cut by 10 %": cut,
    "turned by 1 degree": turned(1),
    "turned by 5 degrees": turned(5),
    "turned by 15 degrees": turned(15),
}


def squares(folder: Path, names: tuple[str, ...] | None, count: int, side: int) -> list[tuple[str, np.ndarray]]:
    """`count` squares by name, cut from the pictures of a folder, one of each in turn."""
    paths = [folder / name for name in names] if names else sorted(folder.iterdir())
    pools = []
    for path in paths:
        pixels = read_picture(path).pixels
        tops = range(0, pixels.shape[0] - side + 1, side // 2)
        lefts = range(0, pixels.shape[1] - side + 1, side // 2)
        pools.append([(f"{path.name} {y} {x}", pixels[y : y + side, x : x + side]) for y in tops for x in lefts])
    longest = max(len(pool) for pool in pools)
    dealt = [pool[at] for at in range(longest) for pool in pools if at < len(pool)]
    if len(dealt) < count:
        raise SystemExit(f"pictures: {len(dealt)} squares of {side} px are there, {count} are needed")
    return dealt[:count]


def is_read(method: str, pixels: np.ndarray) -> bool:
    """Whether the whole text is read; what is too small to be read is not."""
    if method == "strong":
        return strong.read(pixels, len(DATA)) == DATA
    return pixels.shape[0] * pixels.shape[1] >= dwtdct.SMALLEST and dwtdct.read(pixels, len(DATA)) == DATA


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="a folder of photographs")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--side", type=int, default=300, help="px (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder, names = args.pictures, None
    if folder is None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise SystemExit("pictures: name a folder with --pictures, or install scikit-image")
        folder, names = Path(spec.origin).parent / "data", PHOTOGRAPHS
    pictures = squares(folder, names, args.count, args.side)
    read: dict[tuple[str, str], int] = defaultdict(int)
    decibels: dict[str, list[float]] = defaultdict(list)
    lost: dict[str, list[str]] = defaultdict(list)
    unmarked = dict.fromkeys(METHODS, 0)
    began = time.perf_counter()
    for name, pixels in pictures:
        for method in METHODS:
            unmarked[method] += is_read(method, pixels)
            changed = marked(pixels, Mark(TEXT, method))
            decibels[method].append(psnr(changed, pixels))
            for what, change in CHANGES.items():
                good = is_read(method, change(changed))
                read[method, what] += good
                if what == "none" and not good:
                    lost[method].append(name)
    rows = {what: {method: round(read[method, what] / len(pictures), 4) for method in METHODS} for what in CHANGES}
    found = {
        "pictures": len(pictures), "side": args.side, "text": TEXT, "read": rows,
        "unmarked but read": unmarked,
        "psnr mean": {method: round(float(np.mean(decibels[method])), 2) for method in METHODS},
        "psnr least": {method: round(float(np.min(decibels[method])), 2) for method in METHODS},
        "not read without a change": dict(lost), "seconds": round(time.perf_counter() - began, 1),
        "machine": platform.machine(), "date": date.today().isoformat(),
    }  # fmt: skip
    print(f"{'':22}" + "".join(f"{method:>10}" for method in METHODS))
    for what, row in rows.items():
        print(f"{what:22}" + "".join(f"{row[method]:10.0%}" for method in METHODS))
    print(f"{'PSNR, mean':22}" + "".join(f"{found['psnr mean'][method]:10.2f}" for method in METHODS))
    out = args.out or RESULTS / f"watermark_survival-{date.today().isoformat()}.json"
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
