"""The words of our own HTTP API, as pydantic reads and writes them; those of a job are made of the dataclass Job."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model
from pydantic import Field as Note

from sfumato.server.protecting import told_by
from sfumato.server.queue import Entry
from sfumato.server.store import Store
from sfumato.types import Job

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Problem(BaseModel):
    """What is wrong, in one line, and with which field, where it is one's."""

    field: str | None = None
    message: str


class Failure(BaseModel):
    """Every answer but of the 2xx."""

    error: Problem


class ForeignFailure(BaseModel):
    """The same as A1111 answers it."""

    error: str
    detail: str
    body: str = ""
    errors: str = ""


class OpenaiProblem(BaseModel):
    """What is wrong as OpenAI says it: `param` is the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenaiFailure(BaseModel):
    """The same as OpenAI answers it."""

    error: OpenaiProblem


class Progress(BaseModel):
    """Steps behind a job, of all its pictures."""

    done: int
    total: int


class Verdict(BaseModel):
    """What a checker said of a picture under the server's policy: report, blur or withhold."""

    policy: str
    flagged: bool
    scores: dict[str, float]
    checker: str


class Marked(BaseModel):
    """The invisible mark in a picture."""

    text: str
    method: str


class Drawing(BaseModel):
    """One picture that was drawn: its SHA-256, and where it is.

    `safety` is none where nothing looks at pictures, `signed_by` the public key (base64) of the signature in it.
    """

    sha256: str
    url: str
    safety: Verdict | None = None
    watermark: Marked | None = None
    signed_by: str | None = None


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


def drawing(sha256: str, results: Store) -> Drawing:
    """A result as it is answered."""
    told = told_by(results.path(sha256))
    return Drawing(
        sha256=sha256, url=f"/v1/results/{sha256}.png", signed_by=told.signed_by,
        safety=None if told.safety is None else Verdict(**told.safety),
        watermark=None if told.watermark is None else Marked(**told.watermark),
    )  # fmt: skip


def view(entry: Entry, results: Store, done: int | None = None, total: int | None = None) -> JobView:
    """A job as it is answered; `done` of `total` steps where somebody knows better than the queue."""
    return JobView(
        id=entry.id, cursor=entry.seq, state=typing.cast(State, entry.state), priority=entry.priority,
        created=entry.created, started=entry.started, finished=entry.finished, seconds=entry.seconds,
        attempts=entry.attempts, cancelling=entry.cancelling,
        progress=Progress(done=entry.done if done is None else done, total=entry.total if total is None else total),
        results=[drawing(name, results) for name in entry.results],
        error=None if entry.error is None else Problem(field=entry.field, message=entry.error),
        job=entry.job,
    )  # fmt: skip


def failures(kind: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a door's routes answer where something is wrong, for the document; the gate has our own form for all."""
    said = (
        (400, "not readable"), (401, "a key is needed"), (403, "not from there"), (404, "no such thing"),
        (409, "cancelled, or the idempotency key was used for another job"), (413, "too much"),
        (422, "a field is wrong"),
        (429, "too often, or too many waiting: Retry-After says for how long"), (500, "a fault of ours"),
        (503, "not now: Retry-After says for how long"),
    )  # fmt: skip
    return {
        status: {"model": kind | Failure if status in (403, 413) else kind, "description": description}
        for status, description in said
    }


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
