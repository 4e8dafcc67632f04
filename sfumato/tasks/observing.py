"""Looking on while pictures are drawn: their way from noise, and where the words of the prompt look.

An observer is shown every run before it begins. Letters: H W pixels, h w latent size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from sfumato.diffusion.guidance import Looker, Looking
from sfumato.engine import Run
from sfumato.families import Model
from sfumato.families.conditioning import TextOptions, Word, chunks_of
from sfumato.images import resize
from sfumato.prompts.prompt import parse
from sfumato.tasks.previews import Preview, Recorder
from sfumato.tasks.profiles import find_profile
from sfumato.tasks.scenes import Scene, latent_shape, size_of
from sfumato.types import Job


class Film:
    """An observer that keeps previews of each picture's way, `most` of each scene at most."""

    def __init__(self, preview: Preview, every: int = 1, most: int = 64) -> None:
        self.preview, self.every, self.most = preview, every, most
        self._recorders: dict[int, list[tuple[Recorder, int, Scene]]] = defaultdict(list)

    def __call__(self, run: Run, scene: Scene, which: slice) -> None:
        """Record a run."""
        recorder = Recorder(self.preview, self.every, self.most)
        run.watch = recorder
        for row, picture in enumerate(range(which.start, which.stop)):
            self._recorders[scene.first + picture].append((recorder, row, scene))

    def frames(self, picture: int) -> list[np.ndarray]:
        """The way of a picture through all its scenes, each frame (H, W, 3) uint8 as the finished picture would be.

        Frames of scenes of different sizes have different sizes; none where nothing was drawn.
        """
        found = []
        for recorder, row, scene in self._recorders[picture]:
            height, width = size_of(scene.job)
            for frame in recorder.frames():
                found.append(scene.finished(resize(frame[row : row + 1], width, height, "bicubic"))[0])
        return found


class Where:
    """An observer that gathers where the words of the positive prompt look, in the last scene of each picture."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._lookers: dict[int, tuple[Looker, int, Scene]] = {}

    def __call__(self, run: Run, scene: Scene, which: slice) -> None:
        """Look on while a run draws."""
        height, width = latent_shape(scene.job, self.model)[1:]
        looker = Looker((height, width))
        run.guidance = Looking(run.guidance, looker)
        for row, picture in enumerate(range(which.start, which.stop)):
            self._lookers[scene.first + picture] = (looker, row, scene)

    def heat(self, picture: int, places: list[int]) -> np.ndarray | None:
        """How much the tokens at `places` look at each pixel of the finished picture: (H, W) float32 in [0, 1].

        0 where its last scene drew nothing; None where no scene was drawn at all.
        """
        if picture not in self._lookers:
            return None
        looker, row, scene = self._lookers[picture]
        return scene.placed(looker.heat(places, size_of(scene.job))[row].float().cpu().numpy())


def places_of(word: str, job: Job, model: Model, embeddings: Mapping[str, Word] | None = None) -> list[int]:
    """The tokens that a word, or words, of a job's prompt are, counted over all chunks with their start and end tokens.

    Where the prompt changes on the way, those of what it is first. ValueError where the word is not in it.
    """
    profile = find_profile(job.like)
    text = parse(job.prompt, int(job.steps or 1)).parts[0].timeline[0][1] if profile.grammar else job.prompt
    tokenizer, tower = model.tokenizers[0], model.family.texts[0]
    room = tower.config.max_length - 2
    options = TextOptions(job.weighting or profile.weighting, job.clip_skip, long=profile.long)
    wanted = tokenizer.encode(word)
    found: list[int] = []
    counts = {name: len(each.vectors[0]) for name, each in (embeddings or {}).items()}
    for number, chunk in enumerate(chunks_of(text, tokenizer, room, options, counts)):
        for place in chunk.places:
            if place.name.lower() == word.lower():
                first = number * tower.config.max_length + 1 + place.position
                found += range(first, first + counts[place.name])
        for start in range(len(chunk.ids) - len(wanted) + 1):
            if wanted and list(chunk.ids[start : start + len(wanted)]) == wanted:
                found += [number * tower.config.max_length + 1 + start + offset for offset in range(len(wanted))]
    if not found:
        raise ValueError(f"where={word!r}: it is not a word of the prompt {text!r}")
    return found
