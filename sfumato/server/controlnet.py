"""The routes of A1111's ControlNet extension (/controlnet) on the desk: what there is, and hints of pictures.

Source: the extension sd-webui-controlnet 1.1, and its client webuiapi 0.9.17.
"""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from sfumato.server.a1111_units import USUAL, Slider, Unit, module_of, modules, options_of, side_of
from sfumato.server.app import DeskOf, UserOf
from sfumato.server.aside import Allowance
from sfumato.server.desk import Desk
from sfumato.server.hints import hint_of
from sfumato.server.keys import User
from sfumato.server.orders import MAX_CONTROLS, check_picture, keep_picture, picture_bytes
from sfumato.server.waiting import RETRY
from sfumato.server.words import ForeignFailure, failures
from sfumato.server.worker import png_of

VERSION = 2  # of the extension's API
router = APIRouter(prefix="/controlnet", responses=failures(ForeignFailure))


class Detect(BaseModel):
    """What `detect` is told. Pictures are base64; `controlnet_images` is what older clients call them."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field([], max_length=MAX_CONTROLS)
    controlnet_images: list[str] = Field([], max_length=MAX_CONTROLS)
    controlnet_processor_res: float = -1
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1


@router.get("/version")
def version(desk: DeskOf, user: UserOf) -> dict[str, int]:
    """The version of the API that is spoken."""
    return {"version": VERSION}


@router.get("/settings")
def settings(desk: DeskOf, user: UserOf) -> dict[str, int]:
    """How many units a request may have."""
    return {"control_net_unit_count": MAX_CONTROLS}


@router.get("/model_list")
def model_list(desk: DeskOf, user: UserOf, update: bool = True) -> dict[str, list[str]]:
    """The networks that units may name."""
    return {"model_list": sorted(desk.pipeline.extras.shelf.files("control"))}


@router.get("/module_list")
def module_list(desk: DeskOf, user: UserOf, alias_names: bool = False) -> dict[str, Any]:
    """What makes hints, and the numbers that each takes."""
    resolution = {"name": "Resolution", "value": USUAL, "min": 64, "max": 2048, "step": 8}
    detail: dict[str, Any] = {"none": {"model_free": True, "sliders": []}}
    for name, module in modules().items():
        sliders = [resolution, *(_slider(each) for each in module.sliders)]
        detail[name] = {"model_free": False, "sliders": sliders}
    return {"module_list": list(detail), "module_detail": detail}


@router.get("/control_types")
def control_types(desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """All of both as one type; which module fits which network is not known here."""
    names = ["None", *sorted(desk.pipeline.extras.shelf.files("control"))]
    every = {"module_list": ["none", *modules()], "model_list": names, "default_option": "none"}
    return {"control_types": {"All": {**every, "default_model": names[-1]}}}


@router.post("/detect")
async def detect(asked: Detect, desk: DeskOf, user: UserOf) -> dict[str, Any]:
    """The hints of pictures."""
    if desk.closing:
        raise HTTPException(503, "the server is ending", RETRY)
    return await desk.aside.run(user, partial(_detected, asked, desk, user))


def _detected(asked: Detect, desk: Desk, user: User) -> dict[str, Any]:
    module = module_of(asked.controlnet_module, "controlnet_module")
    sent = asked.controlnet_input_images or asked.controlnet_images
    if not sent:
        raise ValueError("controlnet_input_images: one picture at least is needed")
    side = side_of(asked.controlnet_processor_res)
    unit = Unit(threshold_a=asked.controlnet_threshold_a, threshold_b=asked.controlnet_threshold_b)
    field, most = "controlnet_input_images", user.limits.count
    if len(sent) > most:
        raise ValueError(f"{field}: {len(sent)} pictures; {most} are allowed")
    contents, allowance = [picture_bytes(each, field) for each in sent], Allowance(user.limits)
    for content in contents:
        allowance.take(check_picture(content, field), None if module is None else side, field)
    images = []
    for content in contents:
        pixels = keep_picture(content, desk.stores, field)[1].pixels
        if module is not None:
            pixels = hint_of(desk.service, pixels, module.annotator, options_of(module, unit), side)
        images.append(base64.b64encode(png_of(pixels)).decode("ascii"))
    return {"images": images, "info": "Success"}


def _slider(slider: Slider) -> dict[str, Any]:
    name = slider.option.title()
    return {"name": name, "value": slider.default, "min": slider.low, "max": slider.high, "step": 1}
