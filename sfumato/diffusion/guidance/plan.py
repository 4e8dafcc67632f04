"""All forms of guidance in one plan, in the order in which they go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sfumato.diffusion.guidance.attention import MIDDLE, Perturbed, SelfAttention
from sfumato.diffusion.guidance.classifier_free import (
    ClassifierFree,
    During,
    Positive,
    Told,
    Window,
    each_cond,
    parts_of,
)
from sfumato.diffusion.guidance.picture import PictureGuided
from sfumato.diffusion.guidance.protocol import Guidance, changed, skip
from sfumato.diffusion.guidance.taming import Mimicked, Rescaled, Thresholded


@dataclass(frozen=True)
class Options:
    """What guidance is wanted; as it is, none but classifier-free guidance of `scale`. ValueError outside the ranges.

    `pag` and `sag` are scales, 0 is off; `rescale` in [0, 1]; `percentile` in (0, 1] turns dynamic thresholding on,
    Imagen's, or with a `mimic` scale that for latents; `freeu` is (b1, b2, s1, s2). The window is classifier-free
    guidance's alone. `seamless` are the directions (x, y) in which opposite edges of the picture meet;
    `picture` is the scale of guidance by a picture that the network sees beside x. `reuse` and `tome` are NetState's.
    """

    scale: float = 1.0
    window: Window = field(default_factory=Window)
    pag: float = 0.0
    pag_blocks: tuple[str, ...] = (MIDDLE,)
    sag: float = 0.0
    rescale: float = 0.0
    percentile: float | None = None
    mimic: float | None = None
    freeu: tuple[float, float, float, float] | None = None
    seamless: tuple[bool, bool] = (False, False)
    picture: float | None = None
    reuse: tuple[int, int] | None = None
    tome: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "pag", "sag", "mimic"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value}: a number is needed")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: from 0 to 1 is allowed")
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise ValueError(f"percentile={self.percentile}: above 0, up to 1 is allowed")
        if self.freeu is not None and (len(self.freeu) != 4 or not all(0 < factor < math.inf for factor in self.freeu)):
            raise ValueError(f"freeu={self.freeu}: four factors above 0 are needed, b1, b2, s1 and s2")


def plan(positive: Positive, negative: Told | None, options: Options, prediction: str) -> Guidance:
    """The plan of a run whose network predicts `prediction` ("eps" or "v")."""
    skip(prediction, 1.0)
    state: dict[str, Any] = {}
    if options.freeu is not None:
        state["freeu"] = options.freeu
    if any(options.seamless):
        state["seamless"] = options.seamless
    if options.reuse is not None:
        state["reuse"] = options.reuse
    if options.tome:
        state["tome"] = options.tome
    if state:
        positive = each_cond(positive, lambda cond: changed(cond, **state))
        if negative is not None:
            negative = each_cond(negative, lambda cond: changed(cond, **state))[0].told
    parts = parts_of(positive)
    guidance: Guidance = ClassifierFree(parts, negative, options.scale)
    if options.picture is not None:
        if negative is None:
            raise ValueError("negative=None: guidance by a picture needs one")
        guidance = PictureGuided(parts, negative, options.scale, options.picture)
    if options.window != Window():
        guidance = During(options.window, guidance, ClassifierFree(parts, None, 1.0))
    if options.sag:
        guidance = SelfAttention(guidance, options.sag, prediction)
    if options.pag:
        guidance = Perturbed(guidance, parts, options.pag, options.pag_blocks)
    if options.mimic is not None:
        guidance = Mimicked(guidance, options.mimic, 1.0 if options.percentile is None else options.percentile)
    elif options.percentile is not None:
        guidance = Thresholded(guidance, options.percentile)
    if options.rescale:
        guidance = Rescaled(guidance, options.rescale, prediction)
    return guidance
