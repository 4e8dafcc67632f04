"""Schedules: which noise levels a sampler visits, one function for each rule, named as the programs it is from.

Every rule takes the model's NoiseSchedule and the number of steps n and gives falling levels, the last one 0 unless
its docstring says otherwise. Letters: T training timesteps; t(sigma) and sigma(t) are the NoiseSchedule's two maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from sfumato.diffusion.names import plain, unknown
from sfumato.diffusion.noise_schedule import NoiseSchedule as NoiseSchedule
from sfumato.diffusion.noise_schedule import ScheduleConfig as ScheduleConfig

Rule = Callable[[NoiseSchedule, int], list[float]]
AUTOMATIC = "automatic"  # no rule, but the name for "the sampler's own"

SCHEDULES: dict[str, Rule] = {}
SCHEDULE_LABELS: dict[str, str] = {AUTOMATIC: "Automatic"}  # what web interfaces show
_ALIASES: dict[str, str] = {AUTOMATIC: AUTOMATIC}


def schedule_rule(label: str, *aliases: str) -> Callable[[Rule], Rule]:
    """Register the decorated function under its own name, its label in A1111 and Forge, and other programs' names."""

    def register(function: Rule) -> Rule:
        name: str = getattr(function, "__name__")  # noqa: B009 - a Callable need not have one, a function has
        SCHEDULES[name], SCHEDULE_LABELS[name] = function, label
        for alias in (name, label, *aliases):
            known = _ALIASES.setdefault(plain(alias), name)
            if known != name:
                raise ValueError(f"schedule={alias!r}: a name of both {known} and {name}")
        return function

    return register


def schedule_names() -> dict[str, str]:
    """Every known spelling in its plain form, with the schedule it means; `automatic` means the sampler's own."""
    return dict(_ALIASES)


def find_schedule(name: str) -> str:
    """The schedule of a name or label in any spelling ("SGM Uniform", "sgm_uniform"), or "automatic".

    ValueError names the nearest ones, or all of them where none is near.
    """
    key = plain(name)
    if key not in _ALIASES:
        raise unknown("schedule", name, key, {form: found for form, found in _ALIASES.items() if found != AUTOMATIC})
    return _ALIASES[key]


def _levels(schedule: NoiseSchedule, timesteps: Iterable[float]) -> list[float]:
    return [schedule.sigma(float(t)) for t in timesteps] + [0.0]


def _trained(schedule: NoiseSchedule, timesteps: Iterable[float]) -> list[float]:
    """Levels of whole timesteps, each one once, and 0."""
    unique = dict.fromkeys(int(t) for t in timesteps)
    return [float(schedule.sigmas[t]) for t in unique] + [0.0]


def _at_most(n: int, limit: int, name: str) -> None:
    if n > limit:
        raise ValueError(f"steps={n}: the {name} schedule allows 1 to {limit}")


# Even steps of the timestep.


@schedule_rule("Uniform", "discrete", "default")
def uniform(schedule: NoiseSchedule, n: int) -> list[float]:
    """n timesteps evenly from T - 1 to 0, both included, then 0: k-diffusion's and A1111's default."""
    return _levels(schedule, np.linspace(len(schedule.sigmas) - 1, 0, n))


@schedule_rule("Normal")
def normal(schedule: NoiseSchedule, n: int) -> list[float]:
    """ComfyUI's and A1111's `normal`: `uniform`, between t(sigma_max) and t(sigma_min), which are T - 1 and 0."""
    return uniform(schedule, n)


@schedule_rule("SGM Uniform", "SGMUniform")
def sgm_uniform(schedule: NoiseSchedule, n: int) -> list[float]:
    """The first n of n + 1 timesteps evenly from T - 1 to 0, then 0: LegacyDDPM of Stability's generative-models as
    ComfyUI, A1111 and sd.cpp have it, with timesteps that are not whole."""
    return _levels(schedule, np.linspace(len(schedule.sigmas) - 1, 0, n + 1)[:-1])


@schedule_rule("Simple")
def simple(schedule: NoiseSchedule, n: int) -> list[float]:
    """ComfyUI's and A1111's `simple`: the trained level at place T - 1 - floor(i T / n) for i = 0 ... n - 1, then 0."""
    total = len(schedule.sigmas)
    return _trained(schedule, (total - 1 - int(i * (total / n)) for i in range(n)))


@schedule_rule("DDIM", "original")
def ddim(schedule: NoiseSchedule, n: int) -> list[float]:
    """Timesteps 1, 1 + c, 1 + 2c, ... with c = T // n, as the original DDIM and PLMS samplers: it ends at the
    smallest trained sigma, not at 0. Where n does not divide T there are more than n steps, as there."""
    total = len(schedule.sigmas)
    _at_most(n, total - 1, "ddim")
    timesteps = {min(t + 1, total - 1) for t in range(0, total, total // n)}
    return [float(schedule.sigmas[t]) for t in sorted(timesteps, reverse=True)] + [schedule.sigma_min]


@schedule_rule("DDIM Uniform")
def ddim_uniform(schedule: NoiseSchedule, n: int) -> list[float]:
    """Timesteps 1, 1 + c, 1 + 2c, ... below T with c = T // n, then 0: ComfyUI's `ddim_uniform`, A1111's `DDIM` for
    samplers of k-diffusion. It has more than n steps where n does not divide T."""
    total = len(schedule.sigmas)
    _at_most(n, total - 1, "ddim_uniform")
    return _trained(schedule, reversed(range(1, total, total // n)))


@schedule_rule("Leading")
def leading(schedule: NoiseSchedule, n: int) -> list[float]:
    """diffusers' `timestep_spacing="leading"` with `steps_offset=1`, SD's own: timesteps i (T // n) + 1, then 0."""
    total = len(schedule.sigmas)
    _at_most(n, total - 1, "leading")
    return _trained(schedule, (i * (total // n) + 1 for i in reversed(range(n))))


@schedule_rule("Trailing")
def trailing(schedule: NoiseSchedule, n: int) -> list[float]:
    """diffusers' `timestep_spacing="trailing"` (Lin et al. 2023, table 2): round(T - i T / n) - 1, then 0."""
    total = len(schedule.sigmas)
    return _trained(schedule, (np.round(np.arange(total, 0, -total / n)) - 1).clip(0))


@schedule_rule("Linspace")
def linspace(schedule: NoiseSchedule, n: int) -> list[float]:
    """diffusers' `timestep_spacing="linspace"`: `uniform`, but between trained levels sigma itself is interpolated."""
    places = np.arange(len(schedule.sigmas))
    return [*map(float, np.interp(np.linspace(len(places) - 1, 0, n), places, schedule.sigmas)), 0.0]


@schedule_rule("Turbo")
def turbo(schedule: NoiseSchedule, n: int) -> list[float]:
    """Forge's `turbo`: timesteps round(i T / n - 1) for i = n ... 1, then 0. At ten steps SD Turbo's own ten levels."""
    total = len(schedule.sigmas)
    return _trained(schedule, np.round(np.arange(n, 0, -1) * (total / n) - 1).clip(0, total - 1))


@schedule_rule("SD Turbo", "SDTurboScheduler")
def sd_turbo(schedule: NoiseSchedule, n: int) -> list[float]:
    """ComfyUI's SDTurboScheduler: the first n <= 10 of the timesteps T - 1, 9 T / 10 - 1, ..., T / 10 - 1, then 0."""
    _at_most(n, 10, "sd_turbo")
    total = len(schedule.sigmas)
    return _trained(schedule, [total * i // 10 - 1 for i in range(10, 10 - n, -1)])


@schedule_rule("LCM")
def lcm(schedule: NoiseSchedule, n: int) -> list[float]:
    """diffusers' LCMScheduler and TCDScheduler: of the 50 levels that latent consistency models are distilled at,
    t = i T / 50 - 1 (Luo et al. 2023), those at floor(50 i / n) from the noisy end, then 0. n <= 50."""
    total, original = len(schedule.sigmas), min(50, len(schedule.sigmas))
    _at_most(n, original, "lcm")
    distilled = [i * (total // original) - 1 for i in range(original, 0, -1)]
    return _trained(schedule, (distilled[math.floor(i * original / n)] for i in range(n)))


# Curves of sigma.


@schedule_rule("Karras", "ka", "k")
def karras(schedule: NoiseSchedule, n: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5, between the smallest and the largest trained sigma, then 0."""
    low, high = schedule.sigma_min ** (1 / rho), schedule.sigma_max ** (1 / rho)
    return [float((high + ramp * (low - high)) ** rho) for ramp in np.linspace(0, 1, n)] + [0.0]


@schedule_rule("Exponential", "exp")
def exponential(schedule: NoiseSchedule, n: int) -> list[float]:
    """k-diffusion's: n levels even in log sigma between the largest and the smallest trained one, then 0."""
    return polyexponential(schedule, n)


@schedule_rule("Polyexponential")
def polyexponential(schedule: NoiseSchedule, n: int, rho: float = 1.0) -> list[float]:
    """k-diffusion's: log sigma falls as ramp^rho, ramp from 1 to 0; A1111's rho is 1, which is `exponential`."""
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    return [math.exp(low + ramp**rho * (high - low)) for ramp in np.linspace(1, 0, n)] + [0.0]


@schedule_rule("KL Optimal")
def kl_optimal(schedule: NoiseSchedule, n: int) -> list[float]:
    """Sabour et al. 2024 (Align Your Steps), theorem 3.1: arctan sigma falls evenly. A1111's form, n + 1 levels from
    the largest trained sigma to the smallest: it does not end at 0."""
    low, high = math.atan(schedule.sigma_min), math.atan(schedule.sigma_max)
    return [math.tan(high + ramp * (low - high)) for ramp in np.linspace(0, 1, n + 1)]


@schedule_rule("KL Optimal (ComfyUI)")
def kl_optimal_comfy(schedule: NoiseSchedule, n: int) -> list[float]:
    """`kl_optimal` as ComfyUI and sd.cpp have it: n levels from the largest trained sigma to the smallest, then 0."""
    return [*kl_optimal(schedule, n - 1), 0.0] if n > 1 else [schedule.sigma_max, 0.0]


@schedule_rule("Linear Quadratic")
def linear_quadratic(schedule: NoiseSchedule, n: int) -> list[float]:
    """ComfyUI's, from Genmo's Mochi: 1 - sigma / sigma_max is i 0.025 / m for the first m = n // 2 levels, then the
    parabola with the same value and slope there that reaches 1 at i = n."""
    if n == 1:
        return [schedule.sigma_max, 0.0]
    half, threshold = n // 2, 0.025
    rest = n - half
    bend = (half - threshold * n) / (half * rest**2)
    slope = threshold / half - 2 * (half - threshold * n) / rest**2
    done = [threshold * i / half if i < half else bend * (i**2 + half**2) + slope * i for i in range(n)]
    return [schedule.sigma_max * (1 - part) for part in done] + [0.0]


def _beta_quantiles(places: np.ndarray, shape: float) -> np.ndarray:
    from scipy.special import betaincinv  # here, because it takes 0.1 s to load and few ask for it

    return np.asarray(betaincinv(shape, shape, places))


@schedule_rule("Beta")
def beta(schedule: NoiseSchedule, n: int, shape: float = 0.6) -> list[float]:
    """Lee et al. 2024 (Beta Sampling), on sigma: sigma_min + q(p) (sigma_max - sigma_min), q the quantiles of
    Beta(0.6, 0.6) at n places p evenly from 1 to 0, then 0. A1111's and diffusers' `use_beta_sigmas`."""
    quantiles = _beta_quantiles(np.linspace(1, 0, n), shape)
    return [float(schedule.sigma_min + q * (schedule.sigma_max - schedule.sigma_min)) for q in quantiles] + [0.0]


@schedule_rule("Beta (ComfyUI)", "beta_timesteps")
def beta_comfy(schedule: NoiseSchedule, n: int, shape: float = 0.6) -> list[float]:
    """Lee et al. 2024 (Beta Sampling), on timesteps as in the paper: round(q(1 - i / n) (T - 1)), i = 0 ... n - 1,
    each level once, then 0. ComfyUI's and newer Forge's; with many steps fewer than n are left."""
    quantiles = _beta_quantiles(1 - np.linspace(0, 1, n, endpoint=False), shape)
    return _trained(schedule, np.rint(quantiles * (len(schedule.sigmas) - 1)))


# Tables.

# Sabour et al. 2024, the levels that the authors publish on the paper's page for ten steps.
_AYS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
# Forge's table of 32 levels; it is the one above, resampled by its authors' recipe and carried on to 0.015.
_AYS_32 = {
    "sd1": (
        *(14.615, 11.23951352, 8.64363081, 6.64729424, 5.57250862, 4.71648546, 3.99196065, 3.5195609, 3.13490466),
        *(2.79228788, 2.48773628, 2.21663865, 1.97508351, 1.7793172, 1.61475335, 1.46540953, 1.314849, 1.16642497),
        *(1.03475547, 0.91573744, 0.80748169, 0.71202361, 0.621739, 0.53065202, 0.4529096, 0.37491455, 0.27461819),
        *(0.2011529, 0.14105873, 0.06682881, 0.03166121, 0.015),
    ),
    "sdxl": (
        *(14.615, 11.1491618, 8.50522127, 6.48827151, 5.43707402, 4.60398619, 3.89854704, 3.27407457, 2.74396527),
        *(2.29968659, 1.95448514, 1.67108715, 1.42878152, 1.23181009, 1.06789649, 0.92579443, 0.80290886, 0.69660121),
        *(0.60436903, 0.52852552, 0.46773344, 0.41393379, 0.36258186, 0.31008517, 0.26518925, 0.22326461, 0.17653877),
        *(0.13959192, 0.10587381, 0.05519369, 0.02877334, 0.015),
    ),
}
# Chen et al. 2024 (GITS), the levels in Forge.
_GITS = {
    "sd1": (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029),
    "sdxl": (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029),
}


def _resampled(tables: Mapping[str, tuple[float, ...]], table: str, n: int) -> list[float]:
    """n levels of a table, log sigma interpolated linearly over its places."""
    if table not in tables:
        raise ValueError(f"table={table!r}: one of {', '.join(tables)}")
    logs = np.log(tables[table])
    return [float(s) for s in np.exp(np.interp(np.linspace(0, len(logs) - 1, n), np.arange(len(logs)), logs))]


@schedule_rule("Align Your Steps", "align_your_steps_11", "AYS 11")
def align_your_steps(schedule: NoiseSchedule, n: int, table: str = "sd1") -> list[float]:
    """Sabour et al. 2024: the authors' 11 levels resampled to n, then 0, as A1111 and Forge. The levels are the
    table's, whatever the model was trained at; `table` "sd1" or "sdxl"."""
    return [*_resampled(_AYS, table, n), 0.0]


@schedule_rule("AYS", "align_your_steps_comfy")
def ays(schedule: NoiseSchedule, n: int, table: str = "sd1") -> list[float]:
    """The same table resampled to n + 1 levels, the last of them made 0, as ComfyUI's node and sd.cpp."""
    return [*_resampled(_AYS, table, n + 1)[:-1], 0.0]


@schedule_rule("Align Your Steps 32", "AYS 32")
def align_your_steps_32(schedule: NoiseSchedule, n: int, table: str = "sd1") -> list[float]:
    """Forge's table of 32 levels resampled to n, then 0."""
    return [*_resampled(_AYS_32, table, n), 0.0]


@schedule_rule("Align Your Steps GITS", "AYS GITS", "gits")
def align_your_steps_gits(schedule: NoiseSchedule, n: int, table: str = "sd1") -> list[float]:
    """Chen et al. 2024 (GITS): Forge's 11 levels resampled to n, then 0."""
    return [*_resampled(_GITS, table, n), 0.0]


TABLED = frozenset({"align_your_steps", "ays", "align_your_steps_32", "align_your_steps_gits"})


def sampling_sigmas(
    name: str, schedule: NoiseSchedule, n: int, *, discard: bool = False, table: str = "sd1"
) -> list[float]:
    """The noise levels that the named schedule visits in n >= 1 steps, falling; ValueError for an unknown name.

    `discard` makes n + 1 steps and drops the next to last level, as A1111 and ComfyUI do for the samplers that have
    `Sampler.discard`. `table` is "sd1" or "sdxl", for the schedules that are tables of a family.
    """
    if n < 1:
        raise ValueError(f"steps={n}: 1 or more are needed")
    rule = SCHEDULES.get(name) or SCHEDULES.get(find_schedule(name))
    if rule is None:
        raise ValueError(f"schedule={name!r}: the sampler's own is meant, ask `resolve` for its name")
    options = {"table": table} if rule.__name__ in TABLED else {}
    if not discard:
        return rule(schedule, n, **options)
    sigmas = rule(schedule, n + 1, **options)
    return [*sigmas[:-2], sigmas[-1]]
