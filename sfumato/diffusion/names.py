"""Names in any spelling, for samplers and schedules: one plain form, and a helpful error where nothing matches."""

from __future__ import annotations

import difflib
from collections.abc import Mapping


def plain(name: str) -> str:
    """Letters and digits in lower case, "+" as p: "DPM++ 2M" and "dpmpp_2m" are both dpmpp2m."""
    return "".join(letter for letter in name.lower().replace("+", "p") if letter.isalnum())


def unknown(what: str, name: str, key: str, aliases: Mapping[str, str]) -> ValueError:
    """The error of an unknown name: the names near its plain form `key`, or all of them where none is near.

    `aliases` maps plain forms to names.
    """
    close = difflib.get_close_matches(key, list(aliases), n=8, cutoff=0.7)
    near = list(dict.fromkeys(aliases[form] for form in close))[:4]
    if near:
        return ValueError(f"{what}={name!r}: did you mean {' or '.join(near)}?")
    return ValueError(f"{what}={name!r}: one of {', '.join(dict.fromkeys(aliases.values()))}")
