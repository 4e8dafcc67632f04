"""The latent as a compressed picture, against JPEG and WebP at the same number of bytes.

`python benchmarks/latent_codec.py` prints a table and writes JSON to benchmarks/results/. The pictures are of the set
that the box was trained on, evenly chosen: each alone at 64 px, where a JPEG's tables alone are longer than our files,
and all in one sheet, where they do not count. Of JPEG and WebP the quality is taken whose file is nearest in size.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

import sfumato
from sfumato.evaluate.quality import psnr, ssim
from sfumato.families import Model
from sfumato.images import grid, to_uint8
from sfumato.tasks.latent_file import compress, expand
from sfumato.train.data import CaptionedShards
from sfumato.weights.checkpoint import load_model

ALONE, SIDE = 8, 4  # pictures measured alone; a sheet is SIDE x SIDE of them
QUALITIES = (0, 20, 40, 60)
REFINED, REFINED_AT = 25, 40  # steps of refinement, and the one quality that is measured with it, for it is slow
BOX = Path(sfumato.__file__).parent / "box.safetensors"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A codec's means over pictures: bytes of whole files, PSNR in dB, SSIM."""

    case: str
    codec: str
    bytes: float
    psnr: float
    ssim: float


def saved(picture: np.ndarray, **options: Any) -> bytes:
    """A file of Pillow's."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **options)
    return file.getvalue()


def ladder(picture: np.ndarray, codec: str) -> list[bytes]:
    """The picture's files at every quality of JPEG or WebP."""
    every: dict[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 6}}
    options = every[codec]
    return [saved(picture, format=codec, quality=quality, **options) for quality in range(1, 101)]


def nearest(files: Sequence[bytes], size: int) -> bytes:
    """The file whose number of bytes is nearest to `size`."""
    return min(files, key=lambda data: abs(len(data) - size))


def measured(
    case: str, codec: str, files: Sequence[bytes], read: Callable[[bytes], np.ndarray], pictures: np.ndarray
) -> Row:
    """Means over the pictures of what their files give back."""
    back = [read(data) for data in files]
    pairs = list(zip(back, pictures, strict=True))
    return Row(
        case,
        codec,
        float(np.mean([len(data) for data in files])),
        float(np.mean([psnr(one, other) for one, other in pairs])),
        float(np.mean([ssim(one, other) for one, other in pairs])),
    )


def opened(data: bytes) -> np.ndarray:
    """The pixels of a file that Pillow knows."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def compare(name: str, pictures: np.ndarray, model: Model, refine: int) -> list[Row]:
    """Our rows at every quality, each with those of the others at the nearest size."""
    ladders = {codec: [ladder(picture, codec) for picture in pictures] for codec in ("jpeg", "webp")}
    rows = []
    for quality in QUALITIES:
        case = f"{name}, quality {quality}"
        ours = [compress(picture, model, quality) for picture in pictures]
        rows.append(measured(case, "latent", ours, lambda data: expand(data, model), pictures))
        if refine and quality == REFINED_AT:
            better = [compress(picture, model, quality, refine) for picture in pictures]
            rows.append(measured(case, "latent, refined", better, lambda data: expand(data, model), pictures))
        for codec, all_files in ladders.items():
            files = [nearest(rungs, len(mine)) for rungs, mine in zip(all_files, ours, strict=True)]
            rows.append(measured(case, codec, files, opened, pictures))
    return rows


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/common64"), help="the folder of the box's pictures")
    parser.add_argument("--pictures", type=int, default=ALONE, help="how many are measured alone")
    parser.add_argument("--refine", type=int, default=REFINED, help="steps of refinement, 0 leaves it out")
    options = parser.parse_args()
    model, data = load_model(BOX), CaptionedShards([options.data], 64)
    places = np.linspace(0, len(data) - 1, max(options.pictures, SIDE**2)).astype(int).tolist()
    pictures = to_uint8(data.batch(places).pixels)
    alone = pictures[:: len(pictures) // options.pictures][: options.pictures]
    sheet = grid(pictures[:: len(pictures) // SIDE**2][: SIDE**2], SIDE, gap=0)
    began = time.perf_counter()
    rows = compare("64 px", alone, model, options.refine)
    rows += compare(f"sheet of {sheet.shape[1]} px", sheet[None], model, 0)
    for row in rows:
        print(f"{row.case:28} {row.codec:16} {row.bytes:8.0f} B   {row.psnr:6.2f} dB   SSIM {row.ssim:.3f}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"latent-codec-{date.today().isoformat()}.json"
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }
    told = {"model": model.hash, "pictures": options.pictures, "refine": options.refine}
    seconds = round(time.perf_counter() - began, 1)
    found = {"machine": machine, **told, "seconds": seconds, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
