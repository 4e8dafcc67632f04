"""OpenAI's requests for pictures -> our plain jobs, and its form of errors. What cannot be done is refused.

Source: the request types of OpenAI's Python client 3.54 (images.generate, images.edit, images.create_variation) and
its form of errors. Knows no HTTP.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sfumato.families import Family
from sfumato.images import Picture
from sfumato.server.worker import PREFIX, Stores, png_of

SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
SEEDS = 2**32
# How many of the model's usual steps a quality takes.
QUALITIES: Mapping[str, float] = {
    "low": 0.5, "auto": 1.0, "standard": 1.0, "medium": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 3.0,
}  # fmt: skip
STYLES: Mapping[str, float] = {"natural": 1.0, "vivid": 1.25}  # times the model's usual guidance
VARIATION_STRENGTH = 0.7  # how much of a picture's noise comes back where a variation of it is asked for
OWN = ("negative", "seed", "steps", "guidance", "sampler", "schedule", "strength")  # fields of our Job, beside theirs
PARAMS = {"width": "size", "height": "size", "pixels": "size", "count": "n"}  # our fields by the names of theirs
TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "rate_limit_exceeded"}


class Asked(BaseModel):
    """The fields of all three requests together, and OWN. Others are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str = ""
    n: int | None = Field(1, ge=1, le=10)
    size: str | None = "auto"
    quality: str | None = "auto"
    style: str | None = None
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: str | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    background: str | None = "auto"
    moderation: Literal["low", "auto"] | None = "auto"  # nothing is sifted here
    input_fidelity: str | None = None
    stream: bool | None = False
    partial_images: int | None = 0
    user: str | None = None  # who asks is told by the key
    safety_identifier: str | None = None
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    strength: float | None = None


def job_of(asked: Asked, family: Family) -> dict[str, Any]:
    """The plain job of a request's words. ValueError names the field that cannot be done."""
    _refuse(asked)
    usual = family.defaults
    job: dict[str, Any] = {"prompt": asked.prompt, "count": asked.n or 1, "seed": secrets.randbelow(SEEDS)}
    job["steps"] = max(1, round(usual.steps * _share("quality", asked.quality or "auto", QUALITIES)))
    if asked.style is not None:
        job["guidance"] = usual.guidance * _share("style", asked.style, STYLES)
    if asked.size not in (None, "auto"):
        found = SIZE.fullmatch(asked.size)
        if found is None:
            raise ValueError(f"size={asked.size[:40]!r}: 'auto' or WIDTHxHEIGHT is needed, such as 512x512")
        job |= {"width": int(found[1]), "height": int(found[2])}
    said = {name: getattr(asked, name) for name in OWN}
    return job | {name: value for name, value in said.items() if value is not None}


def over_picture(job: dict[str, Any], name: str, picture: Picture, mask: Picture | None, stores: Stores) -> None:
    """Make a job one that edits a picture: where the mask is transparent, else the picture, else all of it."""
    job["image"] = PREFIX + name
    if "width" in job:
        job["resize"] = "crop"
    if mask is None and picture.alpha is None:
        return
    job.setdefault("strength", 1.0)  # what is transparent is drawn anew, whatever lies there
    if mask is None:
        job["from_alpha"] = True
        return
    if mask.alpha is None:
        raise ValueError("mask: nowhere transparent; what is transparent in it is drawn anew")
    if mask.alpha.shape != picture.pixels.shape[:2]:
        (tall, wide), (height, width) = mask.alpha.shape, picture.pixels.shape[:2]
        raise ValueError(f"mask: {wide} x {tall} px, the image has {width} x {height}; the same size is needed")
    white = np.repeat(255 - mask.alpha[..., None], 3, axis=2)
    job["mask"] = PREFIX + stores.pictures.put(png_of(white))


def variation(job: dict[str, Any], name: str) -> None:
    """Make a job one that draws a picture again with other noise."""
    job["image"] = PREFIX + name
    job.setdefault("strength", VARIATION_STRENGTH)
    if "width" in job:
        job["resize"] = "crop"


def failure(status: int, message: str, field: str | None = None) -> tuple[int, dict[str, Any]]:
    """What is wrong as OpenAI says it, with the status that it has there: a wrong field is 400."""
    status = 400 if status == 422 else status
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    code = "model_not_found" if field == "model" else CODES.get(status)
    param = None if field is None else PARAMS.get(field, field)
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _share(name: str, value: str, known: Mapping[str, float]) -> float:
    if value not in known:
        raise ValueError(f"{name}={value[:40]!r}: one of {', '.join(known)}")
    return known[value]


def _one_of(name: str, value: str | None, known: Sequence[str]) -> None:
    if value not in (None, *known):
        raise ValueError(f"{name}={str(value)[:40]!r}: one of {', '.join(known)}")


def _refuse(asked: Asked) -> None:
    """ValueError for what is not known here."""
    _one_of("output_format", asked.output_format, ("png", "jpeg", "webp"))
    _one_of("background", asked.background, ("auto", "opaque"))
    if asked.stream or asked.partial_images:
        raise ValueError("stream: answers come whole here; GET /v1/jobs/ID/events tells of progress")
    if asked.input_fidelity is not None:
        raise ValueError("input_fidelity: not known here; strength says how much of a picture is drawn anew")
    if asked.output_format in (None, "png"):
        if asked.output_compression is not None:
            raise ValueError(f"output_compression={asked.output_compression}: not of png, which loses nothing")
    elif asked.response_format == "url":
        raise ValueError(f"output_format={asked.output_format!r}: a URL leads to a png; ask for b64_json")
