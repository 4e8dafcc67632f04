"""Draw four pictures and save them with their recipes, so that `sfumato replay` draws them again.

python examples/draw.py [CHECKPOINT]
"""

from __future__ import annotations

import sys
from pathlib import Path

from sfumato import Pipeline
from sfumato.images import save_png
from sfumato.pipeline import recipe


def main(checkpoint: str | None = None, steps: int = 20) -> list[Path]:
    """Draw with a checkpoint, or with the box; returns where the pictures are."""
    pipe = Pipeline.from_pretrained(checkpoint)
    result = pipe("a red apple on a white background", count=4, seed=7, steps=steps)
    folder = Path("outputs/examples")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"apple-{seed}.png" for seed in result.seeds]
    for index, path in enumerate(paths):
        save_png(path, result.images[index], recipe(result, index))
        print(path)
    return paths


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
