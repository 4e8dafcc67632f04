"""What commands that draw can show beside the pictures: films of their way from noise, and where words look."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.cli.names import FORMATS, PREVIEWS
from sfumato.types import Job, Result

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.engine import Run
    from sfumato.families import Model
    from sfumato.families.conditioning import Word
    from sfumato.tasks.observing import Film, Where
    from sfumato.tasks.pictures import Pictures
    from sfumato.tasks.scenes import Scene

log = logging.getLogger(__name__)

STRIP = 12  # frames of a strip, spread over the way
FILMS = ("png", *(ending.removeprefix(".") for ending in FORMATS))


def add_seeing_flags(parser: argparse.ArgumentParser) -> None:
    """--film, --preview and --where."""
    add = parser.add_argument_group("seeing inside", "saved beside each picture, under its name").add_argument
    add("--film", choices=FILMS, help="the way from noise to picture: a strip (png), or moving (gif, webp)")
    add("--preview", choices=PREVIEWS, default="linear",
        help="films of latents as colours, by a tiny decoder, or the model's own (default: %(default)s)")  # fmt: skip
    add("--preview-decoder", metavar="FILE", help="the tiny decoder, such as taesd_decoder.safetensors")
    add("--where", action="append", default=[], metavar="WORD",
        help="where a word of the prompt looked (its cross-attention); may be repeated")  # fmt: skip


class Seeing:
    """What the flags ask to see of jobs that a model draws. `observe` is for Pipeline.draw; `save` comes after.

    ValueError where a word is not in a prompt, or what is wanted does not go with tiles.
    """

    def __init__(self, args: argparse.Namespace, model: Model, embeddings: Mapping[str, Word] | None = None) -> None:
        from sfumato.tasks.previews import previewer

        self.embeddings = embeddings
        self.model, self.words, self.kind = model, list(args.where), args.film
        self._preview = previewer(args.preview, model, args.preview_decoder) if args.film else None
        self._film: Film | None = None
        self._where: Where | None = None

    def check(self, job: Job, pictures: Pictures) -> None:
        """ValueError where a job cannot be looked into."""
        from sfumato.tasks.checks import complete
        from sfumato.tasks.observing import places_of

        if self.kind and (job.tile is not None or job.upscale is not None):
            raise ValueError(f"film={self.kind!r}: what is drawn in tiles has no film")
        if self.words and job.upscale is not None:
            raise ValueError(f"where={self.words[0]!r}: a picture drawn over in tiles has no single map")
        for word in self.words:
            places_of(word, complete(job, self.model.family, pictures.size(job)), self.model, self.embeddings)

    def begin(self) -> Any:
        """What is to be shown the runs of the next job; None where nothing is to be seen."""
        from sfumato.tasks.observing import Film, Where

        self._film = None if self._preview is None else Film(self._preview)
        self._where = Where(self.model) if self.words else None
        observers = [observer for observer in (self._film, self._where) if observer is not None]

        def observe(run: Run, scene: Scene, which: slice) -> None:
            for observer in observers:
                observer(run, scene, which)

        return observe if observers else None

    def save(self, result: Result, index: int, path: Path) -> None:
        """Write what was seen of picture `index`, saved at `path`, beside it; prints each path."""
        from sfumato.images import save_png
        from sfumato.images.fitting import fitted
        from sfumato.images.heat import heated
        from sfumato.tasks.observing import places_of

        image = result.images[index]
        if self._film is not None:
            self._save_film([*self._film.frames(index), image], path)
        for word in self.words:
            assert self._where is not None
            heat = self._where.heat(index, places_of(word, result.job, self.model, self.embeddings))
            if heat is None:
                log.warning("where %r: nothing was drawn, so no word looked anywhere", word)
                continue
            if heat.shape != image.shape[:2]:  # of the first of two passes
                heat = fitted(heat, image.shape[1], image.shape[0], "stretch", "bilinear")
            beside = path.with_name(f"{path.stem}-where-{_file_name(word)}.png")
            save_png(beside, np.concatenate([image, heated(image, heat)], axis=1))
            print(beside, flush=True)

    def _save_film(self, frames: list[np.ndarray], path: Path) -> None:
        from sfumato.images import save_png
        from sfumato.images.fitting import fitted
        from sfumato.images.moving import save_moving, strip

        height, width = frames[-1].shape[:2]
        frames = [fitted(frame, width, height, "stretch", "bicubic") for frame in frames]
        beside = path.with_name(f"{path.stem}-film.{self.kind}")
        if self.kind == "png":
            save_png(beside, strip(frames, STRIP))
        else:
            save_moving(beside, frames)
        print(beside, flush=True)


def _file_name(word: str) -> str:
    """A word as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in word)
