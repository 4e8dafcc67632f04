"""A1111's ControlNet units -> the controls of our jobs. What would change the picture and is not known is refused.

Source: the units and modules of the extension sd-webui-controlnet 1.1. Knows no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sfumato.server.hints import annotators
from sfumato.server.orders import MAX_CONTROLS
from sfumato.weights.shelf import Shelf

HASHED = re.compile(r" \[[0-9a-f]{8,10}\]$")  # what the extension puts behind a model's name
MODES = {"Balanced": "balanced", "My prompt is more important": "prompt", "ControlNet is more important": "control"}
FITS = {"Just Resize": "stretch", "Crop and Resize": "crop", "Resize and Fill": "fill"}
OLD_FITS = {
    "Inner Fit (Scale to Fit)": "crop", "Scale to Fit (Inner Fit)": "crop",
    "Outer Fit (Shrink to Fit)": "fill", "Envelope (Outer Fit)": "fill",
}  # fmt: skip
LOW, HIGH, USUAL = 64, 2048, 512  # px of the shorter side that an annotator is given


@dataclass(frozen=True)
class Slider:
    """A number of a module, as our annotator's option. What is out of its range is its default, as there."""

    option: str
    low: float
    high: float
    default: float

    def value(self, said: float) -> float:
        """What is said, or the default."""
        found = said if self.low <= said <= self.high else self.default
        return int(found) if isinstance(self.default, int) else found


@dataclass(frozen=True)
class Module:
    """What makes a hint, by the name that the extension's users know: our annotator, other names, numbers a and b."""

    annotator: str
    aliases: tuple[str, ...] = ()
    sliders: tuple[Slider, ...] = ()


MODULES: Mapping[str, Module] = {
    "canny": Module("canny", (), (Slider("low", 0, 256, 100), Slider("high", 0, 256, 200))),
    "softedge_hed": Module("hed", ("hed",)),
    "scribble_hed": Module("scribble-hed", ("scribble-hed",)),
    "scribble_xdog": Module("scribble", ("scribble",), (Slider("threshold", 1, 64, 32.0),)),
    "tile_resample": Module("tile", ("tile",), (Slider("factor", 1, 8, 1.0),)),
    "blur_gaussian": Module("blur", ("blur",), (Slider("sigma", 0.1, 64, 9.0),)),
    "invert": Module("invert", ("invert (from white bg & black line)",)),
    "threshold": Module("threshold", (), (Slider("level", 0, 254, 127),)),
    "t2ia_color_grid": Module("colour", ("color", "colour")),
    "lines": Module("lines", (), (Slider("length", 1, 1000, 20.0), Slider("width", 1, 20, 2))),
    "grey": Module("grey"),
}
UNKNOWN = ("mask", "mask_image", "effective_region_mask", "ipadapter_input", "advanced_weighting")


class Unit(BaseModel):
    """One unit, with the extension's defaults. `mask` and its kin are refused, other fields are let pass."""

    model_config = ConfigDict(extra="allow")

    enabled: bool = True
    image: str | dict[str, Any] | None = None
    input_image: str | dict[str, Any] | None = None
    module: str | None = "none"
    model: str | None = "None"
    weight: float = 1.0
    resize_mode: int | str = "Crop and Resize"
    processor_res: float = -1
    threshold_a: float = -1
    threshold_b: float = -1
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: int | str = "Balanced"
    pixel_perfect: bool = False
    hr_option: str | None = "Both"


def modules() -> dict[str, Module]:
    """The modules that can be used here, by their first names."""
    there = annotators()
    return {name: module for name, module in MODULES.items() if module.annotator in there}


def module_of(name: str | None, field: str = "module") -> Module | None:
    """The module of a name, whatever its case; None for none. ValueError, with all names, where it is not known."""
    said = (name or "none").strip().lower()
    if said == "none":
        return None
    for own, module in modules().items():
        if said == own or said in module.aliases:
            return module
    raise ValueError(f"{field}={str(name)[:80]!r}: one of none, {', '.join(modules())}")


def options_of(module: Module, unit: Unit) -> dict[str, float]:
    """The options of a module's annotator, as a unit's numbers say. Thresholds in the wrong order are swapped."""
    said = (unit.threshold_a, unit.threshold_b)
    found = {slider.option: slider.value(value) for slider, value in zip(module.sliders, said, strict=False)}
    if found.keys() == {"low", "high"}:  # as OpenCV's Canny does it there
        found = dict(zip(("low", "high"), sorted(found.values()), strict=True))
    return found


def side_of(resolution: float) -> int:
    """The px that a picture's shorter side has for its hint; what is out of range is the usual."""
    return int(resolution) if LOW <= resolution <= HIGH else USUAL


def units_of(scripts: Mapping[str, Any]) -> list[Unit]:
    """The units that are on, of a request's `alwayson_scripts`. ValueError names what cannot be read."""
    found: list[Unit] = []
    for name, script in scripts.items():
        if name.lower() != "controlnet":
            continue
        args = script.get("args") if isinstance(script, dict) else script
        if not isinstance(args, (list, tuple, type(None))):
            raise ValueError("alwayson_scripts: ControlNet's args must be a list of units")
        for number, each in enumerate(args or ()):
            if each in (None, False):
                continue
            try:
                unit = Unit.model_validate(each)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"][:1])
                raise ValueError(f"controlnet[{number}].{where or 'args'}: {first['msg']}") from error
            found += [unit] if unit.enabled else []
    if len(found) > MAX_CONTROLS:
        raise ValueError(f"controlnet: {len(found)} units; {MAX_CONTROLS} are allowed")
    return found


def controls_of(
    units: list[Unit], shelf: Shelf, image: str | None, hint: Callable[[str, str, dict[str, float], int], str]
) -> list[dict[str, Any]]:
    """The plain controls of units, over the job's own `image` where one has none.

    `hint` of a picture, an annotator, its options and a shorter side in px keeps a hint and says its name: as there,
    a hint is made at `processor_res`, and only of `pixel_perfect` units at the size that is drawn.
    """
    found = []
    for number, unit in enumerate(units):
        field = f"controlnet[{number}]"
        _refuse_unknown(unit, field)
        module = _module(unit, field, shelf)
        control: dict[str, Any] = {
            "model": _model(unit.model, field, shelf), "weight": unit.weight, "start": unit.guidance_start,
            "end": unit.guidance_end, "mode": _choice(unit.control_mode, MODES, f"{field}.control_mode"),
            "resize": _choice(unit.resize_mode, FITS, f"{field}.resize_mode", OLD_FITS),
        }  # fmt: skip
        own = _image(unit)
        if own is None and image is None:
            raise ValueError(f"{field}.image: a picture is needed, here or as the init image")
        if own is not None:
            control["image"] = own
        if isinstance(module, str):
            control["annotate"] = module
        elif module is not None and unit.pixel_perfect:
            control |= {"annotate": module.annotator, "options": options_of(module, unit)}
        elif module is not None:
            picture = own or str(image)
            control["image"] = hint(picture, module.annotator, options_of(module, unit), side_of(unit.processor_res))
        found.append(control)
    return found


def _module(unit: Unit, field: str, shelf: Shelf) -> Module | str | None:
    """A unit's module; of an IP-Adapter's the image encoder's name, None where there is one alone."""
    name = (unit.module or "none").strip()
    if name in shelf.files("vision"):
        return name
    if name.lower().startswith(("ip-adapter", "clip_vision")):
        return None
    return module_of(name, f"{field}.module")


def _model(name: str | None, field: str, shelf: Shelf) -> str:
    """Our name of a unit's network."""
    known = shelf.files("control")
    for said in (name or "", HASHED.sub("", name or "")):
        for own in known:
            if said.lower() == own.lower():
                return own
    raise ValueError(f"{field}.model={str(name)[:80]!r}: one of {', '.join(known) or 'none, for there is none here'}")


def _image(unit: Unit) -> str | None:
    """A unit's own picture as its client sends it; None where it has none."""
    said = unit.image if unit.image else unit.input_image
    if isinstance(said, dict):
        if said.get("mask"):
            raise ValueError("controlnet: a unit's mask is not known here")
        said = said.get("image")
    if not said:
        return None
    if not isinstance(said, str):
        raise ValueError("controlnet: a unit's image must be base64")
    return said if said.startswith("data:") else f"base64,{said}"


def _choice(said: int | str, names: Mapping[str, str], field: str, more: Mapping[str, str] | None = None) -> str:
    """Ours of a number or a name of theirs."""
    known = {**names, **(more or {})}
    if isinstance(said, str) and said in known:
        return known[said]
    if isinstance(said, int) and 0 <= said < len(names):
        return list(names.values())[said]
    raise ValueError(f"{field}={str(said)[:60]!r}: 0 to {len(names) - 1}, or one of {', '.join(names)}")


def _refuse_unknown(unit: Unit, field: str) -> None:
    for name in UNKNOWN:
        if (unit.model_extra or {}).get(name):
            raise ValueError(f"{field}.{name}: not known here")
    if unit.hr_option not in (None, "Both"):
        raise ValueError(f"{field}.hr_option={unit.hr_option[:40]!r}: only Both is known here")
