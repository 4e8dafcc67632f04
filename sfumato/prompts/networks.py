"""Extra-network tags in a prompt: `<lora:name:0.8>`, `<hypernet:name:1>`, and `<kind:a:b>` of kinds not known here.

Takes them out of the text and says what they ask for. Opens no file and knows no network. Rules as in A1111.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import TypeAlias

log = logging.getLogger(__name__)

TAG = re.compile(r"<(\w+):([^>]+)>")


@dataclass(frozen=True)
class Lora:
    """A LoRA by name: its strength on the text encoder and on the U-Net, and its rank cut to `dyn` where given.

    `rest` holds the parts of the tag that mean nothing here, as they stood.
    """

    name: str
    text: float = 1.0
    unet: float = 1.0
    dyn: int | None = None
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hypernet:
    """A hypernetwork by name, and its strength. `rest` as in Lora."""

    name: str
    strength: float = 1.0
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Other:
    """A tag of another kind, with its parts as they stood."""

    kind: str
    args: tuple[str, ...]


Network: TypeAlias = Lora | Hypernet | Other


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text}: not a number")
    return value


def _lora(args: list[str]) -> Lora:
    """Places and names may mix, names win: `name`, `te`, `unet` (`te` where left out), `dyn`."""
    places = [args[0], *(arg for arg in args[1:] if arg.count("=") != 1)]
    pairs = [(name.strip(), value) for name, _, value in (a.partition("=") for a in args[1:] if a.count("=") == 1)]
    named = dict(pairs)
    text = _number(named.get("te", places[1] if len(places) > 1 else "1"))
    unet = _number(named["unet"] if "unet" in named else places[2]) if "unet" in named or len(places) > 2 else text
    dyn = named.get("dyn", places[3] if len(places) > 3 else None)
    others = [f"{name}={value}" for name, value in pairs if name not in ("te", "unet", "dyn")]
    return Lora(args[0].strip(), text, unet, None if dyn is None else int(dyn), (*places[4:], *others))


def _network(kind: str, args: list[str]) -> Network:
    """ValueError: no name, or numbers that are none."""
    if kind in ("lora", "lyco", "hypernet") and not args[0].strip():
        raise ValueError("a tag without a name")
    if kind in ("lora", "lyco"):  # A1111 takes LyCORIS files through the same door
        return _lora(args)
    if kind == "hypernet":
        return Hypernet(args[0].strip(), _number(args[1]) if len(args) > 1 else 1.0, tuple(args[2:]))
    return Other(kind, tuple(args))


def extract(text: str) -> tuple[str, tuple[Network, ...]]:
    """The text without its tags, and what they ask for, in order. The blanks around a tag stay.

    A LoRA or hypernetwork tag without a name, or with numbers that are none, stays as well, with a warning.
    """
    found: list[Network] = []

    def take(tag: re.Match[str]) -> str:
        try:
            found.append(_network(tag[1], tag[2].split(":")))
        except ValueError:
            log.warning(
                "prompt: %s is left as text: it needs a name, numbers as strengths, a whole number as dyn", tag[0]
            )
            return tag[0]
        return ""

    end = text.rfind(">") + 1  # beyond it nothing can close: many "<a:" would be searched in vain
    return TAG.sub(take, text[:end]) + text[end:], tuple(found)
