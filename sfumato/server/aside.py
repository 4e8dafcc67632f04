"""Work beside the queue: pictures that a request waits for and that are no job, such as hints. Knows no HTTP.

Few of them are made at once, few of a user's wait, and what one request may have made is bounded: whatever is asked,
threads are left for all else.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from sfumato.server.hints import hint_size
from sfumato.server.keys import Limits, User
from sfumato.server.orders import MAX_PICTURE_PIXELS
from sfumato.server.queue import Full

THREADS = 2
LINE = 8  # requests of one user, those at work among them
MAX_HINTS = 2048 * 2048  # pixels of all hints of a request

T = TypeVar("T")


class Aside:
    """Threads that do such work, one request after the other, as they came."""

    def __init__(self, threads: int = THREADS) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._loop, name=f"sfumato aside {n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, user: User, act: Callable[[], T]) -> T:
        """What `act` returns or raises, once it is its turn. Full where the user has too many that are not done."""
        most = min(LINE, user.limits.waiting)
        with self._lock:
            if self._asked[user.name] >= most:
                raise Full(f"requests: {user.name!r} has {most} whose pictures are not done, and no more may wait")
            self._asked[user.name] += 1
        future: Future[T] = Future()
        future.add_done_callback(lambda _: self._leave(user.name))
        self._tasks.put((act, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begin nothing more."""
        for _ in self._threads:
            self._tasks.put(None)

    def _leave(self, name: str) -> None:
        with self._lock:
            self._asked[name] -= 1
            if not self._asked[name]:
                del self._asked[name]

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            act, future = task
            if not future.set_running_or_notify_cancel():  # whoever asked is gone
                continue
            try:
                future.set_result(act())
            except Exception as error:
                future.set_exception(error)


class Allowance:
    """What one request's hints may still take: pixels of the pictures that are read, and of the hints."""

    def __init__(self, limits: Limits) -> None:
        self._read = min(MAX_PICTURE_PIXELS, limits.pixels)
        self._hints = self._most = min(MAX_HINTS, limits.pixels)

    def take(self, size: tuple[int, int], side: int | None, field: str) -> None:
        """Have a hint made of a picture of size (width, height) px, at a shorter `side` in px; None: at its own size.

        ValueError that begins with the field where that is too much.
        """
        width, height = size if side is None else hint_size(size, side)
        self._read -= size[0] * size[1]
        if self._read < 0:
            raise ValueError(f"{field}: the pictures of a request have too many pixels together")
        self._hints -= width * height
        if self._hints < 0:
            raise ValueError(f"{field}: {width} x {height} px for its hint; {self._most} in all are allowed a request")
