"""Chunks: weighed pieces of text -> token ids in lots of 75, each to be encoded alone between a start and an end.

Rules as in A1111: BREAK ends a chunk, a chunk that is full hands the words after its last comma on, and names of
textual-inversion embeddings keep places free for their vectors. Knows no network, only a tokenizer's two ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

from sfumato.prompts.emphasis import BREAK, Break, Piece

ROOM = 75  # CLIP's 77 positions less start and end
BACKTRACK = 20  # tokens; A1111's `comma_padding_backtrack`


class Tokenizer(Protocol):
    """What is asked of a tokenizer: ids of bare text, and the ids that go before and after."""

    start: int
    end: int

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        ...

    def __hash__(self) -> int:
        """Names of embeddings are encoded once for each tokenizer."""
        ...


class Place(NamedTuple):
    """Where the first vector of embedding `name` goes: an index into a chunk's ids (in a row of ids: one more)."""

    position: int
    name: str


@dataclass(frozen=True)
class Chunk:
    """Up to `room` token ids without start, end and padding, the weight of each, and the places of embeddings.

    An embedding of n vectors takes n ids, all 0 until its vectors are put in their place.
    """

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    places: tuple[Place, ...] = ()


Names = Mapping[int, Sequence[tuple[tuple[int, ...], str, int]]]  # first id -> (all ids, name, vectors), longest first


@lru_cache(maxsize=8)
def _names(tokenizer: Tokenizer, embeddings: tuple[tuple[str, int], ...], room: int) -> Names:
    found: dict[int, list[tuple[tuple[int, ...], str, int]]] = {}
    for name, num_vectors in embeddings:
        if not 1 <= num_vectors <= room:
            raise ValueError(f"embeddings: {name} has {num_vectors} vectors, allowed are 1 to {room}")
        ids = tuple(tokenizer.encode(name))
        if ids:
            found.setdefault(ids[0], []).append((ids, name, num_vectors))
    return {first: sorted(names, key=lambda each: -len(each[0])) for first, names in found.items()}


@lru_cache(maxsize=8)
def _marked(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds the names with a mark at an end, `<cat>`, which the tokenizer would join with a mark beside: `<cat>,`."""
    marked = [name for name in names if any(map(str.isalnum, name)) and not (name[0].isalnum() and name[-1].isalnum())]
    longest_first = sorted(marked, key=lambda name: -len(name))
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE) if marked else None


class _Writer:
    """Chunks in the making: the finished ones, and the one that is being filled."""

    def __init__(self, room: int, backtrack: int) -> None:
        self.room, self.backtrack = room, backtrack
        self.done: list[Chunk] = []
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.places: list[Place] = []
        self.comma = -1  # where the last comma of this chunk is

    def finish(self, length: int | None = None) -> None:
        """Ends the chunk after `length` ids; what is beyond begins the next one."""
        length = len(self.ids) if length is None else length
        kept = tuple(place for place in self.places if place.position < length)
        self.done.append(Chunk(tuple(self.ids[:length]), tuple(self.weights[:length]), kept))
        self.ids, self.weights = self.ids[length:], self.weights[length:]
        moved = self.places[len(kept) :]
        self.places = [Place(place.position - length, place.name) for place in moved]
        self.comma = -1

    def make_room(self, is_comma: bool) -> None:
        """Before one more token: ends a full chunk, after its last comma where that is near enough."""
        full = len(self.ids) == self.room
        if is_comma:
            self.comma = len(self.ids)
        elif full and self.comma != -1 and len(self.ids) - self.comma <= self.backtrack:
            self.finish(self.comma + 1)
        if len(self.ids) == self.room:
            self.finish()

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


def chunks(
    pieces: Iterable[Piece | Literal[Break.BREAK]],
    tokenizer: Tokenizer,
    *,
    room: int = ROOM,
    backtrack: int = BACKTRACK,
    embeddings: Mapping[str, int] | None = None,
) -> list[Chunk]:
    """At least one chunk. `embeddings` maps names to their number of vectors; of names that fit the longest is taken.

    Names are told by their tokens, so large and small letters are alike; those with a mark at an end, `<cat>`, also
    where another mark follows, for which A1111 and its tokens are blind.

    A full chunk ends after its last comma if that is at most `backtrack` tokens back (0: never), and the words after
    it begin the next chunk. ValueError: room < 1, backtrack < 0, or an embedding that fits into no chunk.
    """
    if room < 1 or backtrack < 0:
        raise ValueError(f"room={room}, backtrack={backtrack}: room must be at least 1, backtrack at least 0")
    names = _names(tokenizer, tuple((embeddings or {}).items()), room)
    marked = _marked(tuple(embeddings or ()))
    comma = tokenizer.encode(",")
    writer = _Writer(room, backtrack)
    for piece in pieces:
        if piece is BREAK:
            writer.finish()
            continue
        text, weight = piece
        ids = tokenizer.encode(text if marked is None else marked.sub(r" \g<0> ", text))
        position = 0
        while position < len(ids):
            found = _embedding(ids, position, names)
            writer.make_room(found is None and ids[position : position + 1] == comma)
            if found is None:
                writer.add(ids[position : position + 1], weight)
                position += 1
                continue
            length, name, num_vectors = found
            if len(writer.ids) + num_vectors > room:
                writer.finish()
            writer.places.append(Place(len(writer.ids), name))
            writer.add([0] * num_vectors, weight)
            position += length
    if writer.ids or not writer.done:
        writer.finish()
    return writer.done


def _embedding(ids: list[int], position: int, names: Names) -> tuple[int, str, int] | None:
    """The (length, name, vectors) of the longest embedding name at a position."""
    for name_ids, name, num_vectors in names.get(ids[position], ()):
        if tuple(ids[position : position + len(name_ids)]) == name_ids:
            return len(name_ids), name, num_vectors
    return None


def rows(
    parts: Sequence[Chunk], tokenizer: Tokenizer, *, pad: int | None = None, room: int = ROOM
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and weights of each chunk, `room + 2` long: start, ids, end, then `pad` (the end token unless given)."""
    filler = tokenizer.end if pad is None else pad
    ids = [[tokenizer.start, *part.ids, tokenizer.end, *[filler] * (room - len(part.ids))] for part in parts]
    weights = [[1.0, *part.weights, *[1.0] * (room + 1 - len(part.weights))] for part in parts]
    return ids, weights


def even(prompts: Sequence[Sequence[Chunk]]) -> list[list[Chunk]]:
    """Prompts of equally many chunks: the shorter ones end with empty chunks, as A1111 fills a batch."""
    most = max((len(prompt) for prompt in prompts), default=0)
    return [[*prompt, *[Chunk()] * (most - len(prompt))] for prompt in prompts]
