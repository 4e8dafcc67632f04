"""The service: a thread that draws the jobs of many users together, row by row in shared network calls.

Jobs come and go at any step; users take turns; jobs with different adapters take turns of several steps; a job that
fails, fails alone. Knows no HTTP and no queue on disk.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from sfumato.families import Model
from sfumato.images import Picture
from sfumato.memory import free_memory
from sfumato.memory.estimate import Kernels, unet_bytes
from sfumato.pipeline import Pipeline
from sfumato.server.ticket import CANCELLED, FAILED, OVER, Ticket
from sfumato.server.work import Work
from sfumato.tasks.checks import complete
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.previews import Preview, linear, linear_map
from sfumato.tasks.room import check_memory
from sfumato.types import Job

log = logging.getLogger(__name__)

STEPS_WORN = 8  # how many turns jobs with the same adapters have before others have theirs
SHARE = 0.5  # of the free memory that one network call may take

T = TypeVar("T")
Listener = Callable[[Ticket], None]


def rows_within(model: Model, most: int) -> int:
    """How many rows of native size fit into half of the free memory: 1 to `most`; `most` where nobody knows."""
    side, kernels = model.family.size // model.family.autoencoder.factor, Kernels(model.device)
    try:
        free = SHARE * free_memory(model.device)
    except ValueError:  # the system does not say
        return most
    fits = (n for n in range(most, 1, -1) if unet_bytes(model.family.unet, side, side, n, model.dtype, kernels) <= free)
    return next(fits, 1)


@dataclass
class _Line:
    """A user's jobs: those that wait and those at work, in the order in which they came; when served last."""

    waiting: deque[tuple[Ticket, Pictures]] = field(default_factory=deque)
    works: list[Work] = field(default_factory=list)
    served: int = 0

    @property
    def rows(self) -> float:
        return sum(work.rows for work in self.works)

    @property
    def can_begin(self) -> bool:
        return bool(self.waiting) or any(work.waiting for work in self.works)


class Service:
    """Draws with a pipeline in a thread of its own. `rows` bounds the rows that are at work (None: by free memory).

    `deterministic` draws every job alone, so that its pictures are those of Pipeline.draw to the last bit; else they
    are equal within 1/255. `preview` of None is the linear one, where the family has a known map.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        deterministic: bool = False,
        rows: int | None = None,
        preview: Preview | None = None,
    ) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows={rows}: 1 or more are needed")
        family = pipeline.model.family
        self.pipeline, self.deterministic = pipeline, deterministic
        self.rows = rows_within(pipeline.model, pipeline.engine.max_rows) if rows is None else rows
        self.preview = linear(family) if preview is None and linear_map(family) else preview
        self.turns = 0
        self.broken: Exception | None = None
        self._beside = threading.Lock()
        self._lines: dict[str, _Line] = {}
        self._group: tuple[Hashable, int] | None = None  # whose turn it is, and since which turn
        self._last: dict[Hashable, int] = {}  # the last turn of each group
        self._served = 0
        self._acts: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="sfumato service", daemon=True)
        self._thread.start()

    def submit(
        self,
        job: Job,
        user: str = "",
        listener: Listener | None = None,
        pictures: Mapping[str, Picture] | None = None,
    ) -> Ticket:
        """Take a job; ValueError at once where it is wrong in itself. `pictures` are those it names that are no files.

        What only drawing shows (an adapter that does not fit) is the ticket's error.
        """
        shelf = Pictures(pictures)
        job = complete(job, self.pipeline.model.family, shelf.size(job))
        check_memory([job], self.pipeline.model, shelf, self.pipeline.tile)
        ticket = Ticket(job, user, listener, self.preview)
        with self._changed:
            if self._closed or self.broken:
                raise RuntimeError("the service has ended")
            self._lines.setdefault(user, _Line()).waiting.append((ticket, shelf))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a job before the next step; one that is over stays as it is."""
        with self._changed:
            ticket.cancelling = True
            self._changed.notify()

    def between(self, act: Callable[[], T]) -> T:
        """Do something with the pipeline in the service's thread, between two steps; returns or raises what it does."""
        future: Future[T] = Future()

        def done() -> None:
            try:
                future.set_result(act())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self._closed or self.broken:
                raise RuntimeError("the service has ended")
            self._acts.append((done, future))
            self._changed.notify()
        return future.result()

    def beside(self, act: Callable[[], T], taken: int) -> T:
        """Do something with networks that no job draws with, in the caller's thread, one at a time; drawing goes on.

        Where its `taken` bytes are more of the free memory than a step leaves, it is done between two steps instead.
        """
        with self._beside:
            try:
                room = (1 - SHARE) * free_memory(self.pipeline.model.device)
            except ValueError:  # the system does not say
                room = float("inf")
            return act() if taken <= room else self.between(act)

    def _aside(self, acts: Sequence[tuple[Callable[[], None], int]]) -> Future[None]:
        """Do such acts `beside`, one after the other, in a thread of their own, and look again once they are done."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                for act, taken in acts:
                    self.beside(act, taken)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            with self._changed:
                self._changed.notify()

        threading.Thread(target=run, name="sfumato hints", daemon=True).start()
        return future

    @property
    def alive(self) -> bool:
        """Whether it can draw."""
        return self._thread.is_alive() and not self._closed and self.broken is None

    @property
    def waiting(self) -> dict[str, int]:
        """How many jobs of each user have not begun; only of users who have such."""
        with self._changed:
            return {user: len(line.waiting) for user, line in self._lines.items() if line.waiting}

    @property
    def running(self) -> int:
        """How many jobs are at work."""
        with self._changed:
            return sum(len(line.works) for line in self._lines.values())

    def close(self, seconds: float | None = None) -> None:
        """Cancel what is not done, and end the thread; wait so long for it (None: until it has)."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    with self.pipeline.busy:
                        self._step()
        except Exception as error:  # a fault of ours: nobody waits for ever, and `alive` says so
            log.exception("the service broke")
            self.broken = error
        self._end(self.broken)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._acts or self._has_jobs)
            return not self._closed

    @property
    def _has_jobs(self) -> bool:
        """Whether a step would do something: not where all works wait for hints, and there is no room for more."""
        lines = self._lines.values()
        works = [work for line in lines for work in line.works]
        waiting = [ticket for line in lines for ticket, _ in line.waiting]
        if any(not work.preparing or work.ticket.cancelling for work in works):
            return True
        if any(ticket.cancelling for ticket in waiting):
            return True
        room = not works if self.deterministic else sum(line.rows for line in lines) < self.rows
        return bool(waiting) and room

    def _step(self) -> None:
        """Drop what was cancelled, begin what there is room for, answer all once, go on with what is drawn."""
        while self._acts:
            self._acts.popleft()[0]()
        self._sweep()
        self._fill()
        runs = [run for work in self._on_turn() for run in work.active]
        if runs:
            self.pipeline.engine.turn(runs)
            self.turns += 1
        for line in list(self._lines.values()):
            for work in list(line.works):
                self._guarded(line, work, work.settle)
        if not self.running:
            self.pipeline.extras.wear(())

    def _guarded(self, line: _Line, work: Work, act: Callable[[], None]) -> None:
        """Let a work go on; an error is its ticket's alone. Works that are over leave."""
        try:
            act()
        except Exception as error:
            work.close()
            work.ticket.become(FAILED, error=error)
        if work.ticket.state in OVER and work in line.works:
            with self._changed:
                line.works.remove(work)

    def _sweep(self) -> None:
        with self._changed:
            lines = list(self._lines.items())
            cancelled: list[Ticket] = []
            for user, line in lines:
                for work in [work for work in line.works if work.ticket.cancelling]:
                    work.close()
                    line.works.remove(work)
                    cancelled.append(work.ticket)
                cancelled += [ticket for ticket, _ in line.waiting if ticket.cancelling]
                line.waiting = deque(entry for entry in line.waiting if not entry[0].cancelling)
                if not line.works and not line.waiting:
                    del self._lines[user]
        for ticket in cancelled:
            ticket.become(CANCELLED)

    def _fill(self) -> None:
        """Begin pictures while there is room, always of the user who has the fewest rows at work."""
        with self._changed:
            lines = list(self._lines.values())
        if self.deterministic:
            self._fill_one(lines)
            return
        while sum(line.rows for line in lines) < self.rows:
            ready = [line for line in lines if line.can_begin]
            if not ready:
                return
            self._begin(min(ready, key=lambda line: (line.rows, line.served)))

    def _fill_one(self, lines: list[_Line]) -> None:
        """Have one job at work, all of it."""
        while not any(line.works for line in lines) and any(line.waiting for line in lines):
            line = min((line for line in lines if line.waiting), key=lambda line: line.served)
            self._begin(line)
        for work in (work for line in lines for work in line.works):
            while work.waiting:
                work.start()

    def _begin(self, line: _Line) -> None:
        """Begin a user's next picture: of a job at work, else of the one that waits longest."""
        self._served += 1
        line.served = self._served
        work = next((work for work in line.works if work.waiting), None)
        if work is None:
            with self._changed:
                ticket, shelf = line.waiting.popleft()
                work = Work(ticket, self.pipeline, shelf, self._aside)
                line.works.append(work)
            self._guarded(line, work, work.begin)
        if work.waiting:
            work.start()

    def _on_turn(self) -> list[Work]:
        """The works that are answered now: those with the adapters whose turn it is."""
        groups: dict[Hashable, list[Work]] = {}
        for line in self._lines.values():
            for work in line.works:
                if work.active:
                    groups.setdefault(work.group, []).append(work)
        if not groups:
            return []
        if self._group is None or self._group[0] not in groups or self.turns - self._group[1] >= STEPS_WORN:
            longest = min(groups, key=lambda group: self._last.get(group, -1))
            self._group = longest, self.turns
            self._last = {group: turn for group, turn in self._last.items() if group in groups}
        self._last[self._group[0]] = self.turns
        return groups[self._group[0]]

    def _end(self, error: Exception | None) -> None:
        """Nobody is left waiting: all tickets are cancelled, or failed with the error."""
        with self._changed:
            lines, self._lines = list(self._lines.values()), {}
            while self._acts:
                self._acts.popleft()[1].set_exception(RuntimeError("the service has ended"))
        for line in lines:
            for work in line.works:
                work.close()
            for ticket in [*(work.ticket for work in line.works), *(ticket for ticket, _ in line.waiting)]:
                ticket.become(CANCELLED if error is None else FAILED, error=error)
