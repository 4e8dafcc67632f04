"""What was wrong with a set of pictures: counted, and the first few named. Knows no file and no picture."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger(__name__)

NAMED = 8  # how many broken ones are told by name; all are counted


class Report:
    """`read` pictures came back, `broken` did not (each counted once), `shards` could not be read or were cut short.

    Both tables go from a name to the reason. The first few of each kind are also logged when they are met.
    """

    def __init__(self) -> None:
        self.read = 0
        self.broken: dict[str, str] = {}
        self.shards: dict[str, str] = {}

    def note_broken(self, name: str, reason: str) -> None:
        """A picture that cannot be used; its place is taken by another one."""
        _note(self.broken, name, reason, "picture")

    def note_shard(self, name: str, reason: str) -> None:
        """A shard that is unreadable, wholly or from somewhere on."""
        _note(self.shards, name, reason, "shard")

    def merge(self, other: Report) -> None:
        """Add what another worker met."""
        self.read += other.read
        self.broken |= other.broken
        self.shards |= other.shards

    def lines(self) -> list[str]:
        """For people: how many were read, how many not and why, the first few by name."""
        told = [f"{self.read:,} pictures read, {len(self.broken):,} broken, {len(self.shards):,} shards damaged"]
        for reason, count in Counter(_kind(reason) for reason in self.broken.values()).most_common(NAMED):
            told.append(f"  {count:,} x {reason}")
        for table in (self.shards, self.broken):
            told += [f"  {name}: {reason}" for name, reason in list(table.items())[:NAMED]]
            if len(table) > NAMED:
                told.append(f"  ... and {len(table) - NAMED:,} more")
        return told


def _note(table: dict[str, str], name: str, reason: str, what: str) -> None:
    if name in table:
        return
    table[name] = reason
    if len(table) <= NAMED:
        log.warning("%s %s is left out: %s", what, name, reason)
    elif len(table) == NAMED + 1:
        log.warning("more such %ss are counted, no longer named", what)


def _kind(reason: str) -> str:
    """The reason without its details, so that equal kinds are counted together."""
    return reason.partition(" (")[0]
