"""Objective of CLIP: pictures and captions of a batch find each other (Radford et al. 2021, figure 3).

The text tower that this trains is afterwards frozen and conditions the diffusion model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models.clip import CLIP
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.train.data import CaptionedBatch

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class CLIPObjective:
    """Symmetric cross-entropy over the similarities of a batch; pictures and captions are matched both ways."""

    def __init__(self, network: CLIP, tokenizer: ClipTokenizer) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.max_length = network.config.text.max_length

    def tokens(self, captions: list[str]) -> Tensor:
        """ids (B, L), L just long enough: the tower is causal, so what follows the end token cannot change it."""
        encoded = [self.tokenizer.encode(caption) for caption in captions]
        length = min(self.max_length, 2 + max(len(ids) for ids in encoded))
        return torch.tensor([self.tokenizer.pad(ids, length) for ids in encoded])

    def loss(self, batch: CaptionedBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        size = self.network.config.vision.image_size
        if batch.pixels.shape[-1] != size:
            raise ValueError(f"data: pictures are {batch.pixels.shape[-1]} px wide, the image tower takes {size}")
        text = self.network.text_features(self.tokens(batch.captions))
        image = self.network.image_features(batch.pixels)
        scale = self.network.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        logits = scale * image @ text.T
        truth = torch.arange(len(logits))
        total = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        found = (logits.argmax(dim=1) == truth).float().mean()
        return total, {"contrastive": total, "found": found, "scale": scale}
