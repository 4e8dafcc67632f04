"""Pictures as they leave a command: numbered files, each path printed, and the bar while they are drawn."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sfumato.types import Job, Result

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.pipeline import Pipeline
    from sfumato.tasks.together import Observe, Progress


def _next_number(folder: Path, pattern: str) -> int:
    """One above the highest number that a file of the folder has in the pattern's group."""
    numbers = [int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(pattern, path.name))]
    return max(numbers, default=-1) + 1


class Saver:
    """Writes pictures as samples/00000.png, 00001.png, ... and prints each path.

    Numbers go on above the highest there is; a name that another process took meanwhile is passed over.
    """

    def __init__(self, outdir: Path) -> None:
        self.outdir, self.samples = outdir, outdir / "samples"
        self._next: int | None = None  # the folder is looked through once
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            probe = self.samples / ".sfumato-probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"outdir={str(outdir)!r}: cannot be written ({error.strerror})") from error

    def picture(self, image: np.ndarray, made: dict[str, Any]) -> Path:
        """Save (H, W, 3) uint8 with what it says of itself; returns where."""
        if self._next is None:
            self._next = _next_number(self.samples, r"(\d{5,})\.png")
        path = self._save((self.samples / f"{n:05}.png" for n in count(self._next)), image, made)
        self._next = int(path.stem) + 1
        return path

    def grid(self, image: np.ndarray) -> None:
        """Save a grid of pictures, (H, W, 3) uint8."""
        number = _next_number(self.outdir, r"grid-(\d{4,})\.png")
        self._save((self.outdir / f"grid-{n:04}.png" for n in count(number)), image, None)

    def _save(self, names: Iterator[Path], image: np.ndarray, made: dict[str, Any] | None) -> Path:
        from sfumato.images import save_png

        for path in names:
            try:
                save_png(path, image, made, new=True)
            except FileExistsError:
                continue
            print(path, flush=True)
            return path
        raise AssertionError("there is always another name")


@contextmanager
def step_bar() -> Iterator[Progress]:
    """A progress bar of noise levels on the terminal, and what tells it how far a drawing is."""
    with tqdm(unit="step", leave=False, file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def draw_with_bar(pipeline: Pipeline, job: Job, observe: Observe | None = None) -> Result:
    """Draw a job under a progress bar."""
    with step_bar() as progress:
        return pipeline.draw(job, progress, observe=observe)
