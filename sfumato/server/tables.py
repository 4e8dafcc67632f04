"""The queue's tables, and the database that holds them: SQLite in WAL mode, or another by its URL. Knows no rules."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from sqlalchemy import JSON, Engine, ForeignKey, Index, UniqueConstraint, create_engine, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.pool import ConnectionPoolEntry

BUSY_SECONDS = 30  # how long a writer waits for another
MAKING = 0x5FA70  # the lock of PostgreSQL's that whoever makes the tables takes


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012 - SQLAlchemy reads it from the class


class JobRow(Base):
    """One accepted job. Times are seconds since 1970; `lease` is until when its worker has it.

    `attempts` counts how often drawing it failed, `crashes` how often its worker died with it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("user", "key"),
        Index("jobs_by_state", "state", "user"),
        Index("jobs_to_begin", "state", "priority", "user", "seq"),
        Index("jobs_by_lease", "state", "lease"),
        Index("jobs_by_user", "user", "seq"),
    )

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    user: Mapped[str]
    key: Mapped[str | None]
    state: Mapped[str]
    priority: Mapped[int]
    job: Mapped[dict[str, Any]]
    created: Mapped[float]
    after: Mapped[float] = mapped_column(default=0.0)  # not to be begun before
    started: Mapped[float | None]
    finished: Mapped[float | None] = mapped_column(index=True)
    worker: Mapped[str | None]
    lease: Mapped[float | None]
    attempts: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    done: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=0)
    cancelling: Mapped[bool] = mapped_column(default=False)
    seconds: Mapped[float | None]
    field: Mapped[str | None]
    error: Mapped[str | None]
    files: Mapped[list[FileRow]] = relationship(
        order_by="FileRow.place", cascade="all, delete-orphan", lazy="selectin", passive_deletes=True
    )


class FileRow(Base):
    """A file by its SHA-256 that a job reads (`out` false) or has made, the picture at `place`."""

    __tablename__ = "files"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_seq: Mapped[int] = mapped_column(ForeignKey("jobs.seq", ondelete="CASCADE"), index=True)
    place: Mapped[int]
    out: Mapped[bool]
    sha256: Mapped[str] = mapped_column(index=True)


class FlagRow(Base):
    """A switch of the whole queue that is on."""

    __tablename__ = "flags"

    name: Mapped[str] = mapped_column(primary_key=True)


def open_database(url: str) -> Engine:
    """The database of a URL, with its tables. A SQLite file is written through to the disk at every commit."""
    sqlite = url.startswith("sqlite")
    engine = create_engine(url, pool_pre_ping=not sqlite, connect_args={"timeout": BUSY_SECONDS} if sqlite else {})
    if sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # which cannot make one table for two servers that begin together
            connection.execute(select(func.pg_advisory_xact_lock(MAKING)))
        Base.metadata.create_all(connection)
        for index in (index for table in Base.metadata.tables.values() for index in table.indexes):
            index.create(connection, checkfirst=True)  # also where the tables are older than it
    return engine


def _set_up_sqlite(connection: Any, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where we say so
    _write_ahead(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: Any) -> None:
    """Turn to the write-ahead log. Where others turn a new file at the same moment, SQLite says at once that it is
    locked, however long it was told to wait: it would be a deadlock.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Any) -> None:
    """Whoever means to write waits for the others at once, so that nobody reads what another is about to change."""
    reads = connection.get_execution_options().get("reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
