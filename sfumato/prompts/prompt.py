"""A whole prompt: styles, comments, choices, extra networks, AND and schedules, in A1111's order -> a Prompt.

What remains in a Prompt's texts is emphasis and BREAK, which are read chunk by chunk (emphasis.py, chunks.py).
Knows no tokens.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.prompts.choices import choose
from sfumato.prompts.networks import Network, extract
from sfumato.prompts.styles import Style, apply_styles, strip_comments
from sfumato.prompts.timeline import timeline

AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))")


@dataclass(frozen=True)
class Part:
    """One part of an AND prompt: its weight, and its (until step, text) entries, steps counted from 1."""

    weight: float
    timeline: tuple[tuple[int, str], ...]

    def at(self, step: int) -> str:
        """The text in force at a step. Before the first step it is the first, after the last entry the last."""
        return next((text for until, text in self.timeline if step <= until), self.timeline[-1][1])


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read for `steps` steps.

    `text` is the prompt after styles, comments and choices, tags and AND still in it: with it the same Prompt can be
    read again without a generator.
    """

    text: str
    steps: int
    parts: tuple[Part, ...]
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Distinct texts to encode, and for each step the index of every part's text: `texts[rows[k][i]]`."""

    texts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def split_and(text: str) -> list[tuple[str, float]]:
    """Parts between ANDs with the weights at their ends, 1 where there is none. `a AND b :0.5` -> [(a, 1), (b, 0.5)].

    Blanks at a part's end are dropped, those before it are kept. A prompt without AND is one part, weight and all.
    """
    found = []
    for part in AND.split(text):
        part = part.rstrip()
        before, colon, after = part.rpartition(":")
        weight = WEIGHT.fullmatch(after) if colon else None
        if weight and math.isfinite(float(weight[1])):
            found.append((before.rstrip(), float(weight[1])))
        else:
            found.append((part, 1.0))
    return found


def parse(
    text: str,
    steps: int,
    *,
    negative: bool = False,
    styles: Sequence[Style] = (),
    rng: random.Random | None = None,
    wildcards: Path | None = None,
    hires: bool = False,
    base_steps: int | None = None,
    old: bool = False,
) -> Prompt:
    """Reads a prompt. Whatever is malformed in it is text, never an error.

    `negative`: a negative prompt, which has one part of weight 1 and no tags; AND and `<...>` in it are words.
    `rng`: makes the choices of `{a|b}` and `__file__` (from the folder `wildcards`); without it they are text.
    `hires`, `base_steps`, `old` and the ValueErrors of wrong options: see timeline().
    """
    text = apply_styles(text, [style.negative if negative else style.prompt for style in styles]) if styles else text
    text = strip_comments(text)
    text = text if rng is None else choose(text, rng, wildcards)
    bare, networks = (text, ()) if negative else extract(text)
    parts = [(bare, 1.0)] if negative else split_and(bare)
    entries = [timeline(each, steps, hires=hires, base_steps=base_steps, old=old) for each, _ in parts]
    return Prompt(
        text,
        steps,
        tuple(Part(weight, tuple(entry)) for (_, weight), entry in zip(parts, entries, strict=True)),
        networks,
    )


def plan(parts: Sequence[Part], steps: int, first: int = 1) -> Plan:
    """What is to be encoded for parts, of one prompt or several, over `steps` steps or network calls.

    `first` is the number of the first one. A1111 counts network calls from 0, so there `from` holds for `when` + 1 of
    them, and a sampler with two calls a step is read with 2 n steps; `first=0` does as it does.
    """
    indices: dict[str, int] = {}
    rows = tuple(
        tuple(indices.setdefault(part.at(step), len(indices)) for part in parts) for step in range(first, first + steps)
    )
    return Plan(tuple(indices), rows)
