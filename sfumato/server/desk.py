"""The desk: all that the HTTP doors share - queue, service, worker, stores, keys - opened and closed together.

Other doors (another program's API, a web page) stand on it too. Knows no HTTP.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sfumato.pipeline import Pipeline
from sfumato.server.aside import Aside
from sfumato.server.keys import Keys, Limits, Meter, User
from sfumato.server.orders import order_from
from sfumato.server.protecting import Protector
from sfumato.server.queue import Entry, Queue
from sfumato.server.service import Service
from sfumato.server.store import Store
from sfumato.server.worker import HOUR, Stores, Worker
from sfumato.weights.shelf import Shelf

log = logging.getLogger(__name__)

LOCAL = "local"  # who asks where there are no keys


@dataclass(frozen=True)
class Settings:
    """How a desk is opened. `url` of None is SQLite in the folder `data`; `rows` as of Service; `keep` in seconds."""

    data: Path
    url: str | None = None
    deterministic: bool = False
    rows: int | None = None
    limits: Limits = field(default_factory=Limits)
    keep: float = 30 * 24 * HOUR


class Desk:
    """One model's pictures for many users. Jobs that were at work when the last process died are drawn again.

    `protector` treats pictures before they are kept; None: they are kept as they are drawn.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings, protector: Protector | None = None) -> None:
        self.settings, self.pipeline, self.protector = settings, pipeline, protector
        pipeline.extras.shelf = Shelf(pipeline.extras.shelf.folders, paths=False)  # requests name no paths
        data = settings.data
        data.mkdir(parents=True, exist_ok=True)
        self.stores = Stores(Store(data / "results", ".png"), Store(data / "pictures"))
        self.keys, self.meter = Keys(data / "keys.json", settings.limits), Meter()
        self._lock = None if settings.url else _locked(data / "lock")
        self.queue = Queue(settings.url or f"sqlite:///{data / 'queue.db'}")
        if self._lock is not None and (number := self.queue.recover()):
            log.info("%d jobs were at work when the last process ended; they are drawn again", number)
        self.service = Service(pipeline, deterministic=settings.deterministic, rows=settings.rows)
        if protector is not None and protector.hides:
            self.service.preview = None  # nobody has looked at what a preview shows
        self.worker = Worker(self.queue, self.service, self.stores, settings.keep, protector)
        self.aside = Aside()
        self._options: dict[str, dict[str, Any]] = {}
        self.closing = False

    @property
    def model_name(self) -> str:
        return self.pipeline.model.name

    def check_room(self, user: User) -> None:
        """Full where a user may have no more unfinished jobs; for doors that do something before they submit one."""
        self.queue.check_room(user.name, user.limits.waiting)

    def submit(self, plain: Mapping[str, Any], user: User, priority: int = 0, key: str | None = None) -> Entry:
        """Accept a job in plain JSON. ValueError names the field; Conflict and Full are such too."""
        order = order_from(dict(plain), self.pipeline, self.stores, user.limits)
        if self.protector is not None:
            self.protector.check_order(order.job, *order.size)
        entry = self.queue.submit(order.plain, user.name, priority, key, order.files, user.limits.waiting)
        self.worker.poke()
        return entry

    def cancel(self, id: str, user: User) -> Entry | None:
        """End a user's job before its next step; None where there is none."""
        entry = self.queue.cancel(id, user.name)
        if entry is not None:
            self.worker.cancel(id)
        return entry

    def options(self, user: User) -> dict[str, Any]:
        """A user's settings of doors that have such; they last as long as the desk."""
        return self._options.setdefault(user.name, {})

    def problem(self) -> str | None:
        """Why nothing can be drawn now; None where all is well."""
        if self.closing:
            return "the server is ending"
        if not self.worker.alive:
            return "the drawing has ended"
        if not os.access(self.stores.results.folder, os.W_OK):
            return "results cannot be written"
        return "the queue is paused" if self.queue.paused else None

    def close(self, grace: float = 0.0) -> None:
        """Begin nothing more, finish within `grace` s what is at work; what is not waits in the queue."""
        self.closing = True
        self.aside.close()
        self.worker.close(grace)
        self.queue.close()
        if self._lock is not None:
            self._lock.close()


def _locked(path: Path) -> TextIO:
    """A file that one process alone holds, until it ends, however it ends."""
    file = path.open("w", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"data={str(path.parent)!r}: another server works there") from error
    return file
