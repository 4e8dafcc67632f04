"""Textual inversion: a new word of a frozen model is learned from a few pictures (Gal et al. 2022).

Only the word's vectors get gradients, through the frozen U-Net and the frozen text encoders. Letters: n vectors, D
width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.train.conditions import check_trainable, objective_of, predicting, rest, text_states
from sfumato.train.data import LatentBatch
from sfumato.train.diffusion import DiffusionConfig, Texts
from sfumato.train.state import State
from sfumato.weights.embeddings import Embedding

NAME = re.compile(r"[\w.<>-]+(?: [\w.<>-]+)*")
WORD = "{name}"  # in templates
SUBJECT = (
    "{name}", "a photo of {name}", "a picture that shows {name}", "{name} seen from close by", "{name} in full view",
    "one {name} and nothing else", "{name} in the middle of the picture", "{name} in daylight", "{name} indoors",
    "{name} on a plain ground", "a sharp picture of {name}", "a dark picture of {name}", "a small picture of {name}",
    "a look at {name}", "here is {name}", "my {name}", "the {name}", "this is {name}",
)  # fmt: skip
STYLE = (
    "in the style of {name}", "a painting by {name}", "a picture in the manner of {name}", "a drawing as {name} does",
    "a landscape by {name}", "a portrait by {name}", "a sketch in the style of {name}", "{name} style",
    "a scene as {name} would paint it", "a detail of a work by {name}", "a quiet picture by {name}",
    "a colourful work in the style of {name}", "a dark work in the style of {name}", "an early work by {name}",
)  # fmt: skip
TEMPLATES = {"subject": SUBJECT, "style": STYLE}


@dataclass(frozen=True)
class InversionConfig:
    """The word `name` of `num_vectors` vectors (0: as many as `initial` has tokens), which begin as those of `initial`.

    Prompts are drawn from `templates`, in which "{name}" stands for the word; with the probability `caption_prob` a
    picture's own caption follows, where it has one.
    """

    name: str
    initial: str = "thing"
    num_vectors: int = 0
    templates: tuple[str, ...] = SUBJECT
    caption_prob: float = 0.0

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or not any(map(str.isalnum, self.name)):
            raise ValueError(f"name={self.name!r}: letters, digits and . _ - < > are allowed, and single blanks within")
        if self.num_vectors < 0:
            raise ValueError(f"num_vectors={self.num_vectors}: 0 or more is needed")
        if not self.templates or not all(WORD in template for template in self.templates):
            raise ValueError(f"templates: one or more are needed, each with {WORD} in it")
        if not 0 <= self.caption_prob <= 1:
            raise ValueError(f"caption_prob={self.caption_prob}: from 0 to 1 is allowed")


class Words(nn.Module):
    """What is learned: for each text encoder the word's vectors (n, D), float32."""

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(nn.Parameter(each.detach().float().clone()) for each in vectors)


class InversionObjective:
    """`network` holds the word's vectors; the loss is the model's own, of prompts that name the word."""

    def __init__(self, model: Model, config: InversionConfig, network: Words, diffusion: DiffusionConfig) -> None:
        self.model, self.config, self.network = model, config, network
        self._inner = objective_of(model, network, predicting(model), diffusion, states=self._states)

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error; the vectors' mean length is a figure beside it."""
        named = replace(batch, captions=self.prompts(batch.captions, generator), context=None)
        total, figures = self._inner.loss(named, generator)
        lengths = torch.cat([each.detach().norm(dim=1) for each in self.network.vectors])
        return total, figures | {"vector_length": lengths.mean()}

    def prompts(self, captions: Sequence[str], generator: torch.Generator) -> list[str]:
        """A prompt for each caption."""
        config = self.config
        drawn = torch.randint(len(config.templates), (len(captions),), generator=generator).tolist()
        with_caption = torch.rand(len(captions), generator=generator) < config.caption_prob
        found = []
        for number, caption, wanted in zip(drawn, captions, with_caption.tolist(), strict=True):
            prompt = config.templates[number].replace(WORD, config.name)
            found.append(f"{prompt}, {caption}" if wanted and caption.strip() else prompt)
        return found

    def _states(self, captions: list[str]) -> Texts:
        return text_states(self.model, captions, [{self.config.name: each} for each in self.network.vectors])


def new_inversion(
    model: Model, config: InversionConfig, diffusion: DiffusionConfig | None = None
) -> InversionObjective:
    """An objective for `fit` that learns one word; the model's networks rest from now on.

    Without `diffusion` no caption is dropped: the word is in every prompt. ValueError where the model's U-Net sees
    depth or a picture to be edited, `initial` has no tokens, or there are more vectors than a chunk of a prompt holds.
    """
    check_trainable(model)
    rest(model)
    vectors = []
    for tower, text, tokenizer in zip(model.family.texts, model.texts, model.tokenizers, strict=True):
        ids = tokenizer.encode(config.initial)
        if not ids:
            raise ValueError(f"initial={config.initial!r}: a word or more is needed")
        count, room = config.num_vectors or len(ids), tower.config.max_length - 2
        if count > room:
            raise ValueError(f"num_vectors={count}: 1 to {room} are allowed")
        first = ids[:count]  # as A1111: one token may begin several vectors
        spread = [first[index * len(first) // count] for index in range(count)]
        vectors.append(text.text_model.embeddings.token_embedding.weight[spread].to(model.device))
    return InversionObjective(model, config, Words(vectors), diffusion or DiffusionConfig(caption_drop_prob=0.0))


def inversion_result(objective: InversionObjective, state: State) -> Embedding:
    """The word with its averaged vectors, as it may be saved or used in prompts."""
    model = objective.model
    with state.averaged():
        vectors = tuple(each.detach().float().cpu().clone() for each in objective.network.vectors)
    return Embedding(objective.config.name, vectors, state.step, model.name, model.hash or None)
