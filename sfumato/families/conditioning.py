"""Prompts and sizes -> Cond, as a family's text encoders and U-Net want them.

Letters: B texts, L tokens of a chunk, D width of a tower, E width of the pooled vector. Knows no file and no sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.families.family import SIZE_NUMBERS, TextTower
from sfumato.families.model import Model
from sfumato.models.clip import CLIPText
from sfumato.models.layers import timestep_embedding
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.prompts.chunks import Chunk, chunks, rows
from sfumato.prompts.emphasis import Piece, emphasis
from sfumato.prompts.weighting import join, pad_to, weigh
from sfumato.types import Cond

log = logging.getLogger(__name__)

Sizes = Mapping[str, Sequence[float]]  # e.g. {"original": (height, width), "crop": (top, left), ...}


@dataclass(frozen=True)
class TextOptions:
    """How texts are read: the way of applying weights, and A1111's clip skip (1: the last layer; None: the family's).

    `backtrack` is how far a full chunk looks back for a comma, in tokens; `pad_with_empty` fills the shorter of two
    prompts with empty chunks instead of its last vector. Where not `long`, a text is cut after its first chunk.
    """

    weighting: str = "original"
    clip_skip: int | None = None
    backtrack: int = 20
    pad_with_empty: bool = False
    long: bool = True


def chunks_of(text: str, tokenizer: ClipTokenizer, room: int, options: TextOptions) -> list[Chunk]:
    """A text in lots of `room` tokens with their weights; in the weighting "none" brackets are text."""
    pieces = [Piece(text, 1.0)] if options.weighting == "none" else emphasis(text)
    if options.long:
        return chunks(pieces, tokenizer, room=room, backtrack=options.backtrack)
    first, *rest = chunks(pieces, tokenizer, room=room, backtrack=0)
    if rest:
        lost = tokenizer.decode([token for chunk in rest for token in chunk.ids])
        shown = lost if len(lost) <= 60 else f"{lost[:60]}..."
        total = len(first.ids) + sum(len(chunk.ids) for chunk in rest)
        log.warning("prompt: cut after %d of %d tokens; what fell off: %s", room, total, shown)
    return [first]


def skip_of(tower: TextTower, clip_skip: int | None) -> int:
    """Layers left out at a tower's end. ValueError where there are not so many."""
    if clip_skip is None:
        return tower.skip_last
    skip = max(tower.skip_last, clip_skip - 1 - tower.not_stored)
    if skip >= tower.config.num_layers:
        raise ValueError(f"clip_skip={clip_skip}: 1 to {tower.config.num_layers + tower.not_stored} are allowed")
    return skip


def run_tower(
    tower: TextTower, network: CLIPText, ids: Sequence[Sequence[int]], clip_skip: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """States (B, L, D) of every token, and the pooled vector (B, E) where the tower has a projection.

    On the network's device and in its dtype; gradients reach it where the caller allows them.
    """
    tokens = torch.tensor(ids, device=network.text_model.final_layer_norm.weight.device)
    skip = skip_of(tower, clip_skip)
    if tower.config.projection is None:
        return network(tokens, skip, tower.final_norm), None
    return network.forward_pooled(tokens, skip, tower.final_norm)


def encode_captions(tower: TextTower, network: CLIPText, tokenizer: ClipTokenizer, texts: Sequence[str]) -> Tensor:
    """Plain captions, one chunk each, cut where they are longer -> states (B, L, D), as in training."""
    length = tower.config.max_length
    ids = [tokenizer.pad(tokenizer.encode(text), length, tower.pad_token) for text in texts]
    return run_tower(tower, network, ids)[0]


def _tower_states(
    tower: TextTower, network: CLIPText, tokenizer: ClipTokenizer, text: str, options: TextOptions
) -> tuple[Tensor, Tensor | None]:
    """A text's weighed states (1, chunks * L, D) and its first chunk's pooled vector (1, E)."""
    room = tower.config.max_length - 2
    parts = chunks_of(text, tokenizer, room, options)
    ids, weights = rows(parts, tokenizer, pad=tower.pad_token, room=room)
    empty = None
    if options.weighting == "comfy":
        ids = [*ids, rows([Chunk()], tokenizer, pad=tower.pad_token, room=room)[0][0]]
    states, pooled = run_tower(tower, network, ids, options.clip_skip)
    if options.weighting == "comfy":
        states, empty = states[:-1], states[-1]
    weighed = weigh(states, torch.tensor(weights, device=states.device), options.weighting, empty)
    return join(weighed, len(parts)), None if pooled is None else pooled[:1]


def encode(
    model: Model, text: str, sizes: Sizes | None = None, options: TextOptions = TextOptions(), negative: bool = False
) -> Cond:
    """One text -> Cond of one row. `sizes` has an entry for each of the family's `size_cond`.

    Long texts have more than one chunk, and so a longer context: `alike` makes conds of one length.
    """
    family = model.family
    towers = zip(family.texts, model.texts, model.tokenizers, strict=True)
    states, pooled = zip(*(_tower_states(*tower, text, options) for tower in towers), strict=True)
    context, vector = torch.cat(states, dim=-1), pooled[-1]
    if negative and family.zero_empty_negative and not text:
        context, vector = torch.zeros_like(context), None if vector is None else torch.zeros_like(vector)
    if family.unet.vector_dim is None:
        return Cond(context)
    if vector is None:
        raise ValueError(f"vector_dim={family.unet.vector_dim}: {family.name}'s last text encoder has no projection")
    numbers = size_vector(family.size_cond, sizes or {}, family.size_dim).to(vector)
    return Cond(context, torch.cat([vector, numbers], dim=1))


def alike(conds: Sequence[Cond], empty: Cond | None = None) -> list[Cond]:
    """Conds of equally long contexts: the last vector of the shorter ones is repeated, or they end with `empty`."""
    longest = max((cond.context for cond in conds), key=lambda context: context.shape[1])
    filler = None if empty is None else empty.context
    return [replace(cond, context=pad_to(cond.context, longest, filler)[0]) for cond in conds]


def size_vector(names: Sequence[str], sizes: Sizes, dim: int) -> Tensor:
    """The sinusoids, `dim` wide each, of all numbers in order: (1, dim * numbers). Podell et al. 2023, section 2.2."""
    numbers: list[float] = []
    for name in names:
        values = tuple(sizes.get(name, ()))
        if len(values) != SIZE_NUMBERS[name]:
            raise ValueError(f"{name}={values}: {SIZE_NUMBERS[name]} numbers are needed")
        numbers += values
    return timestep_embedding(torch.tensor(numbers, dtype=torch.float32), dim).reshape(1, -1)
