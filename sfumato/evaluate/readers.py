"""What tells which option of an attribute a picture shows: CLIP by each option's texts, or a classifier by its classes.

A reader is as biased as what it was trained on: it counts what it takes pictures for. Knows no prompt and no file.
Letters: N pictures, K options of an attribute, T texts of an option, E width of embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.evaluate.features import Clip, Network
from sfumato.evaluate.resizing import resized

SCALE = 100.0  # 1 / temperature at which the published CLIPs' training ended, Radford et al. 2021, section 2.5
BATCH = 16
Options = Mapping[str, Any]  # of an attribute: option -> its texts or the numbers of its classes


class Reader(Protocol):
    """Pictures (H, W, 3) uint8 -> attribute -> (N, K) probabilities, K in the order of its options.

    `facts` say what it is: its name, and the hash of its weights where it has some.
    """

    facts: Mapping[str, str]

    def read(self, pictures: Sequence[np.ndarray]) -> Mapping[str, Tensor]: ...


class ZeroShot:
    """A CLIP with both towers; an option is the mean direction of its texts (Radford et al. 2021, section 3.1.4).

    `attributes` are attribute -> option -> texts. ValueError where the CLIP has no text tower or an option no text.
    """

    def __init__(self, network: Clip, attributes: Mapping[str, Options], resize: str = "clean") -> None:
        self.network, self.resize = network, resize
        self.facts: Mapping[str, str] = {"reader": network.name, "hash": network.hash, "resize": resize}
        self._directions = {
            name: torch.stack([self._direction(name, option, texts) for option, texts in options.items()])
            for name, options in attributes.items()
        }

    def _direction(self, attribute: str, option: str, texts: Any) -> Tensor:
        wanted = [texts] if isinstance(texts, str) else texts
        if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(text, str) and text for text in wanted):
            raise ValueError(f"attributes.{attribute}.{option}={texts!r}: one or more texts are needed for CLIP")
        return F.normalize(F.normalize(self.network.texts(list(wanted)), dim=-1).mean(0), dim=-1)

    def read(self, pictures: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        """Softmax over 100 times the cosines."""
        seen = F.normalize(_features(self.network, pictures, self.resize), dim=-1)
        return {name: (SCALE * seen @ texts.T).softmax(-1) for name, texts in self._directions.items()}


class Classes:
    """A network with class logits; an option is the sum of its classes' probabilities among those of all options.

    `attributes` are attribute -> option -> numbers of classes, from 0. ValueError where a number is no class's.
    """

    def __init__(self, network: Network, attributes: Mapping[str, Options], resize: str = "clean") -> None:
        if network.to_logits is None:
            raise ValueError(f"features={network.name!r}: it has no classes to read pictures by")
        self.network, self.to_logits, self.resize = network, network.to_logits, resize
        self.facts: Mapping[str, str] = {"reader": network.name, "hash": network.hash, "resize": resize}
        count = self._logits(torch.zeros(1, network.dim)).shape[1]
        self._classes = {
            name: [_numbers(name, option, numbers, count) for option, numbers in options.items()]
            for name, options in attributes.items()
        }

    @torch.inference_mode()
    def _logits(self, features: Tensor) -> Tensor:
        return self.to_logits(features.to(self.network.device)).float().cpu()

    def read(self, pictures: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        """Softmax over the classes that an attribute's options name, added up by option."""
        logits = self._logits(_features(self.network, pictures, self.resize))
        return {
            name: torch.stack([logits[:, numbers].logsumexp(-1) for numbers in options], -1).softmax(-1)
            for name, options in self._classes.items()
        }


def _numbers(attribute: str, option: str, numbers: Any, count: int) -> list[int]:
    wanted = [numbers] if isinstance(numbers, int) else numbers
    is_list = isinstance(wanted, Sequence) and not isinstance(wanted, str) and len(wanted) > 0
    if not is_list or not all(type(number) is int and 0 <= number < count for number in wanted):
        raise ValueError(
            f"attributes.{attribute}.{option}={numbers!r}: numbers of classes are needed, 0 to {count - 1}"
        )
    return list(wanted)


def _features(network: Network, pictures: Sequence[np.ndarray], resize: str) -> Tensor:
    """(N, D), some pictures at a time."""
    parts = [
        network(resized(pictures[start : start + BATCH], network.size, resize))
        for start in range(0, len(pictures), BATCH)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, network.dim)


def reader_of(network: Network, attributes: Mapping[str, Options], resize: str = "clean") -> Reader:
    """The reader that a network can be: zero-shot of a CLIP, by classes of any other."""
    return ZeroShot(network, attributes, resize) if isinstance(network, Clip) else Classes(network, attributes, resize)
