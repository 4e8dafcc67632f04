"""The words of our own HTTP API, as pydantic reads and writes them; those of a job are made of the dataclass Job."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model
from pydantic import Field as Note

from sfumato.server.queue import Entry
from sfumato.types import Job

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Problem(BaseModel):
    """What is wrong, in one line, and with which field, where it is one's."""

    field: str | None = None
    message: str


class Failure(BaseModel):
    """Every answer but of the 2xx."""

    error: Problem


class Progress(BaseModel):
    """Steps behind a job, of all its pictures."""

    done: int
    total: int


class Drawing(BaseModel):
    """One picture that was drawn: its SHA-256, and where it is."""

    sha256: str
    url: str


class JobView(BaseModel):
    """A job of the queue. Times are seconds since 1970, `seconds` those of the drawing; `cursor` is for lists."""

    id: str
    cursor: int
    state: State
    priority: int
    created: float
    started: float | None
    finished: float | None
    seconds: float | None
    attempts: int
    cancelling: bool
    progress: Progress
    results: list[Drawing]
    error: Problem | None
    job: dict[str, Any]


class JobList(BaseModel):
    """One page, newest first; `next` is the next page's `before`, none at the end."""

    jobs: list[JobView]
    next: int | None


class PictureView(BaseModel):
    """A picture that was handed in: jobs name it by `name`."""

    name: str
    sha256: str
    width: int
    height: int


class ModelView(BaseModel):
    """A model that draws here."""

    name: str
    family: str
    hash: str
    size: int
    steps: int
    guidance: float
    sampler: str


class Listed(BaseModel):
    """A model as OpenAI's API lists it; `created` is since when it is served, in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sfumato"


class ModelList(BaseModel):
    """The models that a job may name, and the other names that it may use."""

    object: Literal["list"] = "list"
    data: list[Listed]
    models: list[ModelView]
    samplers: list[str]
    schedules: list[str]
    upscalers: list[str]
    loras: list[str]
    hypernets: list[str]
    embeddings: list[str]
    controls: list[str]


class Health(BaseModel):
    """Whether all is well, and what is not."""

    ok: bool
    why: str | None = None


def view(entry: Entry, done: int | None = None, total: int | None = None) -> JobView:
    """A job as it is answered; `done` of `total` steps where somebody knows better than the queue."""
    return JobView(
        id=entry.id, cursor=entry.seq, state=typing.cast(State, entry.state), priority=entry.priority,
        created=entry.created, started=entry.started, finished=entry.finished, seconds=entry.seconds,
        attempts=entry.attempts, cancelling=entry.cancelling,
        progress=Progress(done=entry.done if done is None else done, total=entry.total if total is None else total),
        results=[Drawing(sha256=name, url=f"/v1/results/{name}.png") for name in entry.results],
        error=None if entry.error is None else Problem(field=entry.field, message=entry.error),
        job=entry.job,
    )  # fmt: skip


@cache
def schema_of(kind: type[Any], name: str) -> type[BaseModel]:
    """A pydantic model of a dataclass: the same fields and defaults, and no others."""
    hints = typing.get_type_hints(kind)
    entries: dict[str, Any] = {field.name: (_type(hints[field.name]), _default(field)) for field in fields(kind)}
    return create_model(name, __config__=ConfigDict(extra="forbid"), __doc__=kind.__doc__, **entries)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return Note(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def _type(hint: Any) -> Any:
    """A type hint with the dataclasses within it replaced by pydantic models."""
    if isinstance(hint, type) and is_dataclass(hint):
        return schema_of(hint, hint.__name__)
    if isinstance(hint, types.UnionType):
        return typing.Union[tuple(_type(each) for each in typing.get_args(hint))]  # noqa: UP007 - of a tuple
    if typing.get_origin(hint) is tuple:
        return list[_type(typing.get_args(hint)[0])]  # type: ignore[misc]
    return hint


def _order_model() -> type[BaseModel]:
    base = schema_of(Job, "Job")
    return create_model(
        "JobOrder",
        __base__=base,
        __doc__="A job to draw, and how urgent it is. `model` is one of GET /v1/models; none is the first of them.",
        model=(str | None, None),
        priority=(int, Note(0, ge=-100, le=100)),
    )


JobOrder: Any = _order_model()
