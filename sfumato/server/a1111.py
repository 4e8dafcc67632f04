"""A1111's HTTP API (/sdapi/v1) on the desk: its requests become jobs of the same queue, and wait for their pictures.

Source: the routes of A1111's web UI 1.10.1. Errors are {"error", "detail", "errors"}, as there.
"""

from __future__ import annotations

import base64
import io
import json
from functools import partial
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.concurrency import run_in_threadpool
from PIL import Image, PngImagePlugin
from pydantic import BaseModel

from sfumato import __version__
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.images import RECIPE_KEY, UPSCALERS
from sfumato.server.a1111_jobs import Drawing, inline, job_of, over_picture, with_second_pass
from sfumato.server.a1111_units import Unit, controls_of, units_of
from sfumato.server.app import DeskOf, UserOf
from sfumato.server.aside import Allowance
from sfumato.server.desk import Desk
from sfumato.server.hints import hint_of
from sfumato.server.infotext import KEY, infotext, label_of, parsed
from sfumato.server.keys import User
from sfumato.server.orders import MAX_PICTURE_PIXELS, check_picture, keep_picture, picture_bytes
from sfumato.server.queue import DONE, Entry
from sfumato.server.waiting import RETRY, finished
from sfumato.server.words import ForeignFailure, failures
from sfumato.server.worker import PREFIX, png_of
from sfumato.tasks.checks import LATENT_UPSCALERS, job_from_dict
from sfumato.tasks.pictures import Pictures
from sfumato.weights.upscalers import packaged_upscalers

router = APIRouter(prefix="/sdapi/v1", responses=failures(ForeignFailure))
SCALE = 4  # what a list of upscalers says of those that have no scale of their own
UPSCALING = 3 * 4 * 64 * (SCALE * 320) ** 2  # bytes: three maps of a tile's 64 channels, enlarged, in float32


class OnePicture(BaseModel):
    """A picture in base64."""

    image: str = ""


class Extra(OnePicture):
    """What `extra-single-image` is told of enlarging; restoring of faces is not known here."""

    resize_mode: int = 0
    upscaling_resize: float = 2
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaler_1: str = "None"


def title_of(desk: Desk) -> str:
    """The model as A1111 lists it: its name and the first ten digits of its hash."""
    model = desk.pipeline.model
    return f"{model.name} [{model.hash[:10]}]"


def _answer(desk: Desk, entry: Entry, asked: Drawing) -> dict[str, Any]:
    """The pictures of a job as A1111 answers them, each with its text inside."""
    images, texts, seeds, verdicts = [], [], [], []
    model = desk.pipeline.model
    recipe: dict[str, Any] = {"job": entry.job, "seed": entry.job.get("seed", 0)}
    for name in entry.results:
        path = desk.stores.results.path(name)
        if path is None:
            raise HTTPException(404, "a result is gone")
        with Image.open(path) as picture:
            picture.load()
            recipe = json.loads(picture.info[RECIPE_KEY])
        job = job_from_dict(recipe["job"])
        verdicts.append(recipe.get("safety"))
        texts.append(infotext(job, recipe["seed"], model.name, model.hash, f"sfumato {__version__}"))
        seeds.append(recipe["seed"])
        images.append(_with_text(picture, {RECIPE_KEY: json.dumps(recipe, ensure_ascii=False), KEY: texts[-1]}))
    job = job_from_dict(recipe["job"])
    number = len(images)
    info = {
        "prompt": job.prompt, "all_prompts": [job.prompt] * number, "negative_prompt": job.negative,
        "all_negative_prompts": [job.negative] * number, "seed": job.seed, "all_seeds": seeds,
        "subseed": job.variation_seed or 0, "all_subseeds": [job.variation_seed or 0] * number,
        "subseed_strength": job.variation_strength, "width": job.width, "height": job.height,
        "sampler_name": label_of(str(job.sampler)), "cfg_scale": job.guidance, "steps": job.steps,
        "batch_size": asked.batch_size, "sd_model_name": model.name, "sd_model_hash": model.hash[:10],
        "denoising_strength": job.strength, "extra_generation_params": {}, "index_of_first_image": 0,
        "infotexts": texts, "styles": [], "clip_skip": job.clip_skip or 1, "version": f"sfumato {__version__}",
        "interrupted": entry.state != DONE, "safety": verdicts,
    }  # fmt: skip
    echo = asked.model_dump()
    if not asked.include_init_images:
        echo |= {"init_images": None, "mask": None}
    return {"images": images if asked.send_images else [], "parameters": echo, "info": json.dumps(info)}


def _with_text(picture: Image.Image, texts: dict[str, str]) -> str:
    """A picture as PNG with texts inside, in base64."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    written = io.BytesIO()
    picture.save(written, format="PNG", pnginfo=info)
    return base64.b64encode(written.getvalue()).decode("ascii")


@router.post("/txt2img")
async def txt2img(asked: Drawing, desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """Draw from words."""
    _check_model((asked.override_settings or {}).get("sd_model_checkpoint"), desk)
    plain = with_second_pass(job_of(asked, desk.options(user)), asked)
    return await _answered(asked, plain, desk, user)


@router.post("/img2img")
async def img2img(asked: Drawing, desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """Draw over a picture."""
    if not asked.init_images:
        raise HTTPException(404, "Init image not found")
    _check_model((asked.override_settings or {}).get("sd_model_checkpoint"), desk)
    mask = None if asked.mask is None else inline(asked.mask)
    plain = over_picture(job_of(asked, desk.options(user)), asked, inline(asked.init_images[0]), mask)
    return await _answered(asked, plain, desk, user)


async def _answered(asked: Drawing, plain: dict[str, Any], desk: Desk, user: User) -> dict[str, Any]:
    """The pictures of a job with a request's ControlNet units; of an interrupted one there are none."""
    if units := units_of(asked.alwayson_scripts or {}):
        if desk.closing:
            raise HTTPException(503, "the server is ending", RETRY)
        await run_in_threadpool(desk.check_room, user)
        controls = await desk.aside.run(user, partial(_controls, units, plain.get("image"), desk, user))
        plain = plain | {"controls": controls}
    entry = await finished(desk, user, plain)
    return await run_in_threadpool(_answer, desk, entry, asked)


def _controls(units: list[Unit], image: str | None, desk: Desk, user: User) -> list[dict[str, Any]]:
    """The controls that a request's units ask for. Units that ask for the same hint share it."""
    allowance = Allowance(user.limits)
    made: dict[tuple[Any, ...], str] = {}

    def hint(picture: str, annotator: str, options: dict[str, float], side: int) -> str:
        wanted = (picture, annotator, *options.items(), side)
        if wanted not in made:
            content = picture_bytes(picture)
            allowance.take(check_picture(content), side, "image")
            pixels = keep_picture(content, desk.stores)[1].pixels
            found = hint_of(desk.service, pixels, annotator, options, side)
            made[wanted] = PREFIX + desk.stores.pictures.put(png_of(found))
        return made[wanted]

    return controls_of(units, desk.pipeline.extras.shelf, image, hint)


@router.get("/progress")
def progress(desk: DeskOf, user: UserOf, skip_current_image: bool = False) -> dict[str, Any]:
    """How far one's job at work is, the one that began first."""
    ticket = next((each for each in desk.worker.tickets() if each.user == user.name), None)
    picture = None if ticket is None or skip_current_image else ticket.preview()
    done, total = (0, 0) if ticket is None else (ticket.done, ticket.total)
    state = {
        "skipped": False, "interrupted": bool(ticket and ticket.cancelling), "stopping_generation": False,
        "job": "" if ticket is None else "drawing", "job_count": int(ticket is not None), "job_no": 0,
        "job_timestamp": "", "sampling_step": done, "sampling_steps": total,
    }  # fmt: skip
    image = None if picture is None else base64.b64encode(png_of(picture)).decode("ascii")
    share = done / total if total else 0.0
    return {"progress": share, "eta_relative": 0.0, "state": state, "current_image": image, "textinfo": None}


@router.post("/interrupt")
@router.post("/skip")
def interrupt(desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """Cancel one's jobs that are at work."""
    for entry in desk.queue.page(user.name, "running", limit=1000):
        desk.cancel(entry.id, user)
    return {}


@router.get("/options")
def options(desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """One's settings."""
    usual = {"CLIP_stop_at_last_layers": 1, "eta_noise_seed_delta": 0, "samples_format": "png", "randn_source": "GPU"}
    model = {"sd_model_checkpoint": title_of(desk), "sd_checkpoint_hash": desk.pipeline.model.hash}
    return {**usual, **desk.options(user), **model}


@router.post("/options")
def set_options(said: dict[str, Any], desk: DeskOf, user: UserOf) -> None:
    """Keep some of one's settings for later requests, until the server ends."""
    _check_model(said.get("sd_model_checkpoint"), desk)
    known = {
        name: value for name, value in said.items() if name in ("CLIP_stop_at_last_layers", "eta_noise_seed_delta")
    }
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
            raise ValueError(f"{name}={value!r}: a whole number is needed")
    if said.get("randn_source") in ("CPU", "GPU"):
        known["randn_source"] = said["randn_source"]
    desk.options(user).update(known)


def _check_model(name: Any, desk: Desk) -> None:
    model = desk.pipeline.model
    if name not in (None, "", title_of(desk), model.name, model.hash, model.hash[:10]):
        raise ValueError(f"sd_model_checkpoint={str(name)[:80]!r}: there is {title_of(desk)!r}")


@router.get("/sd-models")
def sd_models(desk: DeskOf, user: UserOf) -> list[dict[str, Any]]:
    """The model."""
    model = desk.pipeline.model
    named = {"title": title_of(desk), "model_name": model.name, "filename": model.name, "config": None}
    return [{**named, "hash": model.hash[:10], "sha256": model.hash}]


@router.get("/samplers")
def samplers(desk: DeskOf, user: UserOf) -> list[dict[str, Any]]:
    """The samplers by the names that A1111's users know."""
    return [{"name": label_of(name), "aliases": [name], "options": {}} for name in SAMPLERS]


@router.get("/schedulers")
def schedulers(desk: DeskOf, user: UserOf) -> list[dict[str, Any]]:
    """The schedules; "automatic" is the sampler's own."""
    more = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    names = ["automatic", *SCHEDULES]
    return [{"name": name, "label": name.replace("_", " ").title(), **more} for name in names]


@router.get("/upscalers")
def upscalers(desk: DeskOf, user: UserOf) -> list[dict[str, Any]]:
    """What enlarges pictures."""
    names = ["None", *UPSCALERS, *packaged_upscalers()]
    more = {"model_name": None, "model_path": None, "model_url": None, "scale": SCALE}
    return [{"name": name, **more} for name in names]


@router.get("/latent-upscale-modes")
def latent_modes(desk: DeskOf, user: UserOf) -> list[dict[str, str]]:
    """What enlarges latents in a second pass."""
    return [{"name": name} for name in LATENT_UPSCALERS]


@router.get("/loras")
def loras(desk: DeskOf, user: UserOf) -> list[dict[str, Any]]:
    """The LoRAs that prompts may name; where they lie is not told."""
    names = sorted(desk.pipeline.extras.shelf.files("lora"))
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@router.get("/hypernetworks")
def hypernetworks(desk: DeskOf, user: UserOf) -> list[dict[str, str]]:
    """The hypernetworks that prompts may name."""
    return [{"name": name, "path": name} for name in sorted(desk.pipeline.extras.shelf.files("hypernet"))]


@router.get("/embeddings")
def embeddings(desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """The embeddings whose names stand for words."""
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
    return {"loaded": dict.fromkeys(sorted(desk.pipeline.extras.shelf.files("embedding")), unknown), "skipped": {}}


@router.get("/sd-vae")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
def nothing(desk: DeskOf, user: UserOf) -> list[Any]:
    """There are none of these."""
    return []


@router.get("/scripts")
def scripts(desk: DeskOf, user: UserOf) -> dict[str, list[str]]:
    """There is ControlNet, and nothing else; by its second name webuiapi knows that it must say when no unit is on."""
    names = ["controlnet", "controlnet m2m"]
    return {"txt2img": names, "img2img": names}


@router.get("/cmd-flags")
def cmd_flags(desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """What the server was started with is nobody's business."""
    return {}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
@router.post("/refresh-vae")
def refresh(desk: DeskOf, user: UserOf) -> None:
    """Folders are looked through each time anyway."""


@router.post("/png-info")
def png_info(asked: OnePicture, desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """What a picture says of itself."""
    content = picture_bytes(asked.image)
    check_picture(content)
    with Image.open(io.BytesIO(content)) as picture:
        items = {name: value for name, value in picture.info.items() if isinstance(value, str)}
    text = items.get(KEY, "")
    return {"info": text, "items": items, "parameters": parsed(text) if text else {}}


@router.post("/extra-single-image")
async def extra_single_image(asked: Extra, desk: DeskOf, user: UserOf) -> dict[str, str]:
    """Enlarge a picture, `upscaling_resize` times or to a size within `upscaling_resize_w` x `upscaling_resize_h`."""
    if desk.closing:
        raise HTTPException(503, "the server is ending", RETRY)
    return {"image": await desk.aside.run(user, partial(_enlarged, asked, desk, user)), "html_info": ""}


def _enlarged(asked: Extra, desk: Desk, user: User) -> str:
    """The picture, enlarged, in base64."""
    _, picture = keep_picture(picture_bytes(asked.image), desk.stores)
    known = {"None": "nearest", **{name: name for name in (*UPSCALERS, *packaged_upscalers())}}
    upscaler = known.get(asked.upscaler_1) or known.get(asked.upscaler_1.lower())
    if upscaler is None:
        raise ValueError(f"upscaler_1={asked.upscaler_1[:80]!r}: one of {', '.join(known)}")
    height, width = picture.pixels.shape[:2]
    factor = asked.upscaling_resize
    if asked.resize_mode == 1:
        factor = min(asked.upscaling_resize_w / width, asked.upscaling_resize_h / height)
    most = min(MAX_PICTURE_PIXELS, user.limits.pixels)
    if not (0 < factor <= 16 and width * height * factor**2 <= most):
        raise ValueError(f"upscaling_resize={factor:g}: more than 0, 16 at most, and {most} pixels in the end")
    size = max(1, round(width * factor)), max(1, round(height * factor))
    studio = desk.pipeline.studio(Pictures())
    found = desk.service.beside(lambda: studio.enlarged(picture.pixels[None], *size, upscaler)[0], UPSCALING)
    return base64.b64encode(png_of(found)).decode("ascii")
