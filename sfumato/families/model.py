"""A Model: the loaded networks of one family, with what is needed to run them. Data, no behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sfumato.families.family import Family
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet


@dataclass(frozen=True)
class Model:
    """A family's loaded networks; `name` is the file's, `dtype` is what the networks compute in.

    `hasher` reads the file's hash when it is first asked for: a large file takes seconds; `reader` tells the facts.
    """

    family: Family
    texts: tuple[CLIPText, ...]
    unet: UNet
    autoencoder: Autoencoder
    tokenizers: tuple[ClipTokenizer, ...]
    device: torch.device
    dtype: torch.dtype
    name: str
    hasher: Callable[[], str]
    reader: Callable[[], dict[str, Any]] = dict

    @cached_property
    def hash(self) -> str:
        """The first ten digits of the file's SHA-256, as A1111 writes them into pictures."""
        return self.hasher()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """How the file was read where a person asked for it: "family", "ema", "variant", and of the file that the
        autoencoder is from instead "vae", its "name" and "hash"."""
        return self.reader()

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by their names in `family.parts`."""
        texts = dict(zip(self.family.text_parts, self.texts, strict=True))
        return {"unet": self.unet, "autoencoder": self.autoencoder, **texts}
