"""OpenAI's API for pictures (/v1/images) on the desk: its requests become jobs of the same queue.

Errors are {"error": {"message", "type", "param", "code"}}, as there. Source: OpenAI's Python client 3.54.
"""

from __future__ import annotations

import base64
import io
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import HTTPException, RequestValidationError
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from sfumato.images import Picture
from sfumato.server.app import DeskOf, UserOf
from sfumato.server.desk import Desk
from sfumato.server.keys import User
from sfumato.server.openai_jobs import Asked, job_of, over_picture, variation
from sfumato.server.orders import keep_picture
from sfumato.server.queue import Entry
from sfumato.server.waiting import drawn
from sfumato.server.words import OpenaiFailure, Verdict, drawing, failures

JPEG_QUALITY = 100  # OpenAI's own, where output_compression says nothing
TEXT = 256 * 1024  # bytes of a part that is no file
router = APIRouter(prefix="/v1/images", responses=failures(OpenaiFailure))


class Drawing(BaseModel):
    """One picture: in base64, or where it is. `safety` is ours: what the server's checker said, where it has one."""

    b64_json: str | None = None
    url: str | None = None
    safety: Verdict | None = None


class Drawings(BaseModel):
    """The pictures of a request; `created` is seconds since 1970, `size` is WxH."""

    created: int
    data: list[Drawing]
    output_format: str
    size: str


def form_of(*files: str) -> dict[str, Any]:
    """A multipart body for the document: the fields of Asked, and files of which the first is needed."""
    own = Asked.model_json_schema()
    parts = {name: {"type": "string", "format": "binary"} for name in files}
    schema = {**own, "properties": {**own["properties"], **parts}, "required": [files[0]]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("/generations")
async def generations(asked: Asked, request: Request, desk: DeskOf, user: UserOf) -> Drawings:
    """Draw from words."""
    return await _answered(asked, _job(asked, desk), request, desk, user)


@router.post("/edits", openapi_extra=form_of("image", "mask"))
async def edits(request: Request, desk: DeskOf, user: UserOf) -> Drawings:
    """Draw over a picture: where the mask is transparent, else where the picture is, else all of it."""
    asked, files = await _form(request)
    job = _job(asked, desk)
    name, picture = await _picture(files, "image", desk)
    mask = None if "mask" not in files else (await _picture(files, "mask", desk))[1]
    over_picture(job, name, picture, mask, desk.stores)
    return await _answered(asked, job, request, desk, user)


@router.post("/variations", openapi_extra=form_of("image"))
async def variations(request: Request, desk: DeskOf, user: UserOf) -> Drawings:
    """Draw a picture again with other noise."""
    asked, files = await _form(request)
    job = _job(asked, desk)
    variation(job, (await _picture(files, "image", desk))[0])
    return await _answered(asked, job, request, desk, user)


def _job(asked: Asked, desk: Desk) -> dict[str, Any]:
    if asked.model not in (None, desk.model_name):
        raise ValueError(f"model={asked.model[:80]!r}: there is {desk.model_name!r}")
    return job_of(asked, desk.pipeline.model.family)


async def _form(request: Request) -> tuple[Asked, dict[str, bytes]]:
    """The words and the files of a multipart body."""
    words: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=20, max_fields=60, max_part_size=TEXT) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name not in ("image", "mask"):
                    raise ValueError(f"{name[:40]}: no such file is known here; image and mask are")
                if name in files:
                    raise ValueError(f"{name}: one picture is edited at a time")
                files[name] = await value.read()
            else:
                words[name] = value
    try:
        return Asked.model_validate(words), files
    except ValidationError as error:
        said = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(said) from error


async def _picture(files: dict[str, bytes], name: str, desk: Desk) -> tuple[str, Picture]:
    """The SHA-256 of a picture that was sent, and what it shows."""
    if name not in files:
        raise ValueError(f"{name}: a picture is needed, as a file of the multipart body")
    return await run_in_threadpool(keep_picture, files[name], desk.stores, name)


async def _answered(asked: Asked, job: dict[str, Any], request: Request, desk: Desk, user: User) -> Drawings:
    entry = await drawn(desk, user, job, request.is_disconnected)
    return await run_in_threadpool(_drawings, entry, asked, str(request.base_url), desk)


def _drawings(entry: Entry, asked: Asked, base: str, desk: Desk) -> Drawings:
    kind = asked.output_format or "png"
    found, size = [], ""
    for sha256 in entry.results:
        path = desk.stores.results.path(sha256)
        if path is None:
            raise HTTPException(404, "a result is gone")
        with Image.open(path) as picture:
            size = f"{picture.width}x{picture.height}"
            content = path.read_bytes() if kind == "png" else _written(picture, kind, asked.output_compression)
        safety = drawing(sha256, desk.stores.results).safety
        if asked.response_format == "url":
            found.append(Drawing(url=f"{base}v1/results/{sha256}.png", safety=safety))
        else:
            found.append(Drawing(b64_json=base64.b64encode(content).decode("ascii"), safety=safety))
    return Drawings(created=int(entry.finished or time.time()), data=found, output_format=kind, size=size)


def _written(picture: Image.Image, kind: str, compression: int | None) -> bytes:
    """A picture as JPEG or WebP; OpenAI's compression of 100 is the best quality."""
    written = io.BytesIO()
    picture.convert("RGB").save(written, kind, quality=JPEG_QUALITY if compression is None else compression)
    return written.getvalue()
