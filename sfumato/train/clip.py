"""Objective of CLIP: pictures and captions of a batch find each other (Radford et al. 2021, figure 3).

The text tower that this trains is afterwards frozen and conditions the diffusion model. Knows no file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.clip import CLIP
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.train.data import CaptionedBatch, Examples
from sfumato.train.distributed import gather as gather_of_ranks

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
Gather = Callable[[Tensor], Tensor]


def caption_numbers(captions: Sequence[str]) -> Tensor:
    """A number a caption (B, 1) float64, equal for equal captions only, so that ranks can compare theirs."""
    digests = [hashlib.sha256(caption.encode()).digest()[:6] for caption in captions]  # 48 bits are exact in a double
    return torch.tensor([[float(int.from_bytes(digest, "big"))] for digest in digests], dtype=torch.float64)


def contrastive(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of rows and of columns: logits (B, B), `same` (B, B) true where picture i fits caption j.

    Every row's truth is spread evenly over what fits, so that two equal captions in a batch are no mistake
    (Yang et al. 2022, UniCL); where only the diagonal fits it is Radford et al.'s loss.
    """
    fits = same.to(logits.dtype)
    by_picture = F.cross_entropy(logits, fits / fits.sum(dim=1, keepdim=True))
    by_caption = F.cross_entropy(logits.T, (fits / fits.sum(dim=0)).T)
    return (by_picture + by_caption) / 2


class CLIPObjective:
    """Symmetric cross-entropy over the similarities of a batch; pictures and captions are matched both ways.

    `gather` joins the rows of all ranks, so that a picture is told from every caption of the whole batch. The
    temperature is learned; the log of its inverse is kept between 0 and log 100 as a parameter, so that it can come
    back from there (a clamp of its use alone would leave it without a gradient).
    """

    def __init__(self, network: CLIP, tokenizer: ClipTokenizer, gather: Gather = gather_of_ranks) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.max_length = network.config.text.max_length
        self.gather = gather

    def tokens(self, captions: list[str]) -> Tensor:
        """ids (B, L), L just long enough: the tower is causal, so what follows the end token cannot change it."""
        encoded = [self.tokenizer.encode(caption) for caption in captions]
        length = min(self.max_length, 2 + max(len(ids) for ids in encoded))
        return torch.tensor([self.tokenizer.pad(ids, length) for ids in encoded])

    def loss(self, batch: CaptionedBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all ranks' rows; `found` is the share of pictures whose likest caption is theirs."""
        size = self.network.config.vision.image_size
        if batch.pixels.shape[-1] != size:
            raise ValueError(f"data: pictures are {batch.pixels.shape[-1]} px wide, the image tower takes {size}")
        device = batch.pixels.device
        with torch.no_grad():
            self.network.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        text = self.gather(self.network.text_features(self.tokens(batch.captions).to(device)))
        image = self.gather(self.network.image_features(batch.pixels))
        numbers = self.gather(caption_numbers(batch.captions).to(device))
        same = numbers == numbers.T
        scale = self.network.logit_scale.exp()
        logits = scale * image @ text.T
        total = contrastive(logits, same)
        found = same.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()
        return total, {"contrastive": total, "found": found, "scale": scale}


class HardBatches:
    """Batches in which pictures come in lots of one group, so that what a group shares cannot tell them apart.

    `groups` has a key for each example, background and style for instance: the first example of every lot of `lot` is
    the one asked for, the rest of the lot are others of its group, drawn by the indices alone. Where a group is
    smaller than a lot, the examples that were asked for stay. ValueError where keys and examples differ in number.
    """

    def __init__(self, examples: Examples, groups: Sequence[Hashable], lot: int) -> None:
        if len(groups) != len(examples):
            raise ValueError(f"groups: {len(groups)} keys for {len(examples)} examples, one each is needed")
        if lot < 2:
            raise ValueError(f"lot={lot}: 2 or more are needed")
        self.examples, self.groups, self.lot = examples, groups, lot
        self._members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            self._members.setdefault(group, []).append(index)

    def __len__(self) -> int:
        return len(self.examples)

    def hardened(self, indices: Sequence[int]) -> list[int]:
        """The indices that a batch is made of where `indices` are asked for."""
        chance = np.random.default_rng(list(indices))
        chosen: list[int] = []
        for start in range(0, len(indices), self.lot):
            first, *rest = indices[start : start + self.lot]
            others = [index for index in self._members[self.groups[first]] if index != first]
            if len(others) >= len(rest):
                rest = [others[place] for place in chance.permutation(len(others))[: len(rest)]]
            chosen += [first, *rest]
        return chosen

    def batch(self, indices: Sequence[int]) -> Any:
        return self.examples.batch(self.hardened(indices))
