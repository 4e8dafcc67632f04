"""A1111's requests -> our plain jobs. What would change the picture and is not known here is refused, not dropped.

Source: the fields and defaults of A1111's web UI 1.10.1, and what its client webuiapi 0.9.17 sends. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from sfumato.diffusion.samplers import resolve

RESIZE = ("stretch", "crop", "fill", "latent")
FILL = ("fill", "original", "noise", "nothing")
SETTINGS = ("CLIP_stop_at_last_layers", "eta_noise_seed_delta", "sd_model_checkpoint", "randn_source")
SEEDS = 2**32


class Drawing(BaseModel):
    """The fields of txt2img and img2img together, with the server's defaults. Others are let pass."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = ""
    negative_prompt: str | None = ""
    styles: list[str] | None = None
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | None = "Euler"
    scheduler: str | None = None
    batch_size: int | None = 1
    n_iter: int | None = 1
    steps: int | None = 50
    cfg_scale: float | None = 7.0
    width: int | None = 512
    height: int | None = 512
    tiling: bool | None = None
    restore_faces: bool | None = None
    eta: float | None = None
    denoising_strength: float | None = 0.75
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    refiner_checkpoint: str | None = None
    send_images: bool | None = True
    enable_hr: bool = False
    hr_scale: float | None = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = 0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = ""
    hr_negative_prompt: str | None = ""
    init_images: list[str] | None = None
    resize_mode: int = 0
    image_cfg_scale: float | None = None
    mask: str | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = 4
    mask_blur_y: int | None = 4
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: int | None = 0
    initial_noise_multiplier: float | None = None
    include_init_images: bool = False


def job_of(asked: Drawing, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plain job of a request, with the user's `options` under those of the request itself."""
    _refuse_unknown(asked)
    settings = {**options, **(asked.override_settings or {})}
    sampler, schedule = resolve(asked.sampler_name or asked.sampler_index or "Euler", asked.scheduler or "Automatic")
    job: dict[str, Any] = {
        "like": "a1111",
        "prompt": asked.prompt or "",
        "negative": asked.negative_prompt or "",
        "seed": _seed(asked.seed),
        "count": max(1, asked.batch_size or 1) * max(1, asked.n_iter or 1),
        "steps": asked.steps if asked.steps is not None else 50,
        "guidance": asked.cfg_scale if asked.cfg_scale is not None else 7.0,
        "width": asked.width or 512,
        "height": asked.height or 512,
        "sampler": sampler.name,
        "schedule": schedule,
        "options": {},
    }
    for name, usual in (("s_churn", 0.0), ("s_tmin", 0.0), ("s_tmax", 0.0), ("s_noise", 1.0)):
        value = getattr(asked, name)
        if value is not None and value != usual and name in sampler.options:  # an s_tmax of 0 is no end at all
            job["options"][name] = value
    if asked.eta is not None and sampler.takes_eta:
        job["eta"] = asked.eta
    if asked.subseed_strength:
        job |= {"variation_seed": _seed(asked.subseed), "variation_strength": asked.subseed_strength}
    if (asked.seed_resize_from_w or 0) > 0 and (asked.seed_resize_from_h or 0) > 0:
        job |= {"noise_width": asked.seed_resize_from_w, "noise_height": asked.seed_resize_from_h}
    if asked.tiling:
        job["seamless"] = "xy"
    if (skip := settings.get("CLIP_stop_at_last_layers")) not in (None, 1):
        job["clip_skip"] = skip
    if delta := settings.get("eta_noise_seed_delta"):
        job["ensd"] = delta
    if settings.get("randn_source") == "CPU":
        job["noise"] = "cpu"
    return job


def with_second_pass(job: dict[str, Any], asked: Drawing) -> dict[str, Any]:
    """A txt2img job with A1111's "hires fix", where it is asked for."""
    if not asked.enable_hr:
        return job
    scale = asked.hr_scale or 2.0
    if asked.hr_resize_x or asked.hr_resize_y:
        sides = ((asked.hr_resize_x or 0) / job["width"], (asked.hr_resize_y or 0) / job["height"])
        scale = max(sides)
    said = {"sampler": asked.hr_sampler_name, "prompt": asked.hr_prompt, "negative": asked.hr_negative_prompt}
    if asked.hr_scheduler and asked.hr_scheduler != "Use same scheduler":
        said["schedule"] = asked.hr_scheduler
    named = {name: value for name, value in said.items() if value and value != "Use same sampler"}
    upscaler = _upscaler(asked.hr_upscaler or "Latent")
    second = {"scale": scale, "upscaler": upscaler, "strength": _strength(asked), **named}
    return {**job, "hires": {**second, "steps": asked.hr_second_pass_steps or None}}


def over_picture(job: dict[str, Any], asked: Drawing, image: str, mask: str | None) -> dict[str, Any]:
    """An img2img job over a picture, inline or by its name."""
    if asked.resize_mode not in range(len(RESIZE)):
        raise ValueError(f"resize_mode={asked.resize_mode}: 0 to {len(RESIZE) - 1} are known")
    job = {**job, "image": image, "strength": _strength(asked), "resize": RESIZE[asked.resize_mode]}
    if asked.initial_noise_multiplier is not None:
        job["noise_multiplier"] = asked.initial_noise_multiplier
    if mask is None:
        return job
    fill = asked.inpainting_fill or 0
    if fill not in range(len(FILL)):
        raise ValueError(f"inpainting_fill={fill}: 0 to {len(FILL) - 1} are known")
    blur = asked.mask_blur
    job |= {
        "mask": mask,
        "fill": FILL[fill],
        "mask_invert": bool(asked.inpainting_mask_invert),
        "mask_blur_x": asked.mask_blur_x if blur is None else blur,
        "mask_blur_y": asked.mask_blur_y if blur is None else blur,
        "only_masked": bool(asked.inpaint_full_res),
    }
    return {**job, "padding": asked.inpaint_full_res_padding or 0} if asked.inpaint_full_res else job


def inline(picture: str) -> str:
    """A picture as A1111's clients send it, bare base64 or a data: URL, as ours is written."""
    return picture if picture.startswith("data:") else f"base64,{picture}"


def _strength(asked: Drawing) -> float:
    return 0.75 if asked.denoising_strength is None else asked.denoising_strength


def _seed(seed: int | None) -> int:
    """A seed that is said, or one that nobody has chosen."""
    return secrets.randbelow(SEEDS) if seed is None or seed < 0 else seed


def _upscaler(name: str) -> str:
    """Our name of an upscaler for a second pass."""
    known = {"Latent": "latent", "Latent (bicubic)": "latent bicubic", "Latent (nearest)": "latent nearest"}
    return known.get(name, name.lower())


def _refuse_unknown(asked: Drawing) -> None:
    """ValueError for what would change the picture and cannot be done here."""
    if asked.script_name:
        raise ValueError(f"script_name={asked.script_name[:80]!r}: there are no scripts here")
    for name, script in (asked.alwayson_scripts or {}).items():
        if name.lower() == "controlnet":  # a1111_units.py reads it
            continue
        args = script.get("args") if isinstance(script, dict) else script
        if args not in (None, [], {}, [False]):
            raise ValueError(f"alwayson_scripts={name[:80]!r}: there is no such script here")
    for name in ("restore_faces", "refiner_checkpoint", "styles"):
        if getattr(asked, name):
            raise ValueError(f"{name}={getattr(asked, name)!r}: not known here")
