"""Drawing rows on a Ray cluster: actors with an engine each; what becomes of a row comes back as soon as it is over.

Each actor draws as `drawing.Drawer` does, into the same folder, which all machines must see. Rows of an actor that died
are drawn by another; who writes down what is done is the driver alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sfumato.batch.drawing import Drawer, Hand, Plan
from sfumato.batch.ledger import Outcome
from sfumato.batch.rows import Plain, Reader
from sfumato.server.cluster import cluster_library, join_cluster, resources_of

log = logging.getLogger(__name__)

CALLS = 2  # at an actor, so that the next rows are there before the last ones are drawn
MAX_DEATHS = 3  # of actors, with no row drawn between


class Actor:
    """A drawer in a process of its own, as Ray begins it; its networks are loaded when they are first needed."""

    def __init__(self, make: Callable[[], Hand], plan: Plan) -> None:
        self._make, self._plan = make, plan
        self._made: Drawer | None = None
        self._making = threading.Lock()

    def ready(self) -> tuple[str, int]:
        """The SHA-256 of the model's file, and how many rows of the network are at work at most."""
        drawer = self._drawer()
        return drawer.model, drawer.service.rows

    def check(self, rows: Sequence[Plain], reader: Reader) -> None:
        """ValueError naming the first row that is wrong."""
        self._drawer().check(rows, reader)

    def draw(self, rows: Sequence[Plain], reader: Reader) -> Iterator[Outcome]:
        """What becomes of the rows, one by one."""
        yield from self._drawer().draw(rows, reader)

    def _drawer(self) -> Drawer:
        with self._making:
            if self._made is None:
                self._made = Drawer(self._make(), self._plan)
            return self._made


@dataclass
class _Call:
    """Rows at an actor: those of which nothing has come back yet."""

    actor: Any
    left: dict[int, Plain]


@dataclass
class _Work:
    """What is to be drawn, and what is at the actors, by the stream that their outcomes come through."""

    waiting: Iterator[Plain]
    again: deque[Plain] = field(default_factory=deque)
    calls: dict[Any, _Call] = field(default_factory=dict)

    def take(self, number: int) -> list[Plain]:
        """The next rows; those of an actor that died first."""
        found = [self.again.popleft() for _ in range(min(number, len(self.again)))]
        return found + list(islice(self.waiting, number - len(found)))


class RayCrew:
    """A crew of actors (None: one for each GPU, or one). `make` is called in each actor's process."""

    def __init__(self, make: Callable[[], Hand], plan: Plan, replicas: int | None, device: str | None) -> None:
        self._ray = ray = cluster_library()
        self._joined = join_cluster(ray).is_new
        self.actors: list[Any] = []
        try:
            number, reserved = resources_of(ray, replicas, device)
            kind = ray.remote(scheduling_strategy="SPREAD", max_concurrency=CALLS, **reserved)(Actor)
            self._begin = lambda: kind.remote(make, plan)
            self.actors += [self._begin() for _ in range(number)]
            self.model: str
            self.model, self._most = self._ask(self.actors[0].ready.remote())
        except BaseException:
            self.close()
            raise

    def check(self, rows: Sequence[Plain], reader: Reader) -> None:
        self._ask(self.actors[0].check.remote(rows, reader))

    def draw(self, rows: Iterable[Plain], reader: Reader) -> Iterator[Outcome]:
        ray, work, deaths = self._ray, _Work(iter(rows)), 0
        kept = ray.put(reader)
        while True:
            self._hand_out(work, kept)
            if not work.calls:
                return
            for stream in ray.wait(list(work.calls), num_returns=1)[0]:
                call = work.calls[stream]
                try:
                    outcome: Outcome = self._ask(next(stream))
                except StopIteration:
                    del work.calls[stream]
                except ray.exceptions.RayActorError as error:
                    deaths += call.actor in self.actors  # of one actor's calls only the first counts
                    if deaths > MAX_DEATHS:
                        raise RuntimeError("actors die before they have drawn anything") from error
                    self._replace(stream, work)
                else:
                    deaths = 0
                    if call.left.pop(outcome.row, None) is not None:
                        yield outcome

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []
        if self._joined:
            self._ray.shutdown()

    def _ask(self, promised: Any) -> Any:
        """What an actor answers; what it raises is raised here as it was."""
        try:
            return self._ray.get(promised)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from None

    def _hand_out(self, work: _Work, reader: Any) -> None:
        """See that every actor has its rows."""
        for actor in self.actors:
            at_work = sum(1 for call in work.calls.values() if call.actor is actor)
            for _ in range(CALLS - at_work):
                rows = work.take(self._most)
                if not rows:
                    return
                stream = actor.draw.options(num_returns="streaming").remote(rows, reader)
                work.calls[stream] = _Call(actor, {row[0]: row for row in rows})

    def _replace(self, stream: Any, work: _Work) -> None:
        """Begin another actor instead of one that died, and give its rows to whoever comes next."""
        call = work.calls.pop(stream)
        log.warning("an actor ended; %d of its rows are drawn again", len(call.left))
        work.again.extend(call.left.values())
        if call.actor in self.actors:
            self.actors[self.actors.index(call.actor)] = self._begin()
