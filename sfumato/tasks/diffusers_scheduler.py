"""Which sampler on which levels a scheduler of diffusers is, from its name or its config.

PNDM, DDIM, Euler, Euler a, Heun, LMS and DPM++ 2M do what they do in diffusers;
UniPC visits the same levels at another order; other samplers have a schedule of ours.
Letters: sigma noise level of x = x0 + sigma noise, n steps, T training timesteps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.diffusion.samplers import find_sampler, resolve
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Family
from sfumato.weights.layouts.diffusers_fields import PREDICTIONS

log = logging.getLogger(__name__)

# Schedulers that keep latents in variance-preserving scale, x / sqrt(1 + sigma^2); the others' are x itself.
VARIANCE_PRESERVING = {
    *("DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler", "IPNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
}
# Samplers that read nothing of an earlier x but its slope: changing x between two steps is what it is in diffusers.
CHANGEABLE = {"plms", "ddim", "euler", "euler_a", "lms"}
# Samplers whose levels are known here as diffusers has them, by how it makes them of a `timestep_spacing`.
STEPPERS, SIGMA_SAMPLERS = ("plms", "ddim"), ("euler", "euler_a", "heun", "lms")
SOLVERS = ("dpmpp_2m", "unipc_bh2")  # they divide by n + 1


@dataclass(frozen=True)
class Scheduler:
    """A sampler, on the levels that diffusers makes of `config`, or on a schedule of ours where one is named.

    `config` is what the `from_config` of a diffusers scheduler reads.
    """

    sampler: str
    schedule: str | None
    config: Mapping[str, Any]

    @property
    def alone(self) -> bool:
        """Whether each picture takes steps of its own."""
        return find_sampler(self.sampler).alone

    @property
    def preserving(self) -> bool:
        """Whether diffusers keeps this sampler's latents in variance-preserving scale."""
        found = find_sampler(self.sampler)
        return found.start == "prior" or bool(VARIANCE_PRESERVING.intersection(found.labels))

    @property
    def spacing(self) -> str:
        return str(self.config.get("timestep_spacing", "leading" if self.sampler in STEPPERS else "linspace"))

    def levels(self, schedule: NoiseSchedule, n: int) -> list[float] | None:
        """The levels of n steps, falling; None where the sampler goes on a schedule of ours."""
        steps_whole = self.sampler in STEPPERS and self.spacing != "linspace"  # there it steps past its own levels
        if self.schedule is not None or not (steps_whole or self.sampler in (*SIGMA_SAMPLERS, *SOLVERS)):
            return None
        total, parts = len(schedule.sigmas), n + (self.sampler in SOLVERS)
        if self.spacing == "linspace":
            t = np.linspace(0, total - 1, parts)[::-1][:n] if parts > 1 else np.array([total - 1.0])
            t = t if self.sampler in SIGMA_SAMPLERS else t.round()
        elif self.spacing == "trailing":
            t = np.arange(total, 0, -total / n).round() - 1
        else:
            t = np.arange(parts)[::-1][:n] * (total // parts) + self.config.get("steps_offset", 1)
        if self.sampler in STEPPERS:
            last = 0.0 if self.config.get("set_alpha_to_one") else schedule.sigma_min
        else:
            last = schedule.sigma_min if self.config.get("final_sigmas_type") == "sigma_min" else 0.0
        sigmas = np.interp(t.clip(0, total - 1), np.arange(total), schedule.sigmas)  # between levels Euler's is linear
        return [*map(float, sigmas), last]

    def scale(self, sigma: float) -> float:
        """What diffusers' latents at a level are, divided by x."""
        return (1 + sigma**2) ** -0.5 if self.preserving else 1.0

    def start_scale(self, sigma: float) -> float:
        """What diffusers starts at, divided by what our sampler makes of the same noise: schedulers that preserve
        variance, and the others where they are spaced by "leading", start at sqrt(1 + sigma^2) noise."""
        theirs = math.sqrt(1 + sigma**2) if self.preserving or self.spacing == "leading" else sigma
        return theirs / find_sampler(self.sampler).start_scale(sigma)

    def timestep(self, sigma: float, schedule: NoiseSchedule) -> int | float:
        """The timestep of a level, a whole one where diffusers has whole ones."""
        t = schedule.timestep(sigma)
        return round(t) if self.preserving else t


def scheduler_of(wanted: object, family: Family, config: Mapping[str, Any] | None = None) -> Scheduler:
    """The Scheduler of a name, ours or diffusers' ("ddim", "DPM++ 2M Karras"), or of a scheduler of diffusers.

    `config` is that of the model's folder; an object is known by its class's name, and its own `config` goes before.
    """
    if isinstance(wanted, Scheduler):
        return wanted
    told, own = {**_trained(family), **(config or {})}, None
    if not isinstance(wanted, str):
        own = getattr(wanted, "config", None)
        if not isinstance(own, Mapping):
            raise ValueError(f"scheduler={wanted!r}: a sampler's name or a scheduler of diffusers is needed")
        told |= own
        wanted = type(wanted).__name__
    try:
        sampler, named = find_sampler(wanted), None
    except ValueError:  # a name of both, such as "Euler Karras"
        sampler, named = resolve(wanted)
    if own is not None:
        _check_trained(own, family)
    if told.get("thresholding") or (told.get("clip_sample") and sampler.name in ("ddim", "ddpm")):
        log.warning("scheduler: clip_sample and thresholding are not applied, latents are not pictures")
    told["_class_name"] = next((label for label in sampler.labels if label.endswith("Scheduler")), sampler.name)
    if named is not None:
        return Scheduler(sampler.name, named, told)
    for kind in ("karras", "exponential", "beta"):
        if told.get(f"use_{kind}_sigmas"):
            return Scheduler(sampler.name, kind, told)
    return Scheduler(sampler.name, None, told)


def usual_scheduler(family: Family, config: Mapping[str, Any]) -> Scheduler:
    """What a folder's scheduler_config.json says; without one the published one of SD and XL, else the family's own.

    PNDM for SD 1.x and 2.x that predict noise, DDIM for those that predict v, Euler for XL.
    """
    name, own = config.get("_class_name"), family.defaults.sampler
    if name is None and own == "ddim" and family.prediction == "eps":
        name = "plms"
    if name is None and own not in ("ddim", "euler"):
        return Scheduler(own, find_sampler(own).schedule, {**_trained(family), **config})
    return scheduler_of(name or own, family, config)


def _check_trained(config: Mapping[str, Any], family: Family) -> None:
    """ValueError where a scheduler has other noise levels, or another prediction, than the network was trained with."""
    trained = _trained(family)
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"):
        if config.get(name, trained[name]) != trained[name]:
            raise ValueError(
                f"scheduler: its {name} is {config[name]}, the model has {trained[name]}; make it with"
                " .from_config(pipe.scheduler.config)"
            )


def _trained(family: Family) -> dict[str, Any]:
    """A family's schedule in the words of a scheduler_config.json, with the settings of the published folders."""
    told: dict[str, Any] = {
        "num_train_timesteps": family.schedule.num_timesteps,
        "beta_start": family.schedule.beta_start,
        "beta_end": family.schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": PREDICTIONS[family.prediction],
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "clip_sample": False,
    }
    if family.schedule.zero_terminal_snr:
        told["rescale_betas_zero_snr"] = True
    return told | ({"timestep_spacing": "leading"} if family.name.startswith("xl") else {})
