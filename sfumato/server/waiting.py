"""Waiting for a job: for doors that answer with the pictures themselves. Knows no other program's words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.concurrency import run_in_threadpool

from sfumato.server.desk import Desk
from sfumato.server.keys import User
from sfumato.server.queue import CANCELLED, FAILED, OVER, Entry

LOOK = 0.05  # s
RETRY = {"Retry-After": "5"}
AWAY = 1.0  # s between looks whether whoever asked is still there


Gone = Callable[[], Awaitable[bool]]


async def finished(desk: Desk, user: User, plain: Mapping[str, Any], gone: Gone | None = None) -> Entry:
    """A job's entry once it is done or cancelled; it is cancelled where whoever asked has `gone`.

    HTTPException: 503 where the server ends, 500 where it failed by no fault of the job's; ValueError where it did
    by one.
    """
    if desk.closing:
        raise HTTPException(503, "the server is ending", RETRY)
    entry = await run_in_threadpool(desk.submit, plain, user)
    waited = 0.0
    while entry.state not in OVER:
        if desk.closing:
            raise HTTPException(503, "the server is ending; the job waits in the queue", RETRY)
        await asyncio.sleep(LOOK)
        waited += LOOK
        if gone is not None and waited >= AWAY:
            waited = 0.0
            if await gone():
                await run_in_threadpool(desk.cancel, entry.id, user)
        if desk.worker.ticket(entry.id) is None:
            found = await run_in_threadpool(desk.queue.get, entry.id)
            if found is None:
                raise HTTPException(404, "the job is gone")
            entry = found
    if entry.state == FAILED:
        if entry.field is not None:
            raise ValueError(entry.error or f"{entry.field}: the job failed")
        raise HTTPException(500, entry.error or "the job failed")
    return entry


async def drawn(desk: Desk, user: User, plain: Mapping[str, Any], gone: Gone) -> Entry:
    """The same of a job that must be done: HTTPException 409 where it was cancelled."""
    entry = await finished(desk, user, plain, gone)
    if entry.state == CANCELLED:
        raise HTTPException(409, "the job was cancelled")
    return entry
