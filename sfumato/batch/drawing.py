"""Drawing rows: many at work at once in shared network calls, each picture kept as soon as it is drawn.

A row that fails, fails alone. Owns no record of what is done. Letters: H W pixels.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sfumato.batch.ledger import Kept, Outcome, keep_picture
from sfumato.batch.rows import Plain, Reader, Row, check_rows, file_name
from sfumato.pipeline import Pipeline
from sfumato.server.service import Service
from sfumato.server.ticket import DONE, OVER, Ticket
from sfumato.server.work import ROWS_OF_A_PICTURE
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.room import check_memory
from sfumato.types import Job, Result

AHEAD = 4  # rows that wait for room, so that nobody waits for them

Finished = tuple[np.ndarray, dict[str, Any], dict[str, Any] | None]


@dataclass(frozen=True)
class Hand:
    """What draws: a pipeline; what is asked about a complete job before anything is drawn; what is done to a result.

    `finish` gives of each picture what is saved, (H, W, 3) uint8, its recipe, and a checker's verdict.
    """

    pipeline: Pipeline
    finish: Callable[[Result], list[Finished]]
    check: Callable[[Job], None] | None = None


@dataclass(frozen=True)
class Plan:
    """How a run draws: into which folder, how many pictures at once (None: by the memory), and whether each alone."""

    folder: Path
    batch: int | None = None
    deterministic: bool = False


class Crew(Protocol):
    """Whoever draws rows, here or elsewhere. `model` is the SHA-256 of the model's file."""

    model: str

    def check(self, rows: Sequence[Plain], reader: Reader) -> None:
        """ValueError naming the first row that is wrong."""

    def draw(self, rows: Iterable[Plain], reader: Reader) -> Iterator[Outcome]:
        """What becomes of the rows, in the order in which they are over."""

    def close(self) -> None:
        """End what is at work."""


class Drawer:
    """A crew of one hand, in this process; several threads may draw with it, together."""

    def __init__(self, hand: Hand, plan: Plan) -> None:
        if plan.batch is not None and plan.batch < 1:
            raise ValueError(f"batch={plan.batch}: 1 or more are needed")
        self.hand, self.plan, self.model = hand, plan, hand.pipeline.model.hash
        rows = None if plan.batch is None else plan.batch * ROWS_OF_A_PICTURE
        if rows is not None:
            hand.pipeline.engine.max_rows = rows
        self.service = Service(hand.pipeline, deterministic=plan.deterministic, rows=rows)

    def check(self, rows: Sequence[Plain], reader: Reader) -> None:
        pipeline, own = self.hand.pipeline, self.hand.check

        def also(job: Job, pictures: Pictures) -> None:
            check_memory([job], pipeline.model, pictures, pipeline.tile)
            if own is not None:
                own(job)

        check_rows(rows, reader, pipeline.model.family, pipeline.extras.shelf, also)

    def draw(self, rows: Iterable[Plain], reader: Reader) -> Iterator[Outcome]:
        over: queue.SimpleQueue[int] = queue.SimpleQueue()
        work: dict[int, list[Ticket]] = {}
        waiting, most = iter(rows), self.service.rows + AHEAD
        try:
            while True:
                while len(work) < most and (plain := next(waiting, None)) is not None:
                    number = plain[0]
                    try:
                        work[number] = self._submit(reader.row(plain), over)
                    except ValueError as error:  # what was well when it was checked, such as a picture that has gone
                        yield Outcome(number, error=_line(error))
                if not work:
                    return
                number = over.get()
                if number in work and all(ticket.state in OVER for ticket in work[number]):
                    yield self._outcome(number, work.pop(number))
        finally:
            for ticket in (ticket for tickets in work.values() for ticket in tickets):
                self.service.cancel(ticket)

    def close(self) -> None:
        self.service.close()

    def _submit(self, row: Row, over: queue.SimpleQueue[int]) -> list[Ticket]:
        """The tickets of a row's jobs; its number comes through `over` whenever one of them is over."""

        def listen(ticket: Ticket) -> None:
            if ticket.state in OVER:
                over.put(row.number)

        tickets: list[Ticket] = []
        try:
            for job in row.jobs:
                tickets.append(self.service.submit(job, listener=listen))
        except ValueError:
            for ticket in tickets:
                self.service.cancel(ticket)
            raise
        return tickets

    def _outcome(self, number: int, tickets: Sequence[Ticket]) -> Outcome:
        """Keep the pictures of a row that is over. Raises what has ended the drawing of all rows."""
        if not self.service.alive:
            raise RuntimeError("the drawing has ended") from self.service.broken
        for ticket in tickets:
            if ticket.error is not None:
                return Outcome(number, error=_line(ticket.error))
        results = [ticket.result for ticket in tickets if ticket.state == DONE and ticket.result is not None]
        try:
            finished = [(each, seed) for result in results for each, seed in _seeded(self.hand.finish(result), result)]
        except ValueError as error:
            return Outcome(number, error=_line(error))
        kept = []
        for index, ((image, made, verdict), seed) in enumerate(finished):
            name = file_name(number, index, len(finished))
            kept.append(Kept(name, seed, keep_picture(self.plan.folder, name, image, made), verdict))
        return Outcome(number, tuple(kept))


def _seeded(finished: list[Finished], result: Result) -> Iterator[tuple[Finished, int]]:
    yield from zip(finished, result.seeds, strict=True)


def _line(error: Exception) -> str:
    """An error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
