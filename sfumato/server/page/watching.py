"""Watching: a job from order to picture as the page shows it, and one's results. Knows no Gradio and no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sfumato.server.desk import Desk
from sfumato.server.keys import User
from sfumato.server.protecting import Told, told_by
from sfumato.server.queue import DONE, MAX_PAGE, OVER, Entry

LOOK = 0.1  # s
PREVIEW_SECONDS = 0.5


@dataclass(frozen=True)
class Sight:
    """What is to be seen of a job: `done` of `total` steps, a preview (H, W, 3) uint8, in the end names of results.

    `told` is what each result says of itself.
    """

    id: str
    state: str
    done: int = 0
    total: int = 0
    preview: np.ndarray | None = field(default=None, compare=False)  # comes with a step
    results: tuple[str, ...] = ()
    error: str | None = None
    seed: int = 0
    seconds: float | None = None
    told: tuple[Told, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """One result: its SHA-256, the plain job that drew it with the seed of this picture, what it says of itself."""

    sha256: str
    job: dict[str, Any]
    told: Told = field(default_factory=Told)

    @property
    def seed(self) -> int:
        """The seed of this picture."""
        return int(self.job.get("seed", 0))


async def watched(desk: Desk, user: User, plain: Mapping[str, Any]) -> AsyncIterator[Sight]:
    """Submit a job, and what there is to see until it is over. ValueError where it is refused."""
    if (seconds := desk.meter.wait(user)) > 0:
        raise ValueError(f"requests: {user.limits.requests} a minute are allowed; wait {int(seconds) + 1} s")
    if desk.closing:
        raise ValueError("server: it is ending; try again in a while")
    entry = await asyncio.to_thread(desk.submit, plain, user)
    sight = _sight(entry, desk)
    yield sight
    next_preview = 0.0
    while entry.state not in OVER and not desk.closing:
        await asyncio.sleep(LOOK)
        ticket = desk.worker.ticket(entry.id)
        if ticket is None:
            found = await asyncio.to_thread(desk.queue.get, entry.id)
            if found is None:
                raise ValueError("job: it is gone")
            entry, now = found, await asyncio.to_thread(_sight, found, desk)
        else:
            now = replace(sight, state=ticket.state, done=ticket.done, total=ticket.total)
            if now.done != sight.done and time.monotonic() >= next_preview:
                next_preview = time.monotonic() + PREVIEW_SECONDS
                picture = await asyncio.to_thread(ticket.preview)
                now = replace(now, preview=sight.preview if picture is None else picture)
        if now != sight:
            sight = now
            yield sight


def found(desk: Desk, user: User, text: str = "", most: int = 60) -> list[Drawn]:
    """One's results, newest first, whose prompts have every word of `text` in them."""
    words = text.lower().split()
    drawn: list[Drawn] = []
    for entry in desk.queue.page(user.name, DONE, limit=MAX_PAGE):
        said = str(entry.job.get("prompt", "")).lower()
        if all(word in said for word in words):
            first = int(entry.job.get("seed", 0))
            told = _told(entry, desk)
            drawn += [Drawn(name, {**entry.job, "seed": first + n}, told[n]) for n, name in enumerate(entry.results)]
        if len(drawn) >= most:
            break
    return drawn[:most]


def _sight(entry: Entry, desk: Desk) -> Sight:
    return Sight(
        entry.id, entry.state, entry.done, entry.total, None, entry.results, entry.error,
        int(entry.job.get("seed", 0)), entry.seconds, _told(entry, desk),
    )  # fmt: skip


def _told(entry: Entry, desk: Desk) -> tuple[Told, ...]:
    return tuple(told_by(desk.stores.results.path(name)) for name in entry.results)
