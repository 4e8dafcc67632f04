"""A family: everything that tells one kind of Stable Diffusion from another, as frozen data.

Owns configs, latent format, schedule, prediction, native size and defaults, and their JSON form, which travels in a
checkpoint's header. Knows no file and no loaded weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from sfumato.diffusion.denoiser import PREDICTIONS
from sfumato.diffusion.samplers import find_sampler
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.unet import UNetConfig


@dataclass(frozen=True)
class Defaults:
    """What a job of this family gets where it says nothing."""

    steps: int = 50
    guidance: float = 7.5
    sampler: str = "ddim"


@dataclass(frozen=True)
class Family:
    """`size` is the native width and height in pixels; `latent_scale` makes the latents' deviation 1.

    `skip_last` counts the text layers left out at the end (0 in SD 1.x, 1 in 2.x); `pad_token` fills a prompt's
    tokens (None: the end token).
    """

    name: str
    text: CLIPTextConfig
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    schedule: ScheduleConfig
    prediction: str
    size: int
    latent_scale: float
    skip_last: int = 0
    pad_token: int | None = None
    defaults: Defaults = Defaults()

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: one of {', '.join(PREDICTIONS)}")
        if self.unet.context_dim != self.text.width:
            raise ValueError(f"context_dim={self.unet.context_dim}: the text encoder gives {self.text.width}")
        if not (math.isfinite(self.latent_scale) and self.latent_scale > 0):
            raise ValueError(f"latent_scale={self.latent_scale}: a number above 0 is needed")
        find_sampler(self.defaults.sampler)
        NoiseSchedule(self.schedule)
        if not 0 <= self.skip_last < self.text.num_layers:
            raise ValueError(f"skip_last={self.skip_last}: 0 to {self.text.num_layers - 1} is allowed")

    @property
    def size_step(self) -> int:
        """Width and height must be multiples of this many pixels: the latent factor, times the U-Net's halvings."""
        return self.autoencoder.factor * 2 ** (len(self.unet.channel_mult) - 1)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Family:
        """The inverse of `to_json`; ValueError where a field is missing, unknown or of the wrong kind."""
        try:
            return _build(Family, json.loads(text))
        except (TypeError, KeyError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"family: not a family's description ({error})") from error


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    """A frozen config from plain JSON: nested dataclasses are built, lists of whole numbers become tuples."""
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} for {kind.__name__} is not an object")
    hints = get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            arguments[name] = _build(hint, value)  # type: ignore[arg-type]
        elif get_origin(hint) is tuple:
            if not isinstance(value, list) or any(type(item) is not int for item in value):
                raise TypeError(f"{name}={value!r} is not a list of whole numbers")
            arguments[name] = tuple(value)
        elif not isinstance(value, _plain_types(hint)):
            raise TypeError(f"{name}={value!r} is not {hint}")
        else:
            arguments[name] = value
    return kind(**arguments)


def _plain_types(hint: Any) -> tuple[type, ...]:
    kinds = get_args(hint) or (hint,)
    return (*kinds, int) if float in kinds else kinds  # JSON writes 1.0 as 1 in some programs
