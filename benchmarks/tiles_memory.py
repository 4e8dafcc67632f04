"""Peak memory as the picture grows: img2img whole, in tiles, and "SD upscale", each in a process of its own.

    python benchmarks/tiles_memory.py [--sizes 512 1024 2048 4096] [--ckpt PATH] [--tile 256]

For every way and size: the process's peak beyond what it holds once the model is loaded and has drawn one small
picture, in MiB (Linux counts it anew from there), and the seconds. Whole pictures only up to --whole px: attention
grows with the fourth power of the side. The result goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "results"
WAYS = ("whole", "tiles", "upscale")
STEPS = 2


def measured(way: str, size: int, ckpt: str | None, tile: int) -> dict[str, float]:
    """One way at one size, in this process: MiB beyond what was there before, and seconds."""
    import numpy as np
    from PIL import Image

    from sfumato.pipeline import Pipeline
    from sfumato.types import Job

    pipe = Pipeline.from_pretrained(ckpt)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        side = size // 4 if way == "upscale" else size
        steps = np.arange(side, dtype=np.uint8)
        texture = (
            steps[:, None, None] * np.uint8(3) + steps[None, :, None] * np.uint8(5) + np.array([0, 80, 160], np.uint8)
        )
        Image.fromarray(texture).save(path)
        first = Path(folder) / "first.png"
        Image.fromarray(texture[:tile, :tile]).save(first)
        del texture
        common = Job("a texture", steps=STEPS, sampler="euler", strength=1.0, guidance=3.0)
        fields: dict[str, dict[str, Any]] = {
            "whole": {},
            "tiles": {"tile": tile},
            "upscale": {"upscale": 4.0, "width": tile, "height": tile},
        }
        job = Job(**{**vars(common), **fields[way]})
        small: dict[str, Any] = {"image": str(first), "width": tile, "height": tile, "upscale": None, "tile": None}
        pipe.draw(Job(**{**vars(job), **small}))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, began = memory("VmRSS"), time.perf_counter()
        result = pipe.draw(Job(**{**vars(job), "image": str(path)}))
        assert result.images.shape[1:] == (size, size, 3)
        seconds = time.perf_counter() - began
        return {"MiB": round((memory("VmHWM") - before) / 1024, 1), "seconds": round(seconds, 1)}


def memory(name: str) -> int:
    """What the kernel says of this process's memory, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def main() -> int:
    """Measure every way at every size; print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--ckpt")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--whole", type=int, default=1024)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one[0], int(args.one[1]), args.ckpt, args.tile)))
        return 0
    found: dict[str, dict[str, dict[str, float] | str]] = {way: {} for way in WAYS}
    for size in args.sizes:
        for way in WAYS:
            if way == "whole" and size > args.whole:
                continue
            command = [sys.executable, __file__, "--one", way, str(size), "--tile", str(args.tile)]
            done = subprocess.run(
                [*command, *(["--ckpt", args.ckpt] if args.ckpt else [])], capture_output=True, text=True
            )
            said = done.stdout.strip().splitlines()
            error = (done.stderr.strip().splitlines() or ["killed"])[-1]
            found[way][str(size)] = json.loads(said[-1]) if done.returncode == 0 else error[-160:]
            print(f"{way:8} {size:5} px  {found[way][str(size)]}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"tiles-memory-{date.today()}.json"
    machine = {"machine": platform.machine(), "python": platform.python_version(), "tile": args.tile, "steps": STEPS}
    out.write_text(json.dumps({**machine, "ckpt": args.ckpt or "the box", "ways": found}, indent=1) + "\n")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
