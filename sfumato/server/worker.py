"""The worker: claims jobs of the queue, hands them to the service, and puts what was drawn into the store.

Owns the names of results and the leases of what it has claimed. Knows no HTTP.
"""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from sfumato.images import Picture, read_picture
from sfumato.images.files import write_png
from sfumato.pipeline import recipe
from sfumato.server.protecting import Protector
from sfumato.server.queue import Entry, Queue
from sfumato.server.service import Service
from sfumato.server.store import Store
from sfumato.server.ticket import DONE, FAILED, OVER, Ticket
from sfumato.tasks.checks import complete, job_from_dict
from sfumato.tasks.pictures import PICTURES, Pictures
from sfumato.tasks.plot import final_size
from sfumato.types import Job, Result

log = logging.getLogger(__name__)

BEAT = 0.5  # s between signs of life
AHEAD = 4  # jobs of one user that are claimed before there is room for them
HOUR = 3600.0
FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)?)(?:=|:)")
PREFIX = "sha256:"


def png_of(image: np.ndarray, made: Mapping[str, Any] | None = None) -> bytes:
    """A PNG of (H, W, 3) uint8 with its recipe inside."""
    written = io.BytesIO()
    write_png(written, image, made)
    return written.getvalue()


def field_of(error: Exception) -> str | None:
    """The field that a ValueError's line begins with."""
    found = FIELD.match(str(error)) if isinstance(error, ValueError) else None
    return found[1] if found else None


def names_in(job: Mapping[str, Any]) -> list[str]:
    """The pictures that a job's plain JSON names, each once."""
    found = [job.get(name) for name in PICTURES]
    found += [control.get("image") for control in job.get("controls", ())]
    return list(dict.fromkeys(name for name in found if name))


@dataclass(frozen=True)
class Stores:
    """Where pictures lie: those that were drawn and those that were handed in."""

    results: Store
    pictures: Store

    def find(self, name: str, field: str = "image") -> Picture:
        """The picture "sha256:..." of a job. ValueError, without any path, where there is none or it is none."""
        sha256 = name.removeprefix(PREFIX)
        path = self.pictures.path(sha256) or self.results.path(sha256)
        if path is None:
            raise ValueError(f"{field}={name[:80]!r}: no such picture; send it first, then name it by its SHA-256")
        try:
            return read_picture(path, field)
        except ValueError as error:
            raise ValueError(str(error).replace(repr(str(path)), repr(name)).replace(str(path), name)) from error


class Worker:
    """Keeps a service fed from a queue, in a thread. `keep` s is how long jobs that are over are remembered.

    The `protector`, if there is one, is asked about each job that is claimed, and what was drawn goes through it before
    it is put anywhere.
    """

    def __init__(
        self,
        queue: Queue,
        service: Service,
        stores: Stores,
        keep: float = 30 * 24 * HOUR,
        protector: Protector | None = None,
    ) -> None:
        self.queue, self.service, self.stores, self.keep = queue, service, stores, keep
        self.protector = protector
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._tickets: dict[str, Ticket] = {}
        self._over: deque[tuple[str, Ticket]] = deque()
        self._poked = threading.Event()
        self._stopping = self._draining = False
        self._next_beat = self._next_cleaning = 0.0
        self._thread = threading.Thread(target=self._loop, name="sfumato worker", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Look at the queue now."""
        self._poked.set()

    def ticket(self, id: str) -> Ticket | None:
        """The ticket of a job that is at work here."""
        return self._tickets.get(id)

    def tickets(self) -> list[Ticket]:
        """Those of all jobs at work here, in the order in which they were claimed."""
        return list(self._tickets.values())

    def cancel(self, id: str) -> None:
        """End a job that is at work here, before its next step."""
        ticket = self._tickets.get(id)
        if ticket is not None:
            self.service.cancel(ticket)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.service.alive

    def close(self, grace: float = 0.0) -> None:
        """Begin nothing more, finish within `grace` s what is at work, and give back the rest."""
        self._draining = True
        end = time.monotonic() + grace
        while self._tickets and self.alive and time.monotonic() < end:
            time.sleep(0.05)
        self._stopping = True
        self.poke()
        self._thread.join()
        self.service.close()
        self._end_all()
        self.queue.release(self.name)

    def _loop(self) -> None:
        while not self._stopping:
            try:
                self._poked.clear()
                self._end_all()
                self._beat()
                if not self._draining and self.service.alive:
                    self._claim()
                self._clean()
            except SQLAlchemyError:  # a database that is away for a while; leases and retries mend what was lost
                log.exception("the queue does not answer")
                time.sleep(BEAT)
            self._poked.wait(BEAT)

    def _claim(self) -> None:
        """Claim while the service has room; of no user more than a few that cannot begin yet."""
        while True:
            full = {user for user, number in self.service.waiting.items() if number >= AHEAD}
            entry = self.queue.claim(self.name, full)
            if entry is None:
                return
            try:
                pictures = {name: self.stores.find(name) for name in names_in(entry.job)}
                job = job_from_dict(entry.job)
                self._check_order(job, Pictures(pictures))
                self._tickets[entry.id] = self.service.submit(job, entry.user, self._listener(entry), pictures)
            except Exception as error:
                self._fail(entry.id, error)
            else:
                log.info("job %s of %s begins", entry.id, entry.user or "nobody")

    def _check_order(self, job: Job, pictures: Pictures) -> None:
        """ValueError where a job, accepted maybe before the server was told to look, may not be drawn."""
        if self.protector is None:
            return
        model = self.service.pipeline.model
        job = complete(job, model.family, pictures.size(job))
        self.protector.check_order(job, *final_size(job, model, pictures))

    def _listener(self, entry: Entry) -> Any:
        told = ""

        def listen(ticket: Ticket) -> None:
            nonlocal told
            if ticket.state != told:
                told = ticket.state
                if told in OVER:
                    self._over.append((entry.id, ticket))
                self._poked.set()

        return listen

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + BEAT
        progress = {id: (ticket.done, ticket.total) for id, ticket in self._tickets.items()}
        for id in self.queue.beat(self.name, progress):
            self.cancel(id)

    def _end_all(self) -> None:
        """Put down what has become of jobs that are over."""
        while self._over:
            id, ticket = self._over[0]
            self._end(id, ticket)
            self._over.popleft()
            self._tickets.pop(id, None)

    def _end(self, id: str, ticket: Ticket) -> None:
        if ticket.state == DONE and ticket.result is not None:
            self._finish(id, ticket.result, ticket.total)
        elif ticket.state == FAILED and ticket.error is not None:
            self._fail(id, ticket.error)
        elif ticket.cancelling:
            self.queue.end_cancelled(id, self.name)

    def _finish(self, id: str, result: Result, steps: int) -> None:
        try:
            names = [self.stores.results.put(png_of(image, made)) for image, made in self._shown(result)]
        except SQLAlchemyError:  # the whole is done again once the queue answers
            raise
        except Exception as error:  # a full disk may be mended; a picture that cannot be protected is not kept
            self._fail(id, error)
            return
        if self.queue.finish(id, self.name, names, result.seconds, steps):
            log.info("job %s is done: %d pictures in %.2f s", id, len(names), result.seconds)

    def _shown(self, result: Result) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """The pictures as they may be kept, with their recipes; signs of life are given meanwhile."""
        if self.protector is None:
            yield from ((image, recipe(result, n)) for n, image in enumerate(result.images))
            return
        for finished in self.protector.protected(result, self._beat):
            yield finished
            self._beat()

    def _fail(self, id: str, error: Exception) -> None:
        """A wrong job fails for good; what may be the machine's fault is tried again."""
        mendable = not isinstance(error, ValueError)
        message = self.plain(str(error)) or type(error).__name__
        self.queue.fail(id, self.name, message, field_of(error), retry=mendable)
        log.warning("job %s failed: %s", id, error, exc_info=error if mendable else None)

    def plain(self, message: str) -> str:
        """A message without this machine's folders in it, on one line."""
        shelf = self.service.pipeline.extras.shelf
        for folder in (*shelf.folders, self.stores.results.folder, self.stores.pictures.folder):
            for written in {str(folder.absolute()), str(folder)} - {".", "/"}:
                message = message.replace(f"{written}{os.sep}", "").replace(written, "the server's folder")
        return " ".join(message.split())

    def _clean(self) -> None:
        """Forget old jobs, and files that are no job's."""
        now = time.monotonic()
        if now < self._next_cleaning:
            return
        self._next_cleaning = now + HOUR
        if gone := self.queue.forget(self.keep):
            log.info("%d old jobs were forgotten", gone)
        for store, age in ((self.stores.results, HOUR), (self.stores.pictures, self.keep)):
            for name in self.queue.unused(store.older(age)):
                store.remove(name)
