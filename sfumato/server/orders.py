"""What a request may ask for: plain JSON -> a checked job. Nothing in it names a path, an address or code.

Pictures are named by their SHA-256 or handed in as base64; networks by names on the shelf. Every refusal is a
ValueError that names the field.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import json
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sfumato.families import Family
from sfumato.images import UPSCALERS, Picture
from sfumato.images.annotate import ANNOTATORS
from sfumato.images.reading import DAMAGE, KINDS
from sfumato.pipeline import Pipeline
from sfumato.prompts.networks import Hypernet, Lora
from sfumato.server.hints import check_control, check_hint_memory
from sfumato.server.keys import Limits
from sfumato.server.worker import PREFIX, Stores, names_in
from sfumato.tasks.checks import complete, job_from_dict
from sfumato.tasks.pictures import PICTURES, Pictures
from sfumato.tasks.plot import final_size
from sfumato.tasks.room import check_memory
from sfumato.tasks.telling import networks_of
from sfumato.types import Job
from sfumato.weights.shelf import Shelf
from sfumato.weights.upscalers import packaged_upscalers

MAX_TEXT = 20_000  # characters of a prompt
MAX_CONTROLS = 8
MAX_PICTURE_PIXELS = 50_000_000
NAMED = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
INLINE = re.compile(r"(?:data:image/[a-z0-9.+-]{1,40};)?base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Order:
    """A job that may be drawn: as plain JSON, complete, and the SHA-256 of the pictures that it names.

    `size` is the (width, height) in px of the pictures that it draws.
    """

    plain: dict[str, Any]
    job: Job
    files: tuple[str, ...]
    size: tuple[int, int]


def check_picture(content: bytes, field: str = "image") -> tuple[int, int]:
    """(width, height) of a picture's bytes, read from its header alone. ValueError where it is none, or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=KINDS) as picture:
                width, height = picture.size
    except DAMAGE as error:
        raise ValueError(f"{field}: not a picture of a kind that is known") from error
    if width * height > MAX_PICTURE_PIXELS:
        raise ValueError(f"{field}: {width} x {height} px; {MAX_PICTURE_PIXELS} in all are allowed")
    return width, height


def keep_picture(content: bytes, stores: Stores, field: str = "image") -> tuple[str, Picture]:
    """Keep a picture that was handed in; returns its SHA-256 and what it shows. ValueError where it cannot be read."""
    check_picture(content, field)
    name = stores.pictures.put(content)
    try:
        return name, stores.find(PREFIX + name, field)
    except ValueError:
        stores.pictures.remove(name)
        raise


def picture_bytes(text: str, field: str = "image") -> bytes:
    """The file of a picture in base64: bare, behind "base64,", or a data: URL. ValueError where it is not that."""
    found = INLINE.match(text)
    try:
        return base64.b64decode(text[found.end() :] if found else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{field}: not base64") from error


def _named(value: Any, field: str, stores: Stores) -> str:
    """The name "sha256:..." of a picture that a request names or hands in."""
    if not isinstance(value, str):
        raise ValueError(f"{field}={value!r}: text is needed, the SHA-256 of a picture that was sent, or base64")
    if found := NAMED.fullmatch(value):
        stores.pictures.touch(found[1])
        return PREFIX + found[1]
    if INLINE.match(value):
        return PREFIX + keep_picture(picture_bytes(value, field), stores, field)[0]
    raise ValueError(
        f"{field}={value[:60]!r}: the SHA-256 of a picture that was sent is needed, or 'base64,' and its bytes"
    )


def with_pictures(plain: dict[str, Any], stores: Stores) -> dict[str, Any]:
    """The job with every picture named by its SHA-256."""
    plain = dict(plain)
    for field in PICTURES:
        if plain.get(field) is not None:
            plain[field] = _named(plain[field], field, stores)
    controls = plain.get("controls")
    if isinstance(controls, (list, tuple)):
        if len(controls) > MAX_CONTROLS:
            raise ValueError(f"controls: {len(controls)} of them; {MAX_CONTROLS} are allowed")
        plain["controls"] = [
            {**control, "image": _named(control["image"], f"controls[{number}].image", stores)}
            if isinstance(control, dict) and control.get("image") is not None
            else control
            for number, control in enumerate(controls)
        ]
    return plain


def order_from(plain: dict[str, Any], pipeline: Pipeline, stores: Stores, limits: Limits) -> Order:
    """A request's job, checked as far as it can be without drawing. ValueError names the field."""
    plain = with_pictures(plain, stores)
    _check_texts(plain)
    job = job_from_dict(plain)
    pictures = {name: stores.find(name, _field_of(plain, name)) for name in names_in(plain)}
    shelf = Pictures(pictures)
    job = complete(job, pipeline.model.family, shelf.size(job))
    try:
        json.dumps(plain, allow_nan=False)
    except ValueError as error:
        raise ValueError("options: every number must be finite") from error
    _check_names(job, pipeline.extras.shelf)
    _check_limits(job, shelf.size(job), pipeline.model.family, limits)
    check_memory([job], pipeline.model, shelf, pipeline.tile)
    for number, control in enumerate(job.controls):
        if control.annotate in ANNOTATORS:
            drawn = int(job.width or 0), int(job.height or 0)
            check_hint_memory(control.annotate, drawn, pipeline.model.device, f"controls[{number}].annotate")
    size = final_size(job, pipeline.model, shelf)
    return Order(plain, job, tuple(name.removeprefix(PREFIX) for name in pictures), size)


def _field_of(plain: dict[str, Any], name: str) -> str:
    return next((field for field in PICTURES if plain.get(field) == name), "controls")


def _check_texts(plain: dict[str, Any]) -> None:
    hires = plain.get("hires")
    second = hires if isinstance(hires, dict) else {}
    texts = [(name, plain.get(name)) for name in ("prompt", "negative")]
    texts += [(f"hires.{name}", second.get(name)) for name in ("prompt", "negative")]
    for name, text in texts:
        if isinstance(text, str) and len(text) > MAX_TEXT:
            raise ValueError(f"{name}: {len(text)} characters; {MAX_TEXT} are allowed")


def _check_names(job: Job, shelf: Shelf) -> None:
    """ValueError for a network that is on no list, and for whatever looks like a path."""
    if job.upscaler is not None:
        _require("upscaler", job.upscaler, {*UPSCALERS, *packaged_upscalers()})
    for number, control in enumerate(job.controls):
        _require(f"controls[{number}].model", control.model, shelf.files("control"))
        check_control(control, number, shelf)
    for network in networks_of(job):
        if isinstance(network, Lora):
            _require("prompt: lora", network.name, shelf.files("lora"))
        elif isinstance(network, Hypernet):
            _require("prompt: hypernet", network.name, shelf.files("hypernet"))


def _require(field: str, name: str, known: Collection[str]) -> None:
    if name in known or name.lower() in {each.lower() for each in known}:
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(
        f"{field}={name[:80]!r}: there is no such one here{f'; did you mean {near[0]!r}?' if near else ''}"
    )


def _check_limits(job: Job, size: tuple[int, int] | None, family: Family, limits: Limits) -> None:
    """ValueError where a complete job, whose image has a size (height, width), is more than one may ask for."""
    width, height = int(job.width or family.size), int(job.height or family.size)
    scale = 1.0 if job.hires is None else job.hires.scale
    pixels = width * height * scale**2
    if size is not None and job.upscale is not None:
        pixels = max(pixels, size[0] * size[1] * job.upscale**2)
    if size is not None:
        pixels = max(pixels, float((size[0] + job.up + job.down) * (size[1] + job.left + job.right)))
    steps = max(int(job.steps or 1), 0 if job.hires is None else int(job.hires.steps or 0))
    pixels *= job.count
    for name, value in (("count", job.count), ("steps", steps), ("pixels", pixels)):
        most = getattr(limits, name)
        if value > most:
            raise ValueError(f"{name}={value:.0f}: {most} are allowed in a job")
