"""A Model: the loaded networks of one family, with what is needed to run them. Data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfumato.families.family import Family
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet


@dataclass(frozen=True)
class Model:
    """A family's loaded networks; `name` and `hash` are the file's, `dtype` is what the networks compute in."""

    family: Family
    text: CLIPText
    unet: UNet
    autoencoder: Autoencoder
    tokenizer: ClipTokenizer
    device: torch.device
    dtype: torch.dtype
    name: str
    hash: str

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")
