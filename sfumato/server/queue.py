"""The queue: every accepted job, on disk, until it is drawn once. Whoever draws claims jobs under a lease.

A worker that dies loses its lease, and its jobs are claimed again. Knows no pipeline and no HTTP.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CTE, ColumnElement, Select, delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from sfumato.server.tables import FileRow, FlagRow, JobRow, open_database

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
OVER = (DONE, FAILED, CANCELLED)
LEASE = 30.0  # s; a worker says much more often that it is alive
MAX_ATTEMPTS = 3
MAX_CRASHES = 25  # a job that always ends its worker would for ever end it
BACKOFF = 2.0  # s before a failed job is tried again, twice as long each time
MAX_KEY = 200  # characters
MAX_PRIORITY = 100
MAX_PAGE = 1000
PAUSED = "paused"
ID = re.compile(r"[0-9a-f]{32}")


class Conflict(ValueError):
    """The idempotency key was used for another job."""


class Full(ValueError):
    """The user has as many unfinished jobs as one may have."""


@dataclass(frozen=True)
class Entry:
    """A job of the queue as it was when asked. Times are seconds since 1970; `results` are names of files."""

    seq: int
    id: str
    user: str
    key: str | None
    state: str
    priority: int
    job: dict[str, Any]
    created: float
    started: float | None
    finished: float | None
    attempts: int
    crashes: int
    done: int
    total: int
    cancelling: bool
    seconds: float | None
    field: str | None
    error: str | None
    results: tuple[str, ...]


def _entry(row: JobRow) -> Entry:
    own = {name: getattr(row, name) for name in Entry.__dataclass_fields__ if name != "results"}
    return Entry(**own, results=tuple(file.sha256 for file in row.files if file.out))


def ready(now: float, leave: Collection[str] = ()) -> list[ColumnElement[bool]]:
    """What a job must be to be begun: it waits, its time has come, and its user is none of those in `leave`."""
    found: list[ColumnElement[bool]] = [JobRow.state == QUEUED, JobRow.after <= now]
    return [*found, JobRow.user.not_in(leave)] if leave else found


def waiting_users(priority: int) -> CTE:
    """The users with waiting jobs of a priority. By the index from one to the next, however many jobs each has."""
    jobs = (JobRow.state == QUEUED, JobRow.priority == priority)
    users = select(func.min(JobRow.user).label("user")).where(*jobs).cte("users", recursive=True)
    other = aliased(JobRow)
    following = select(func.min(other.user)).where(
        other.state == QUEUED, other.priority == priority, other.user > users.c.user
    )
    return users.union_all(select(following.scalar_subquery()).where(users.c.user.is_not(None)))


def turns(priority: int, now: float, leave: Collection[str] = ()) -> Select[str]:
    """The users who have jobs of a priority to begin: those with the fewest at work first, then the oldest job's."""
    users = waiting_users(priority)
    own = JobRow.user == users.c.user
    at_work = select(func.count(JobRow.seq)).where(JobRow.state == RUNNING, own).scalar_subquery()
    oldest = select(func.min(JobRow.seq)).where(*ready(now), JobRow.priority == priority, own).scalar_subquery()
    found = select(users.c.user, at_work.label("at_work"), oldest.label("oldest")).subquery()
    wanted = select(found.c.user).where(found.c.oldest.is_not(None)).order_by(found.c.at_work, found.c.oldest)
    return wanted.where(found.c.user.not_in(leave)) if leave else wanted


class Queue:
    """The queue in the database of a URL. For several threads and, but for SQLite's `recover`, several processes."""

    def __init__(self, url: str, clock: Callable[[], float] | None = None, lease: float = LEASE) -> None:
        self.lease = lease
        self._clock = clock
        self._engine = open_database(url)
        self._reading = self._engine.execution_options(reads=True)

    def close(self) -> None:
        self._engine.dispose()

    def submit(
        self,
        job: dict[str, Any],
        user: str = "",
        priority: int = 0,
        key: str | None = None,
        files: Sequence[str] = (),
        most: int | None = None,
    ) -> Entry:
        """Accept a job; once it returns, the job is on the disk. `files` are the SHA-256 of what it reads.

        With an idempotency `key` that the user has used for this job, the job of then is returned; Conflict where it
        was another. Full where the user has `most` unfinished ones already.
        """
        if key is not None and not 0 < len(key) <= MAX_KEY:
            raise ValueError(f"idempotency key={key[:20]!r}: 1 to {MAX_KEY} characters are needed")
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise ValueError(f"priority={priority!r}: a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY} is needed")
        try:
            with Session(self._engine) as session, session.begin():
                if found := self._same(session, user, key, job):
                    return found
                if most is not None:
                    self._check_room(session, user, most)
                row = JobRow(
                    id=uuid.uuid4().hex, user=user, key=key, state=QUEUED, priority=priority, job=job,
                    created=self._now(session), attempts=0, crashes=0, done=0, total=0, cancelling=False,
                    files=[FileRow(place=n, out=False, sha256=name) for n, name in enumerate(files)],
                )  # fmt: skip
                session.add(row)
                session.flush()
                return _entry(row)
        except IntegrityError:  # another process was faster with the same key
            with Session(self._engine) as session, session.begin():
                found = self._same(session, user, key, job)
                if found is None:
                    raise
                return found

    def check_room(self, user: str, most: int) -> None:
        """Full where a user has `most` unfinished jobs already."""
        with Session(self._reading) as session:
            self._check_room(session, user, most)

    def claim(self, worker: str, leave: Collection[str] = ()) -> Entry | None:
        """The next job, but for users in `leave`, the worker's until its lease ends.

        None where none waits or the queue is paused.
        """
        with Session(self._engine) as session, session.begin():
            now = self._now(session)
            self._expire(session, JobRow.lease < now)
            if session.get(FlagRow, PAUSED) is not None:
                return None
            row = self._next(session, now, leave)
            if row is None:
                return None
            row.state, row.worker, row.lease, row.started = RUNNING, worker, now + self.lease, now
            row.done = 0
            session.flush()
            return _entry(row)

    def beat(self, worker: str, progress: Mapping[str, tuple[int, int]]) -> set[str]:
        """Say that a worker is alive, with (steps done, of how many) of its jobs; returns those it must end.

        Those are the ones that were cancelled, and the ones whose lease was lost meanwhile.
        """
        with Session(self._engine) as session, session.begin():
            mine = select(JobRow).where(JobRow.worker == worker, JobRow.state == RUNNING).order_by(JobRow.seq)
            rows = session.scalars(mine.with_for_update(of=JobRow)).all()  # that no other takes one up meanwhile
            now, ending = self._now(session), set(progress)
            for row in rows:
                row.lease = now + self.lease
                if row.id in progress:
                    row.done, row.total = progress[row.id]
                    if not row.cancelling:
                        ending.discard(row.id)
            return ending

    def finish(self, id: str, worker: str, results: Sequence[str], seconds: float, steps: int = 0) -> bool:
        """A job is drawn in so many `steps`; its files lie in the store. False where the worker has lost it."""

        def end(row: JobRow, now: float) -> None:
            row.files += [FileRow(place=n, out=True, sha256=name) for n, name in enumerate(results)]
            row.state, row.seconds, row.finished, row.done, row.total = DONE, seconds, now, steps, steps

        return self._held(id, worker, end)

    def fail(self, id: str, worker: str, error: str, field: str | None = None, retry: bool = False) -> bool:
        """Drawing a job failed: it is tried again later where `retry` and its attempts allow, else it is over.

        False where the worker has lost it.
        """

        def end(row: JobRow, now: float) -> None:
            row.attempts += 1
            row.error, row.field = error, field
            if retry and row.attempts < MAX_ATTEMPTS and not row.cancelling:
                row.state, row.after = QUEUED, now + BACKOFF * 2 ** (row.attempts - 1)
            else:
                row.state, row.finished = FAILED, now

        return self._held(id, worker, end)

    def end_cancelled(self, id: str, worker: str) -> bool:
        """A cancelled job has ended at its worker. False where the worker has lost it."""

        def end(row: JobRow, now: float) -> None:
            row.state, row.finished = CANCELLED, now

        return self._held(id, worker, end)

    def release(self, worker: str) -> None:
        """Give back what a worker has, as if it had never begun; what was to be cancelled is."""
        with Session(self._engine) as session, session.begin():
            now = self._now(session)
            mine = update(JobRow).where(JobRow.worker == worker, JobRow.state == RUNNING)
            free = {"worker": None, "lease": None}
            session.execute(mine.where(JobRow.cancelling).values(state=CANCELLED, finished=now, **free))
            session.execute(mine.values(state=QUEUED, done=0, **free))

    def recover(self) -> int:
        """Take back all jobs at work, whose workers are known to be dead; returns how many there were."""
        with Session(self._engine) as session, session.begin():
            return self._expire(session, JobRow.state == RUNNING)

    def cancel(self, id: str, user: str | None = None) -> Entry | None:
        """Cancel a job that is not over; one at work ends at its worker's next step. None where there is none."""
        with Session(self._engine) as session, session.begin():
            row = self._row(session, id, user, lock=True)
            if row is None:
                return None
            if row.state == QUEUED:
                row.state, row.finished = CANCELLED, self._now(session)
            elif row.state == RUNNING:
                row.cancelling = True
            session.flush()
            return _entry(row)

    def get(self, id: str, user: str | None = None) -> Entry | None:
        """A job by its id; None where there is none, or it is another user's."""
        with Session(self._reading) as session:
            row = self._row(session, id, user)
            return None if row is None else _entry(row)

    def page(
        self, user: str | None = None, state: str | None = None, before: int | None = None, limit: int = 50
    ) -> list[Entry]:
        """Jobs, newest first, of a user and a state, those older than `before` (a `seq`): one page of `limit`."""
        if state is not None and state not in STATES:
            raise ValueError(f"state={state!r}: one of {', '.join(STATES)}")
        if not 1 <= limit <= MAX_PAGE:
            raise ValueError(f"limit={limit}: 1 to {MAX_PAGE} are allowed")
        wanted = select(JobRow).order_by(JobRow.seq.desc()).limit(limit)
        for asked, clause in (
            (user, JobRow.user == user), (state, JobRow.state == state), (before, JobRow.seq < (before or 0)),
        ):  # fmt: skip
            wanted = wanted if asked is None else wanted.where(clause)
        with Session(self._reading) as session:
            return [_entry(row) for row in session.scalars(wanted)]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with Session(self._reading) as session:
            found = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).tuples().all()
        return dict.fromkeys(STATES, 0) | dict(found)

    def pause(self, on: bool = True) -> None:
        """Let nothing be begun any more (what is at work goes on), or again."""
        with Session(self._engine) as session, session.begin():
            flag = session.get(FlagRow, PAUSED)
            if on and flag is None:
                session.add(FlagRow(name=PAUSED))
            elif not on and flag is not None:
                session.delete(flag)

    @property
    def paused(self) -> bool:
        with Session(self._reading) as session:
            return session.get(FlagRow, PAUSED) is not None

    def forget(self, seconds: float) -> int:
        """Delete jobs that have been over for so long; returns how many. Their files are then nobody's."""
        with Session(self._engine) as session, session.begin():
            old = (JobRow.state.in_(OVER), JobRow.finished < self._now(session) - seconds)
            gone = list(session.scalars(select(JobRow.seq).where(*old)))
            session.execute(delete(FileRow).where(FileRow.job_seq.in_(select(JobRow.seq).where(*old))))
            session.execute(delete(JobRow).where(*old))
            return len(gone)

    def unused(self, names: Iterable[str]) -> list[str]:
        """Those of some files' names that no job reads or has made."""
        with Session(self._reading) as session:
            return [
                name
                for name in names
                if session.scalars(select(FileRow.seq).where(FileRow.sha256 == name).limit(1)).first() is None
            ]

    def owns(self, name: str, user: str | None = None) -> bool:
        """Whether a file was made by a job, of this user where one is named."""
        found = select(FileRow.seq).join(JobRow, FileRow.job_seq == JobRow.seq)
        found = found.where(FileRow.sha256 == name, FileRow.out)
        with Session(self._reading) as session:
            return (
                session.scalars((found if user is None else found.where(JobRow.user == user)).limit(1)).first()
                is not None
            )

    def _now(self, session: Session) -> float:
        """Seconds since 1970 by the one clock that all workers share: the database's, where it is a server."""
        if self._clock is not None:
            return self._clock()
        if self._engine.dialect.name == "sqlite":
            return time.time()
        return float(session.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0)

    def _next(self, session: Session, now: float, leave: Collection[str]) -> JobRow | None:
        """The job to draw next, locked: of the highest priority; of the user with the fewest at work; the oldest.

        Jobs that another process is about to take are passed over.
        """
        first = select(JobRow.priority).where(*ready(now, leave)).order_by(JobRow.priority.desc()).limit(1)
        top = session.scalar(first)
        while top is not None:
            for user in session.scalars(turns(top, now, leave)).all():
                wanted = select(JobRow).where(*ready(now), JobRow.priority == top, JobRow.user == user)
                wanted = wanted.order_by(JobRow.seq).limit(1).with_for_update(skip_locked=True, of=JobRow)
                if (row := session.scalars(wanted).first()) is not None:
                    return row
            top = session.scalar(first.where(JobRow.priority < top))
        return None

    def _row(self, session: Session, id: str, user: str | None, lock: bool = False) -> JobRow | None:
        if not ID.fullmatch(id):
            return None
        wanted = select(JobRow).where(JobRow.id == id, *([] if user is None else [JobRow.user == user]))
        return session.scalars(wanted.with_for_update() if lock else wanted).first()

    def _held(self, id: str, worker: str, end: Callable[[JobRow, float], None]) -> bool:
        """Change a job that its worker still has, which then is nobody's."""
        with Session(self._engine) as session, session.begin():
            row = self._row(session, id, None, lock=True)
            if row is None or row.state != RUNNING or row.worker != worker:
                return False
            end(row, self._now(session))
            row.worker = row.lease = None
            return True

    def _expire(self, session: Session, lost: Any) -> int:
        """Take back jobs at work that are lost; those that were to be cancelled are, and those lost too often fail."""
        wanted = select(JobRow).where(JobRow.state == RUNNING, lost).with_for_update(skip_locked=True, of=JobRow)
        rows = session.scalars(wanted).all()
        for row in rows:
            row.crashes, row.worker, row.lease, row.done = row.crashes + 1, None, None, 0
            if row.cancelling:
                row.state, row.finished = CANCELLED, self._now(session)
            elif row.crashes > MAX_CRASHES:
                row.state, row.finished = FAILED, self._now(session)
                row.error = f"its worker ended {row.crashes} times while drawing it"
            else:
                row.state = QUEUED
        return len(rows)

    def _same(self, session: Session, user: str, key: str | None, job: dict[str, Any]) -> Entry | None:
        """The job that a user has submitted under a key."""
        if key is None:
            return None
        row = session.scalars(select(JobRow).where(JobRow.user == user, JobRow.key == key)).first()
        if row is not None and row.job != job:
            raise Conflict(f"idempotency key={key[:40]!r}: it was used for another job")
        return None if row is None else _entry(row)

    def _check_room(self, session: Session, user: str, most: int) -> None:
        waiting = select(func.count(JobRow.seq)).where(JobRow.user == user, JobRow.state.in_((QUEUED, RUNNING)))
        if (session.scalar(waiting) or 0) >= most:
            raise Full(f"jobs: {user!r} has {most} unfinished ones, and no more may wait")
