"""Our own HTTP API on a desk: jobs, their events, pictures and models; and what a machine that runs it asks.

Every answer but of the 2xx is {"error": {"field", "message"}}.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException as AnyHTTPException

from sfumato import __version__
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.images import UPSCALERS
from sfumato.server import words
from sfumato.server.desk import LOCAL, Desk
from sfumato.server.events import events
from sfumato.server.gate import MAX_BODY, Gate, foreign_problem, is_loopback, problem
from sfumato.server.keys import Keys, User
from sfumato.server.metrics import Metrics
from sfumato.server.openai_jobs import failure
from sfumato.server.orders import keep_picture
from sfumato.server.queue import Conflict, Full
from sfumato.server.words import JobOrder, State, view
from sfumato.server.worker import PREFIX, field_of
from sfumato.weights.upscalers import packaged_upscalers

log = logging.getLogger(__name__)

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
router = APIRouter()
health = APIRouter()


async def desk_of(request: Request) -> Desk:
    """The desk of the application that is asked."""
    return request.app.state.desk


def user_of(request: Request, authorization: Annotated[str | None, Header()] = None) -> User:
    """Who asks: by `Authorization: Bearer KEY`, or a key as Basic's password, where there are keys.

    401 without, 429 where one asks too often.
    """
    desk: Desk = request.app.state.desk
    user = whose_key(desk, authorization)
    if user is None:
        raise HTTPException(401, "authorization: 'Bearer' and a key are needed", {"WWW-Authenticate": "Bearer"})
    if (seconds := desk.meter.wait(user)) > 0:
        message = f"requests: {user.limits.requests} a minute are allowed"
        raise HTTPException(429, message, {"Retry-After": str(int(seconds) + 1)})
    return user


def whose_key(desk: Desk, authorization: str | None) -> User | None:
    """Whose key a header brings, None where it brings none; the one local user where there are no keys."""
    if not desk.keys.any:
        return User(LOCAL, desk.settings.limits)
    scheme, _, key = (authorization or "").partition(" ")
    return desk.keys.user(_password(key) if scheme.lower() == "basic" else key.strip())


def _password(credentials: str) -> str:
    """The password of HTTP Basic, where programs that know only that put the key; "" where there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


DeskOf = Annotated[Desk, Depends(desk_of)]
UserOf = Annotated[User, Depends(user_of)]


@router.post("/v1/jobs", status_code=202)
def submit(
    order: JobOrder,
    desk: DeskOf,
    user: UserOf,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> words.JobView:
    """Accept a job: the one and only copy is on the disk when this is answered.

    Pictures are named by their SHA-256 (POST /v1/pictures), or handed in as "base64,..." or a data: URL.
    """
    said = order.model_dump(exclude_unset=True)
    priority, model = said.pop("priority", 0), said.pop("model", None)
    if model is not None and model != desk.model_name:
        raise ValueError(f"model={model[:80]!r}: there is {desk.model_name!r}")
    if desk.closing:
        raise HTTPException(503, "the server is ending", {"Retry-After": "5"})
    return view(desk.submit(said, user, priority, idempotency_key), desk.stores.results)


@router.get("/v1/jobs")
def jobs(
    desk: DeskOf,
    user: UserOf,
    state: State | None = None,
    before: Annotated[int | None, Query(ge=0, le=2**31)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> words.JobList:
    """One's jobs, newest first, in pages."""
    found = desk.queue.page(user.name, state, before, limit)
    listed = [view(entry, desk.stores.results) for entry in found]
    return words.JobList(jobs=listed, next=found[-1].seq if len(found) == limit else None)


@router.get("/v1/jobs/{id}")
def job(id: str, desk: DeskOf, user: UserOf) -> words.JobView:
    """One's job."""
    entry = desk.queue.get(id, user.name)
    if entry is None:
        raise HTTPException(404, "there is no such job")
    ticket = desk.worker.ticket(id)
    done, total = (None, None) if ticket is None else (ticket.done, ticket.total)
    return view(entry, desk.stores.results, done, total)


@router.get("/v1/jobs/{id}/events", response_class=StreamingResponse)
async def job_events(id: str, desk: DeskOf, user: UserOf, preview: bool = True) -> StreamingResponse:
    """Server-sent events until the job is over: `state` (a JobView), `progress`, `preview` (a PNG in base64)."""
    if await run_in_threadpool(desk.queue.get, id, user.name) is None:
        raise HTTPException(404, "there is no such job")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(desk, id, preview), media_type="text/event-stream", headers=headers)


@router.delete("/v1/jobs/{id}")
def cancel(id: str, desk: DeskOf, user: UserOf) -> words.JobView:
    """Cancel a job; one at work ends before its next step, one that is over stays as it is."""
    entry = desk.cancel(id, user)
    if entry is None:
        raise HTTPException(404, "there is no such job")
    return view(entry, desk.stores.results)


@router.post("/v1/pictures", status_code=201, openapi_extra={
    "requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
})  # fmt: skip
async def send_picture(request: Request, desk: DeskOf, user: UserOf) -> words.PictureView:
    """Hand in a picture, the body being its file; jobs then name it by `name`."""
    content = await request.body()
    sha256, picture = await run_in_threadpool(keep_picture, content, desk.stores)
    height, width = picture.pixels.shape[:2]
    return words.PictureView(name=PREFIX + sha256, sha256=sha256, width=width, height=height)


@router.get("/v1/results/{sha256}.png", response_class=FileResponse)
def result(sha256: str, desk: DeskOf, user: UserOf) -> FileResponse:
    """A picture that one of one's jobs has drawn, with its recipe inside."""
    path = desk.stores.results.path(sha256)
    if path is None or not desk.queue.owns(sha256, user.name):
        raise HTTPException(404, "there is no such picture")
    forever = {"Cache-Control": "private, max-age=31536000, immutable", "ETag": f'"{sha256}"'}
    return FileResponse(path, media_type="image/png", headers=forever)


@router.get("/v1/models")
def models(request: Request, desk: DeskOf, user: UserOf) -> words.ModelList:
    """The models, and all other names that a job may use; `object` and `data` are what OpenAI's clients read."""
    model, shelf = desk.pipeline.model, desk.pipeline.extras.shelf
    usual = model.family.defaults
    own = words.ModelView(
        name=model.name, family=model.family.name, hash=model.hash, size=model.family.size,
        steps=usual.steps, guidance=usual.guidance, sampler=usual.sampler,
    )  # fmt: skip
    kinds = {kind: sorted(shelf.files(kind)) for kind in ("lora", "hypernet", "embedding", "control")}
    listed = words.Listed(id=model.name, created=request.app.state.began)
    return words.ModelList(
        data=[listed], models=[own], samplers=sorted(SAMPLERS), schedules=sorted(SCHEDULES),
        upscalers=sorted({*UPSCALERS, *packaged_upscalers()}), loras=kinds["lora"], hypernets=kinds["hypernet"],
        embeddings=kinds["embedding"], controls=kinds["control"],
    )  # fmt: skip


@router.get("/metrics", response_class=Response)
def metrics(request: Request, user: UserOf) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


@health.get("/healthz")
async def healthz() -> words.Health:
    """200 while the process answers."""
    return words.Health(ok=True)


@health.get("/readyz", responses={503: {"model": words.Health}})
async def readyz(desk: DeskOf, response: Response) -> words.Health:
    """200 while it can draw. Asked beside the threads that requests share, so that it is never late for them."""
    try:
        why = await asyncio.to_thread(desk.problem)
    except SQLAlchemyError:
        log.exception("the queue does not answer")
        why = "the queue does not answer"
    response.status_code = 200 if why is None else 503
    return words.Health(ok=why is None, why=why)


def create_app(
    desk: Desk,
    *,
    routers: Sequence[APIRouter] = (),
    only_local: bool = True,
    grace: float = 10.0,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The application on a desk, with other doors' `routers` beside our own.

    In the end it closes the desk, with `grace` s for what is at work.

    `only_local` says that it listens on loopback and may be called only by this machine's own names;
    `max_body` bounds the bytes of a request.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(desk.close, grace)

    app = FastAPI(
        title="Sfumato",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses=words.failures(words.Failure),
    )
    app.state.desk, app.state.metrics = desk, Metrics(desk.queue, desk.service)
    app.state.began = int(time.time())
    app.include_router(router)
    for each in (health, *routers):
        app.include_router(each)
    app.add_middleware(Gate, metrics=app.state.metrics, hosts=LOCAL_NAMES if only_local else None, max_body=max_body)
    app.add_exception_handler(RequestValidationError, _wrong_form)
    app.add_exception_handler(AnyHTTPException, _refused)
    app.add_exception_handler(ValueError, _wrong_value)
    app.add_exception_handler(SQLAlchemyError, _no_queue)
    app.add_exception_handler(Exception, _fault)
    return app


def check_bind(host: str, keys: Keys) -> None:
    """ValueError where others than this machine could reach a server that asks for no key."""
    if not is_loopback(host) and not keys.any:
        raise ValueError(
            f"host={host!r}: others could draw here without a key; `sfumato serve keys add NAME` makes one"
        )


async def _wrong_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]  # behind whether it is of the body, the query or a header
    if first["type"] == "json_invalid":
        return _said(request, 400, "body: not JSON")
    field = ".".join(where)[:100] or None
    return _said(request, 422, f"{field or 'body'}: {first['msg']}", field)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return _said(request, error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _wrong_value(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValueError)
    status = 409 if isinstance(error, Conflict) else 429 if isinstance(error, Full) else 422
    headers = {"Retry-After": "5"} if isinstance(error, Full) else None
    return _said(request, status, request.app.state.desk.worker.plain(str(error)), field_of(error), headers)


async def _no_queue(request: Request, error: Exception) -> Response:
    log.error("the queue does not answer", exc_info=error)
    return _said(request, 503, "the queue does not answer", headers={"Retry-After": "5"})


async def _fault(request: Request, error: Exception) -> Response:
    log.error("a fault", exc_info=error)
    return _said(request, 500, "a fault of the server's; its log says more")


def _said(
    request: Request, status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """What is wrong, in the words of the door that was knocked at."""
    if request.url.path.startswith(("/sdapi/", "/controlnet/")):
        return foreign_problem(status, message, headers)
    if request.url.path.startswith("/v1/images/"):
        status, content = failure(status, message, field)
        return Response(json.dumps(content), status, headers, media_type="application/json")
    return problem(status, message, field, headers)
