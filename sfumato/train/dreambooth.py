"""DreamBooth's prior preservation: pictures of the subject's class, which the model draws before it learns, in every
batch beside the subject's own.

Ruiz et al. 2023, section 3.3: loss = instance + weight * prior. What learns is the whole U-Net (tuning.py) or an
adapter (lora.py). Letters: B pictures of the subject in a batch, as many of the class.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from sfumato.families import Model
from sfumato.images import save_png
from sfumato.pipeline import Pipeline, recipe
from sfumato.train.diffusion import FramedBatch
from sfumato.train.distributed import Ranks
from sfumato.train.samples import resting
from sfumato.train.views import Encoded, joined
from sfumato.types import Job

log = logging.getLogger(__name__)

ALONE = Ranks()
CLASS = "class"  # the folder, in the run's own, of the pictures that are drawn


@dataclass(frozen=True)
class PriorConfig:
    """Pictures of the class: `count` in all, of `prompt`, which is their caption; the prior counts `weight` times."""

    prompt: str
    count: int = 100
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("class_prompt='': words for the subject's class are needed, as 'a photo of a dog'")
        if self.count < 1:
            raise ValueError(f"class_count={self.count}: 1 or more are needed")
        if not self.weight > 0:
            raise ValueError(f"prior_weight={self.weight}: above 0 is needed")


def draw_class(
    model: Model, config: PriorConfig, folder: Path, count: int, size: int, seed: int = 0, batch: int = 4,
    steps: int | None = None, ranks: Ranks = ALONE,
) -> list[Path]:  # fmt: skip
    """Draw the first `count` pictures of the class, `size` px square, from seed + 1, seed + 2, ...; returns all files.

    Those that are there stay: called again, it goes on. The model's own guidance and sampler; `steps` None: its own.
    Each of the `ranks` draws its share.
    """
    paths = [folder / f"{index:05}.png" for index in range(count)]
    own = range(ranks.rank, count, ranks.count)
    missing = [index for index in own if not paths[index].exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        log.info("%d of %d pictures of the class are drawn: %r", len(missing), len(own), config.prompt)
    pipeline = Pipeline(model)
    hidden = None if ranks.first else True
    with (
        resting(model.networks.values()),
        tqdm(total=len(missing), desc="class", unit="picture", disable=hidden) as bar,
    ):
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            jobs = [Job(config.prompt, width=size, height=size, steps=steps, seed=seed + 1 + index) for index in part]
            for index, result in zip(part, pipeline.draw_many(jobs), strict=True):
                save_png(paths[index], result.images[0], recipe(result, 0))
                bar.update()
    return paths


class Paired:
    """Batches of the subject's pictures followed by as many of the class; their shares make the loss of both."""

    def __init__(self, subject: Encoded, others: Encoded, weight: float) -> None:
        if subject.batch_size != others.batch_size:
            raise ValueError(f"batch_size={others.batch_size}: of the class, {subject.batch_size} of the subject")
        self.subject, self.others, self.weight = subject, others, weight
        self.batch_size = subject.batch_size

    def __len__(self) -> int:
        return len(self.subject)

    @property
    def keeps(self) -> bool:
        """Whether all latents stay in memory."""
        return self.subject.keeps and self.others.keeps

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """Even numbers are twice the subject's tickets, odd ones twice the class's and 1."""
        own, others = (part.indices_at(step, rank, ranks) for part in (self.subject, self.others))
        return [2 * ticket for ticket in own] + [2 * ticket + 1 for ticket in others]

    def batch(self, indices: Sequence[int]) -> FramedBatch:
        """Latents of both, the subject's first."""
        own = self.subject.batch([ticket // 2 for ticket in indices if ticket % 2 == 0])
        others = self.others.batch([ticket // 2 for ticket in indices if ticket % 2])
        return joined([_shared(own, 1.0), _shared(others, self.weight)])


def _shared(batch: FramedBatch, weight: float) -> FramedBatch:
    count = len(batch.mean)
    return replace(batch, shares=torch.full((count,), weight / count))
