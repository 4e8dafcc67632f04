"""Pictures from a run in progress: a fixed set of prompts with fixed seeds, drawn through the pipeline.

What is drawn is what a user would get, with the averaged weights. Knows no loss and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from sfumato.families import Family, Model
from sfumato.images import grid, save_png
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.pipeline import Pipeline
from sfumato.train.state import State
from sfumato.types import Control, Job
from sfumato.weights.shelf import Shelf


@dataclass(frozen=True)
class Watched:
    """`count` pictures of every prompt, from the seeds `seed`, `seed` + 1, ...; None is the family's own.

    `controls` steer all of them.
    """

    prompts: tuple[str, ...]
    count: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    columns: int = 4
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: one or more are needed to watch a run by")
        for name in ("count", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: 1 or more is needed")


def live_model(family: Family, parts: Mapping[str, nn.Module], name: str) -> Model:
    """A model of networks that are in memory, by the names of `family.parts`; ValueError names a missing one.

    The networks stay the caller's: what changes in them changes in the model.
    """
    if missing := [part for part in family.parts if part not in parts]:
        raise ValueError(f"{missing[0]}: the family {family.name} needs this network to draw")
    first = next(parts["unet"].parameters())
    return Model(
        family=family,
        texts=tuple(parts[part] for part in family.text_parts),  # type: ignore[misc]
        unet=parts["unet"],  # type: ignore[arg-type]
        autoencoder=parts["autoencoder"],  # type: ignore[arg-type]
        tokenizers=tuple(ClipTokenizer(tower.config.vocab_size) for tower in family.texts),
        device=first.device,
        dtype=first.dtype,
        name=name,
        hasher=lambda: "",
    )


def draw(model: Model, watched: Watched, adapters: Shelf | None = None) -> np.ndarray:
    """The sheet of a set, (H, W, 3) uint8, prompts in order; the same for the same weights.

    `adapters` is where the names in prompts and controls are looked up.
    """
    jobs = [
        Job(
            prompt, seed=watched.seed, count=watched.count, steps=watched.steps, guidance=watched.guidance,
            sampler=watched.sampler, controls=watched.controls,
        )
        for prompt in watched.prompts
    ]  # fmt: skip
    with resting(model.networks.values()):
        pictures = [result.images for result in Pipeline(model, adapters=adapters).draw_many(jobs)]
    return grid(np.concatenate(pictures), watched.columns)


@contextmanager
def resting(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, networks are in evaluation; afterwards as they were."""
    modes = [(network, network.training) for network in networks]
    try:
        for network, _ in modes:
            network.eval()
        yield
    finally:
        for network, training in modes:
            network.train(training)


class Samples:
    """What a loop calls to draw: writes `samples-000000.png`, the step in six digits or more, into `folder`.

    `parts` are the live networks by the names of `family.parts`, those in training and those that rest. `around` puts
    on what is trained beside them while pictures are drawn, or writes it into `folder`, where names are looked up.
    """

    def __init__(
        self,
        family: Family,
        parts: Mapping[str, nn.Module],
        watched: Watched,
        folder: str | Path,
        around: Callable[[State], AbstractContextManager[object]] | None = None,
    ) -> None:
        self.family, self.parts, self.watched, self.folder = family, parts, watched, Path(folder)
        self.around = around or (lambda state: nullcontext())

    def __call__(self, state: State) -> None:
        """Draw with the state's averaged weights; the weights in training are the same before and after."""
        path = self.folder / f"samples-{state.step:06}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        model = live_model(self.family, self.parts, path.stem)
        with state.averaged() as network, resting([network]), self.around(state):
            save_png(path, draw(model, self.watched, Shelf([self.folder])))
