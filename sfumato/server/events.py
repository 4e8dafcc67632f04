"""The events of a job for whoever waits for it: its states, its progress and previews, as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.concurrency import run_in_threadpool

from sfumato.server.desk import Desk
from sfumato.server.queue import OVER, Entry
from sfumato.server.store import Store
from sfumato.server.ticket import Ticket
from sfumato.server.words import view
from sfumato.server.worker import png_of

LOOK = 0.1  # s between looks at a job that is drawn here
QUEUE_LOOK = 0.5  # s between looks into the queue
PREVIEW_SECONDS = 0.5  # between previews
SILENCE = 15.0  # s after which a comment keeps the connection open


def event(name: str, said: Any) -> bytes:
    """One server-sent event (WHATWG HTML, 9.2.5)."""
    return f"event: {name}\ndata: {json.dumps(said)}\n\n".encode("ascii")


async def events(desk: Desk, id: str, previews: bool) -> AsyncIterator[bytes]:
    """The events of a job until it is over, it is gone, or the server ends."""
    told: dict[str, Any] = {}
    next_look = next_preview = 0.0
    last = time.monotonic()
    while not desk.closing:
        now = time.monotonic()
        found: list[bytes] = []
        ticket = desk.worker.ticket(id)
        if now >= next_look or ticket is None:
            next_look = now + QUEUE_LOOK
            entry = await run_in_threadpool(desk.queue.get, id)
            if entry is None:
                return
            found += await run_in_threadpool(_state, entry, desk.stores.results, told)
            if entry.state in OVER:
                yield b"".join(found)
                return
            if ticket is None:
                found += _progress(entry.done, entry.total, told)
        if ticket is not None:
            moved = _progress(ticket.done, ticket.total, told)
            found += moved
            if previews and moved and now >= next_preview:
                next_preview = now + PREVIEW_SECONDS
                found += await run_in_threadpool(_preview, ticket)
        if found:
            last = now
            yield b"".join(found)
        elif now - last > SILENCE:
            last = now
            yield b": still there\n\n"
        await asyncio.sleep(LOOK if ticket is not None else QUEUE_LOOK)


def _state(entry: Entry, results: Store, told: dict[str, Any]) -> list[bytes]:
    if told.get("state") == entry.state:
        return []
    told["state"] = entry.state
    return [event("state", view(entry, results).model_dump())]


def _progress(done: int, total: int, told: dict[str, Any]) -> list[bytes]:
    if total == 0 or told.get("progress") == (done, total):
        return []
    told["progress"] = (done, total)
    return [event("progress", {"done": done, "total": total})]


def _preview(ticket: Ticket) -> list[bytes]:
    picture = ticket.preview()
    if picture is None:
        return []
    return [event("preview", {"png": base64.b64encode(png_of(picture)).decode("ascii")})]
