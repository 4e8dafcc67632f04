"""Guidance by a picture that the network sees beside x, and by words: InstructPix2Pix (Brooks et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sfumato.diffusion.guidance.classifier_free import Positive, Told, Weighted, blended, parts_of, told_at
from sfumato.diffusion.guidance.protocol import Moment, Reply
from sfumato.types import Answer, Cond


@dataclass(frozen=True)
class PictureGuided:
    """Brooks et al. 2023, equation 3: x0 = u + picture_scale (i - u) + scale (p - i).

    p sees the picture and the prompt, i the picture and the negative prompt, u the negative prompt and zeros.
    """

    positive: Positive
    negative: Told
    scale: float
    picture_scale: float

    def rows(self, at: Moment) -> Sequence[Cond]:
        negative = told_at(self.negative, at)
        if negative.concat is None:
            raise ValueError("negative: guidance by a picture needs one beside x")
        alone = replace(negative, concat=torch.zeros_like(negative.concat))
        return [*(told_at(part.told, at) for part in self._parts), negative, alone]

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer:
        *parts, seen, unseen = [reply.x0 for reply in replies]
        weights = [part.weight for part in self._parts]
        cond = blended([*weights, 1.0 - sum(weights)], [*parts, seen])
        x0 = unseen + self.picture_scale * (seen - unseen) + self.scale * (cond - seen)
        return Answer(x0, unseen, cond)

    @property
    def _parts(self) -> tuple[Weighted, ...]:
        return parts_of(self.positive)
