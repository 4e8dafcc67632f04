"""A family: everything that tells one kind of Stable Diffusion from another, as frozen data.

Owns configs, latent format, schedule, prediction, native size and defaults, and their JSON form, which travels in a
checkpoint's header. Knows no file and no loaded weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sfumato.diffusion.denoiser import PREDICTIONS
from sfumato.diffusion.samplers import find_sampler
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.unet import UNetConfig

# What a description may ask for: far beyond every real model, so that a hostile header cannot fill the memory.
MOST = {"num_res_blocks": 8, "transformer_depth": 32, "middle_depth": 32, "channel_mult": 32, "num_layers": 96}
MOST_LEVELS, MOST_NUMBER = 8, 200_000
SIZE_NUMBERS = {"original": 2, "crop": 2, "target": 2, "aesthetic": 1}  # numbers in each size condition of XL
CONCATS = ("inpaint", "depth", "picture", "lowres")


@dataclass(frozen=True)
class TextTower:
    """One text encoder of a family and how it is read.

    `prefix` is its place in the original single-file layout, where its tensors have OpenCLIP's names if `openclip`.
    `skip_last` counts the layers left out at the end, `not_stored` those of the published encoder that come after ours;
    `pad_token` fills a prompt's tokens (None: the end token).
    """

    config: CLIPTextConfig
    prefix: str = "cond_stage_model.transformer."
    openclip: bool = False
    skip_last: int = 0
    final_norm: bool = True
    pad_token: int | None = None
    not_stored: int = 0


@dataclass(frozen=True)
class Defaults:
    """What a job of this family gets where it says nothing."""

    steps: int = 50
    guidance: float = 7.5
    sampler: str = "ddim"


@dataclass(frozen=True)
class Family:
    """`size` is the native width and height in pixels; `latent_scale` makes the latents' deviation 1.

    The contexts of `texts` are joined in width; the last one's pooled vector goes to the U-Net where it takes one,
    with the sinusoids, `size_dim` wide each, of the numbers that `size_cond` names (Podell et al. 2023, section 2.2).
    `concat` names what the U-Net sees beside x: "inpaint" (mask and masked latents), "depth", "picture" (latents) or
    "lowres" (a noisy small picture). `zero_empty_negative`: an empty negative prompt is zeros, not encoded.
    """

    name: str
    texts: tuple[TextTower, ...]
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    schedule: ScheduleConfig
    prediction: str
    size: int
    latent_scale: float
    size_cond: tuple[str, ...] = ()
    size_dim: int = 256
    concat: str | None = None
    zero_empty_negative: bool = False
    defaults: Defaults = Defaults()

    def __post_init__(self) -> None:
        for config in (self.unet, self.autoencoder, self.schedule, *(tower.config for tower in self.texts)):
            _check_sizes(config)
        if not 1 <= self.size <= 65536:
            raise ValueError(f"size={self.size}: 1 to 65536 px are allowed")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: one of {', '.join(PREDICTIONS)}")
        if not (math.isfinite(self.latent_scale) and self.latent_scale > 0):
            raise ValueError(f"latent_scale={self.latent_scale}: a number above 0 is needed")
        find_sampler(self.defaults.sampler)
        NoiseSchedule(self.schedule)
        self._check_texts()
        self._check_channels()

    def _check_texts(self) -> None:
        if not self.texts:
            raise ValueError("texts: one text encoder or more is needed")
        width = sum(tower.config.width for tower in self.texts)
        if self.unet.context_dim != width:
            raise ValueError(f"context_dim={self.unet.context_dim}: the text encoders give {width}")
        for tower in self.texts:
            if not 0 <= tower.skip_last < tower.config.num_layers:
                raise ValueError(f"skip_last={tower.skip_last}: 0 to {tower.config.num_layers - 1} is allowed")
        if unknown := set(self.size_cond) - set(SIZE_NUMBERS):
            raise ValueError(f"size_cond={min(unknown)!r}: one of {', '.join(SIZE_NUMBERS)}")
        if self.unet.vector_dim is not None:
            pooled = self.texts[-1].config.projection or 0
            found = pooled + self.size_dim * sum(SIZE_NUMBERS[name] for name in self.size_cond)
            if self.unet.vector_dim != found:
                raise ValueError(f"vector_dim={self.unet.vector_dim}: text and sizes give {found}")

    def _check_channels(self) -> None:
        if self.concat is not None and self.concat not in CONCATS:
            raise ValueError(f"concat={self.concat!r}: one of {', '.join(CONCATS)}")
        expected = self.autoencoder.latent_channels + self.concat_channels
        if self.unet.in_channels != expected:
            raise ValueError(f"in_channels={self.unet.in_channels}: latents and what is beside them are {expected}")

    @property
    def concat_channels(self) -> int:
        """Channels that the U-Net sees beside x."""
        latent = self.autoencoder.latent_channels
        return {None: 0, "inpaint": latent + 1, "depth": 1, "picture": latent, "lowres": 3}[self.concat]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the family's networks: unet, autoencoder, text, and text2 where there are two encoders."""
        return ("unet", "autoencoder", *self.text_parts)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the text encoders among `parts`."""
        return tuple("text" if index == 0 else f"text{index + 1}" for index in range(len(self.texts)))

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


def _check_sizes(config: Any) -> None:
    """ValueError where a network's config is of a size that no model has."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        most = MOST.get(field.name, MOST_NUMBER)
        if isinstance(value, tuple) and (len(value) > MOST_LEVELS or (field.name == "channel_mult" and not value)):
            raise ValueError(f"{field.name}: {len(value)} levels, 1 to {MOST_LEVELS} are allowed")
        for number in numbers:
            if isinstance(number, int) and not isinstance(number, bool) and not 0 <= number <= most:
                raise ValueError(f"{field.name}={number}: 0 to {most} is allowed")


def _build(kind: Any, value: Any, field: str = "family") -> Any:
    """Plain JSON as the type `kind`: objects become frozen configs, lists tuples. TypeError where it does not fit."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None and len(kinds) < len(get_args(kind)) else _build(kinds[0], value, field)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{field}: {value!r} is not an object")
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], item, name) for name, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{field}: {value!r} is not a list")
        return tuple(_build(get_args(kind)[0], item, field) for item in value)
    kinds = [int, float] if kind is float else [kind]  # JSON writes 1.0 as 1 in some programs
    if type(value) not in kinds:
        raise TypeError(f"{field}: {value!r} is not {kind.__name__}")
    return value
