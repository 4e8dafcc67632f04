"""Prompts and sizes -> Cond, as a family's text encoders and U-Net want them.

Letters: B texts, L tokens of a chunk, D width of a tower, E width of the pooled vector. Knows no file and no sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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


class Word(Protocol):
    """A textual-inversion embedding: for each of a family's text encoders its vectors (n, D); `hash` names its file."""

    @property
    def vectors(self) -> tuple[Tensor, ...]: ...
    @property
    def hash(self) -> str: ...


def chunks_of(
    text: str, tokenizer: ClipTokenizer, room: int, options: TextOptions, counts: Mapping[str, int] | None = None
) -> list[Chunk]:
    """A text in lots of `room` tokens with their weights; in the weighting "none" brackets are text.

    `counts` are the numbers of vectors of the embeddings that it may name.
    """
    first, *rest = _chunks(text, tokenizer, room, options, counts or {})
    if options.long:
        return [first, *rest]
    if rest:
        lost = " ".join(_words(chunk, tokenizer, counts or {}) for chunk in rest)
        shown = lost if len(lost) <= 60 else f"{lost[:60]}..."
        total = len(first.ids) + sum(len(chunk.ids) for chunk in rest)
        log.warning("prompt: cut after %d of %d tokens; what fell off: %s", room, total, shown)
    return [first]


def _chunks(
    text: str, tokenizer: ClipTokenizer, room: int, options: TextOptions, counts: Mapping[str, int]
) -> list[Chunk]:
    pieces = [Piece(text, 1.0)] if options.weighting == "none" else emphasis(text)
    backtrack = options.backtrack if options.long else 0
    return chunks(pieces, tokenizer, room=room, backtrack=backtrack, embeddings=counts)


def _words(chunk: Chunk, tokenizer: ClipTokenizer, counts: Mapping[str, int]) -> str:
    """A chunk's text again, with the names of its embeddings."""
    words, position = [], 0
    for place in chunk.places:
        words += [tokenizer.decode(list(chunk.ids[position : place.position])), place.name]
        position = place.position + counts[place.name]
    return " ".join(filter(None, [*words, tokenizer.decode(list(chunk.ids[position:]))]))


def describe(
    model: Model, text: str, options: TextOptions = TextOptions(), embeddings: Mapping[str, Word] | None = None
) -> tuple[tuple[str, str], ...]:
    """The (name, hash) of each embedding that a text uses, in its order, for a picture's recipe."""
    words = embeddings or {}
    room = model.family.texts[0].config.max_length - 2
    counts = {name: len(word.vectors[0]) for name, word in words.items()}
    parts = _chunks(text, model.tokenizers[0], room, options, counts)
    used = dict.fromkeys(place.name for part in (parts if options.long else parts[:1]) for place in part.places)
    return tuple((name, words[name].hash) for name in used)


def skip_of(tower: TextTower, clip_skip: int | None) -> int:
    """Layers left out at a tower's end. ValueError where there are not so many."""
    if clip_skip is None:
        return tower.skip_last
    skip = max(tower.skip_last, clip_skip - 1 - tower.not_stored)
    if skip >= tower.config.num_layers:
        raise ValueError(f"clip_skip={clip_skip}: 1 to {tower.config.num_layers + tower.not_stored} are allowed")
    return skip


def run_tower(
    tower: TextTower,
    network: CLIPText,
    ids: Sequence[Sequence[int]],
    clip_skip: int | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """States (B, L, D) of every token, and the pooled vector (B, E) where the tower has a projection.

    On the network's device and in its dtype; gradients reach it where the caller allows them. `extra` (K, D) are the
    vectors that ids beyond the vocabulary stand for.
    """
    tokens = torch.tensor(ids, device=network.text_model.final_layer_norm.weight.device)
    skip = skip_of(tower, clip_skip)
    if tower.config.projection is None:
        return network(tokens, skip, tower.final_norm, extra), None
    return network.forward_pooled(tokens, skip, tower.final_norm, extra)


def encode_captions(
    tower: TextTower,
    network: CLIPText,
    tokenizer: ClipTokenizer,
    texts: Sequence[str],
    vectors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Plain captions, one chunk each, cut where they are longer -> states (B, L, D), as in training.

    `vectors` (n, D) are of the embeddings that they may name; gradients reach them.
    """
    return encode_pooled(tower, network, tokenizer, texts, vectors or {})[0]


def encode_pooled(
    tower: TextTower,
    network: CLIPText,
    tokenizer: ClipTokenizer,
    texts: Sequence[str],
    vectors: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """What `encode_captions` gives, and the pooled vectors (B, E) where the tower has a projection."""
    room = tower.config.max_length - 2
    counts = {name: len(each) for name, each in vectors.items()}
    parts = [chunks([Piece(text, 1.0)], tokenizer, room=room, backtrack=0, embeddings=counts)[0] for text in texts]
    ids, _ = rows(parts, tokenizer, pad=tower.pad_token, room=room)
    ids, extra = _pointing(ids, parts, vectors, tower.config.vocab_size)
    return run_tower(tower, network, ids, extra=extra)


def _pointing(
    ids: list[list[int]], parts: Sequence[Chunk], vectors: Mapping[str, Tensor], vocab_size: int
) -> tuple[list[list[int]], Tensor | None]:
    """Rows of ids in which embeddings are ids beyond the vocabulary, and the vectors (K, D) that those stand for."""
    used = list(dict.fromkeys(place.name for part in parts for place in part.places))
    if not used:
        return ids, None
    starts = {name: vocab_size + sum(len(vectors[each]) for each in used[:index]) for index, name in enumerate(used)}
    pointing = [list(row) for row in ids]
    for row, part in zip(pointing, parts, strict=True):
        for position, name in part.places:
            count = len(vectors[name])
            row[position + 1 : position + 1 + count] = range(starts[name], starts[name] + count)  # after the start
    return pointing, torch.cat([vectors[name] for name in used])


def _tower_states(
    tower: TextTower,
    network: CLIPText,
    tokenizer: ClipTokenizer,
    vectors: Mapping[str, Tensor],
    text: str,
    options: TextOptions,
) -> tuple[Tensor, Tensor | None]:
    """A text's weighed states (1, chunks * L, D) and its first chunk's pooled vector (1, E)."""
    room = tower.config.max_length - 2
    parts = chunks_of(text, tokenizer, room, options, {name: len(each) for name, each in vectors.items()})
    ids, weights = rows(parts, tokenizer, pad=tower.pad_token, room=room)
    ids, extra = _pointing(ids, parts, vectors, tower.config.vocab_size)
    empty = None
    if options.weighting == "comfy":
        ids = [*ids, rows([Chunk()], tokenizer, pad=tower.pad_token, room=room)[0][0]]
    states, pooled = run_tower(tower, network, ids, options.clip_skip, extra)
    if options.weighting == "comfy":
        states, empty = states[:-1], states[-1]
    weighed = weigh(states, torch.tensor(weights, device=states.device), options.weighting, empty)
    return join(weighed, len(parts)), None if pooled is None else pooled[:1]


def encode(
    model: Model,
    text: str,
    sizes: Sizes | None = None,
    options: TextOptions = TextOptions(),
    negative: bool = False,
    embeddings: Mapping[str, Word] | None = None,
) -> Cond:
    """One text -> Cond of one row. `sizes` has an entry for each of the family's `size_cond`.

    Long texts have more than one chunk, and so a longer context: `alike` makes conds of one length. A text may name
    `embeddings`; ValueError where one has not vectors for each text encoder, of its width.
    """
    family = model.family
    vectors = _by_tower(embeddings or {}, len(family.texts))
    towers = zip(family.texts, model.texts, model.tokenizers, vectors, strict=True)
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


def _by_tower(embeddings: Mapping[str, Word], count: int) -> list[dict[str, Tensor]]:
    """The vectors by name, for each of `count` text encoders."""
    for name, word in embeddings.items():
        if len(word.vectors) != count:
            raise ValueError(f"embedding={name!r}: it is for {len(word.vectors)} text encoders, the model has {count}")
    return [{name: word.vectors[index] for name, word in embeddings.items()} for index in range(count)]


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
