"""The form: what is typed, chosen and dropped on the page <-> our plain jobs.

Knows no Gradio and no queue. A form is a dict with the names of FIELDS; blanks ("" and None) leave a field open.
Letters: H W pixels.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.diffusion.samplers import resolve
from sfumato.images import RECIPE_KEY
from sfumato.server.infotext import KEY, parsed
from sfumato.server.orders import check_picture, keep_picture
from sfumato.server.worker import PREFIX, Stores, png_of

MODES = ("text", "picture", "inpaint", "outpaint", "upscale")
OWN = "its own"  # what a list calls the model's or the sampler's own choice
SEEDS = 2**32
WHOLE = ("width", "height", "steps", "count", "seed", "left", "right", "up", "down")
SIMPLE = ("width", "height", "steps", "guidance", "sampler", "schedule", "count")
FIELDS = (
    "mode", "prompt", "negative", *SIMPLE, "seed", "hires", "hires_scale", "hires_strength", "more",
    "picture", "strength", "drawn", "fill", "only_masked", "inpaint_strength",
    "ground", "left", "right", "up", "down", "small", "upscale", "upscaler", "upscale_strength",
    "control", "annotate", "control_picture", "control_weight",
)  # fmt: skip


def job_of(form: Mapping[str, Any], stores: Stores) -> dict[str, Any]:
    """The plain job of a form; its pictures are kept. ValueError names the field."""
    mode = form.get("mode") or "text"
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: one of {', '.join(MODES)}")
    said = {name: _number(name, form.get(name)) for name in (*SIMPLE, "left", "right", "up", "down", "seed")}
    job: dict[str, Any] = {"prompt": form.get("prompt") or "", "negative": form.get("negative") or ""}
    job |= {name: said[name] for name in SIMPLE if said[name] not in (None, "", OWN)}
    job["seed"] = secrets.randbelow(SEEDS) if said["seed"] is None else said["seed"]
    if mode == "text":
        if form.get("hires"):
            job["hires"] = {"scale": form["hires_scale"], "strength": form["hires_strength"]}
    else:
        job |= _over_picture(mode, form, said, stores)
    if form.get("control") not in (None, "", OWN):
        job["controls"] = [_control(form, stores)]
    return job | _more(form.get("more"))


def _over_picture(mode: str, form: Mapping[str, Any], said: Mapping[str, Any], stores: Stores) -> dict[str, Any]:
    if mode == "picture":
        return {"image": _kept(form.get("picture"), "picture", stores), "strength": form.get("strength")}
    if mode == "inpaint":
        image, mask = drawing_of(form.get("drawn"))
        found = {"image": _put(image, stores), "mask": _put(mask, stores), "strength": form.get("inpaint_strength")}
        return found | {"fill": form.get("fill") or "original", "only_masked": bool(form.get("only_masked"))}
    if mode == "outpaint":
        sides = {name: said[name] or 0 for name in ("left", "right", "up", "down")}
        if not any(sides.values()):
            raise ValueError("left, right, up, down: how many px of new ground are wanted, at one side at least?")
        return {"image": _kept(form.get("ground"), "picture", stores), "width": None, "height": None, **sides}
    found = {"image": _kept(form.get("small"), "picture", stores), "width": None, "height": None}
    found |= {"upscale": form.get("upscale"), "strength": form.get("upscale_strength")}
    return found if form.get("upscaler") in (None, "", OWN) else {**found, "upscaler": form["upscaler"]}


def drawing_of(drawn: Mapping[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """What lies in the picture editor: the picture and its mask, both (H, W, 3) uint8; the mask is white where drawn.

    `drawn` has a `background` (H, W, 3 or 4) and `layers` (H, W, 4) uint8. ValueError where either is missing.
    """
    background = None if drawn is None else drawn.get("background")
    if drawn is None or background is None:
        raise ValueError("picture: drop one into the editor first")
    mask = np.zeros(background.shape[:2], bool)
    for layer in drawn.get("layers") or ():
        mask |= layer[..., 3] > 0
    if not mask.any():
        raise ValueError("mask: draw with the brush over what is to be drawn anew")
    return flattened(background), np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)


def flattened(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of (H, W), (H, W, 3) or (H, W, 4): what is transparent is laid on white."""
    picture = Image.fromarray(pixels).convert("RGBA")
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(paper, picture).convert("RGB"))


def with_lora(prompt: str, name: str | None, strength: float) -> str:
    """A prompt with a LoRA's tag at its end; the tag that it may have already takes the new strength."""
    return prompt if name in (None, "") else _with(prompt, f"<lora:{name}:", f"<lora:{name}:{strength:g}>")


def with_word(prompt: str, name: str | None) -> str:
    """A prompt with an embedding's name at its end, where it is not there yet."""
    if not name or name in prompt.replace(",", " ").split():
        return prompt
    return f"{prompt.rstrip(', ')}, {name}" if prompt.strip() else name


def form_of(path: Path) -> dict[str, Any]:
    """What the recipe inside a picture fills into a form: ours, or A1111's text. ValueError where there is none."""
    check_picture(path.read_bytes(), "recipe")
    with Image.open(path) as picture:
        ours, theirs = picture.info.get(RECIPE_KEY), picture.info.get(KEY)
    if isinstance(ours, str):
        try:
            recipe = json.loads(ours)
            return _of_job({**recipe["job"], "seed": recipe["seed"], "count": 1})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError("recipe: the one in this picture is damaged") from error
    if isinstance(theirs, str):
        return _of_text(parsed(theirs))
    raise ValueError("recipe: there is none in this picture")


def _of_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """A plain job as a form; what the form has no field for goes into `more`."""
    form = {name: job.get(name) for name in ("prompt", "negative", *SIMPLE, "seed")}
    hires = job.get("hires") or {}
    form |= {"mode": "text", "hires": bool(hires)}
    form |= {f"hires_{name}": hires[name] for name in ("scale", "strength") if name in hires}
    left_out = {*form, "hires", "image", "mask", "depth", "controls", "strength", "resize", "fill", "upscale"}
    left_out |= {"upscaler", "left", "right", "up", "down", "only_masked", "from_alpha", "overlap", "tile"}
    more = {name: value for name, value in job.items() if name not in left_out}
    return {**form, "more": json.dumps(more) if more else ""}


def _of_text(told: Mapping[str, str]) -> dict[str, Any]:
    """A1111's text as a form."""
    sampler, schedule = resolve(told.get("Sampler", "Euler"), told.get("Schedule type", "Automatic"))
    form: dict[str, Any] = {
        "mode": "text",
        "prompt": told.get("Prompt", ""),
        "negative": told.get("Negative prompt", ""),
    }
    form |= {"sampler": sampler.name, "schedule": schedule, "more": json.dumps({"like": "a1111"}), "count": 1}
    for name, key, kind in (
        ("steps", "Steps", int), ("seed", "Seed", int), ("guidance", "CFG scale", float),
        ("width", "Size-1", int), ("height", "Size-2", int),
    ):  # fmt: skip
        if key in told:
            form[name] = kind(told[key])
    return form


def _control(form: Mapping[str, Any], stores: Stores) -> dict[str, Any]:
    control = {"model": form["control"], "weight": form.get("control_weight", 1.0)}
    if form.get("control_picture"):
        control["image"] = _kept(form["control_picture"], "control", stores)
    return control if form.get("annotate") in (None, "", OWN) else {**control, "annotate": form["annotate"]}


def _more(text: str | None) -> dict[str, Any]:
    """Further fields of a job, in JSON."""
    if not text or not text.strip():
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'more: not JSON, such as {{"clip_skip": 2}} ({error.msg})') from error
    if not isinstance(found, dict):
        raise ValueError('more: names and values are needed, such as {"clip_skip": 2}')
    return found


def _number(name: str, value: Any) -> Any:
    """A form's value: None where it is blank; of a field of numbers the number, whole where there is no fraction."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if name in ("sampler", "schedule"):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={str(value)[:40]!r}: a number is needed, or nothing") from error
    whole = name in WHOLE and number.is_integer()
    return int(value if isinstance(value, int) or str(value).strip().isdecimal() else number) if whole else number


def _kept(path: str | None, field: str, stores: Stores) -> str:
    """The name of a picture that was dropped."""
    if not path:
        raise ValueError(f"{field}: drop one first")
    return PREFIX + keep_picture(Path(path).read_bytes(), stores, field)[0]


def _put(pixels: np.ndarray, stores: Stores) -> str:
    return PREFIX + stores.pictures.put(png_of(pixels))


def _with(prompt: str, start: str, tag: str) -> str:
    before, found, rest = prompt.partition(start)
    if not found:
        return f"{prompt} {tag}".strip()
    return before + tag + rest.partition(">")[2]
