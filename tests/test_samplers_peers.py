"""Samplers against other programs: k-diffusion's functions, diffusers' schedulers, the original PLMS, and numbers that
ComfyUI's and A1111's own functions gave (sampler_golden.json says how)."""

import inspect
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.samplers import SAMPLERS, find_sampler
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig, ddim, karras, lcm, sampling_sigmas, uniform
from sfumato.types import Answer, Query
from tests.peers import load_k_diffusion
from tests.sampler_cases import SD1, Draws, Silence, alone, guided, run, three_humps
from tests.test_samplers import document_rows

k_sampling, _ = load_k_diffusion()
Levels = Callable[[NoiseSchedule, int], list[float]]

# k-diffusion.

K_DIFFUSION = {
    **{name: name for name in ("euler", "heun", "lms", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")},
    "euler_a": "euler_ancestral",
    "dpm2": "dpm_2",
    "dpm2_a": "dpm_2_ancestral",
    "dpmpp_2s_a": "dpmpp_2s_ancestral",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde",
    "dpm_fast": "dpm_fast",
    "dpm_adaptive": "dpm_adaptive",
}
OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01},
    {"eta": 0.5, "s_noise": 0.9},
    {"eta": 0.0},
)
K_CASES = [(name, options) for name in K_DIFFUSION for options in OPTIONS if set(options) <= SAMPLERS[name].options]


def from_k_diffusion(name: str, x: Tensor, sigmas: list[float], options: dict[str, float]) -> tuple[Tensor, int]:
    """What k-diffusion's function makes of x with the noise of seed 2, and how often it asked."""
    calls, noise = [0], Draws(x.shape, 2, torch.float64)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        calls[0] += 1
        return three_humps(x, sigma)

    function = getattr(k_sampling, f"sample_{K_DIFFUSION[name]}")
    known = inspect.signature(function).parameters
    more: dict[str, object] = {"noise_sampler": lambda *_: noise()} if "noise_sampler" in known else {}
    if name == "dpmpp_2m_sde_heun":
        more["solver_type"] = "heun"
    levels = torch.tensor(sigmas, dtype=torch.float64)
    given: tuple[object, ...] = (levels,)
    if name in ("dpm_fast", "dpm_adaptive"):
        given = (levels[levels > 0].min(), levels[0], *([len(sigmas) - 1] if name == "dpm_fast" else []))
    with warnings.catch_warnings(), patch.object(torch, "randn_like", lambda x: noise()):
        warnings.simplefilter("ignore")
        return function(model, x, *given, disable=True, **more, **options), calls[0]


def k_difference(name: str, levels: Levels, num_steps: int, options: dict[str, float]) -> float:
    """Greatest difference to k-diffusion, relative to the greatest number; the evaluations must be as many."""
    sigmas, calls = levels(SD1, num_steps), [0]
    shape = (1 if SAMPLERS[name].alone else 2, 2, 4, 4)
    x = Draws(shape, dtype=torch.float64)() * sigmas[0]
    theirs, asked = from_k_diffusion(name, x, sigmas, options)

    def denoise(query: Query) -> Answer:
        calls[0] += 1
        return alone(query)

    ours = run(name, x, sigmas, denoise, Draws(shape, 2, torch.float64), **options)
    assert calls[0] == asked
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("levels", [karras, uniform, ddim])
@pytest.mark.parametrize("name, options", K_CASES)
def test_k_diffusion(name: str, options: dict[str, float], levels: Levels) -> None:
    """To rounding, but for DPM fast, whose even steps k-diffusion computes in single precision."""
    for num_steps in (10, 11, 12):
        assert k_difference(name, levels, num_steps, options) < (2e-5 if name == "dpm_fast" else 1e-8)


def documented(column: int) -> dict[str, float]:
    """Sampler -> the difference that docs/samplers.md states in one of its last three columns."""
    rows = [(row[0], row[column]) for row in document_rows("Samplers")]
    return {name: float(number) for name, number in rows if number}


def test_the_document_states_the_differences_to_k_diffusion() -> None:
    """Within a factor of ten, or rounding; a machine may round otherwise."""
    stated = documented(7)
    assert set(stated) == set(K_DIFFUSION)
    for name, number in stated.items():
        assert k_difference(name, karras, 10, {}) <= 10 * number + 1e-14


# ComfyUI and A1111, by the numbers that their functions gave.

GOLDEN = json.loads(Path(__file__).with_name("sampler_golden.json").read_text())["finals"]


def golden_difference(case: str) -> float:
    """Greatest difference to the recorded numbers, relative to the greatest; the evaluations must be as many."""
    name, _, steps = case.partition(" ")
    sigmas, calls = karras(SD1, int(steps or 12)), [0]
    shape = (2, 2, 4, 4)

    def denoise(query: Query) -> Answer:
        calls[0] += 1
        return guided(query)

    x = Draws(shape, dtype=torch.float64)() * sigmas[0]
    final = run(name, x, sigmas, denoise, Draws(shape, 2, torch.float64), **GOLDEN[case]["options"])
    theirs = torch.tensor(GOLDEN[case]["final"], dtype=torch.float64)
    assert calls[0] == GOLDEN[case]["evaluations"]
    return float((final.flatten()[::11] - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("case", GOLDEN)
def test_comfyui_and_a1111(case: str) -> None:
    """DEIS: they integrate by a sum of 10,000 terms; Restart and ER-SDE: some of their levels are single precision."""
    bound = {"deis": 1e-4, "er_sde": 1e-6, "restart 25": 1e-6, "restart 40": 1e-6}.get(case, 1e-10)
    assert golden_difference(case) < bound


def test_the_document_states_the_differences_to_comfyui_and_a1111() -> None:
    stated = documented(9)
    assert set(stated) == {case.split()[0] for case in GOLDEN}
    for case in GOLDEN:
        assert golden_difference(case) <= 10 * stated[case.split()[0]] + 1e-14


# diffusers.

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALL_TRAINED = 28  # linspace(0, 999, 28) steps by 37: every level is a trained one, with a whole timestep
WEIGHTS = Draws((8, 2, 3, 3), 3)() / 3, Draws((2, 8, 3, 3), 4)() / 6
START = Draws((2, 2, 8, 8), 6)()
PREDICTIONS = [("eps", "epsilon"), ("v", "v_prediction")]


def network(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    """A small fixed network in x and t (B,), one of those that predict about unit variance."""
    shift = (t.float() / 1000)[:, None, None, None]
    return F.conv2d(torch.sin(F.conv2d(x, WEIGHTS[0], padding=1) + 3 * shift), WEIGHTS[1], padding=1) + 0.5 * x


def at_whole_timesteps(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    return network(x, t.round())


def ours_in_vp(
    name: str,
    z: Tensor,
    sigmas: list[float],
    prediction: str = "eps",
    noise: object = None,
    model: Callable[[Tensor, Tensor, object], Tensor] = network,
    schedule: NoiseSchedule = SD1,
    **options: object,
) -> Tensor:
    """z in variance-preserving scale at the first level -> the same at the last, by our sampler and denoiser."""
    denoiser: Denoiser[None] = Denoiser(model, schedule, prediction)
    x = z * math.sqrt(1 + sigmas[0] ** 2)

    def denoise(query: Query) -> Answer:
        return Answer(denoiser(query.x, [query.sigma] * len(query.x), None))

    return run(name, x, sigmas, denoise, noise or Silence(), **options) / math.sqrt(1 + sigmas[-1] ** 2)


def theirs_from(scheduler: object, x: Tensor, options: Callable[[], dict[str, object]] = dict) -> Tensor:
    """Run a diffusers scheduler whose timesteps are set from x in the scheduler's own scale.

    Where it draws noise it gets that of seed 1, as `Draws(START.shape)`.
    """
    noise = Draws(START.shape)
    module = inspect.getmodule(type(scheduler))
    with patch.object(module, "randn_tensor", lambda *_, **__: noise(), create=True):
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)))
            x = scheduler.step(out, t, x, **options()).prev_sample
    return x


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.std() > 0.01
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert difference(ours, theirs) < 1e-4


DDIM_OPTIONS = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


@pytest.mark.parametrize("prediction, peer_name", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [1, 20, 50])
def test_ddim_is_that_of_diffusers(num_steps: int, eta: float, prediction: str, peer_name: str) -> None:
    scheduler = DDIMScheduler(**BETAS, **DDIM_OPTIONS, clip_sample=False, prediction_type=peer_name)
    scheduler.set_timesteps(num_steps)
    noise, peer_noise = Draws(START.shape), Draws(START.shape)
    theirs = theirs_from(scheduler, START, lambda: {"eta": eta, "variance_noise": peer_noise() if eta else None})
    assert_same(ours_in_vp("ddim", START, ddim(SD1, num_steps), prediction, noise, eta=eta), theirs)


SINGLE = [("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler), ("dpm2", KDPM2DiscreteScheduler)]
ANCESTRAL = [("euler_a", EulerAncestralDiscreteScheduler), ("dpm2_a", KDPM2AncestralDiscreteScheduler)]


@pytest.mark.parametrize("prediction, peer_name", PREDICTIONS)
@pytest.mark.parametrize("name, peer", [*SINGLE, ("lms", LMSDiscreteScheduler), *ANCESTRAL])
def test_k_samplers_are_those_of_diffusers(name: str, peer: type, prediction: str, peer_name: str) -> None:
    scheduler = peer(**BETAS, timestep_spacing="linspace", prediction_type=peer_name)
    scheduler.set_timesteps(ALL_TRAINED)
    sigmas = uniform(SD1, ALL_TRAINED)
    theirs = theirs_from(scheduler, START * math.sqrt(1 + sigmas[0] ** 2))
    assert_same(ours_in_vp(name, START, sigmas, prediction, Draws(START.shape)), theirs)


def test_dpmpp_2m_is_that_of_diffusers_at_trained_levels() -> None:
    """Midpoint, given timesteps, `final_sigmas_type` "zero": their last step is then of first order too, x0 itself."""
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **options, final_sigmas_type="zero", lower_order_final=False)
    scheduler.set_timesteps(timesteps=np.linspace(999, 0, ALL_TRAINED).round().astype(int).tolist())
    assert_same(ours_in_vp("dpmpp_2m", START, uniform(SD1, ALL_TRAINED)), theirs_from(scheduler, START))


@pytest.mark.parametrize("num_steps", [8, 20])
def test_dpmpp_2m_is_that_of_diffusers_on_karras_levels(num_steps: int) -> None:
    """Their Karras timesteps are rounded to whole ones, so our network gets them rounded; the levels are the same."""
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **options, final_sigmas_type="zero", use_karras_sigmas=True)
    scheduler.set_timesteps(num_steps)
    sigmas = karras(SD1, num_steps)
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-4)
    assert_same(ours_in_vp("dpmpp_2m", START, sigmas, model=at_whole_timesteps), theirs_from(scheduler, START))


def levels_of(scheduler: object) -> list[float]:
    """A multistep scheduler's own levels, by our table: it stops at the smallest trained one, or at 0."""
    last = 0.0 if scheduler.sigmas[-1] == 0 else SD1.sigma_min
    return [*(SD1.sigma(float(t)) for t in scheduler.timesteps), last]


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpmpp_2m_sde_is_that_of_diffusers(solver: str) -> None:
    options = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": solver}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **options, final_sigmas_type="zero", lower_order_final=True)
    scheduler.set_timesteps(12)
    ours = ours_in_vp("dpmpp_2m_sde", START, levels_of(scheduler), noise=Draws(START.shape), solver=solver)
    assert_same(ours, theirs_from(scheduler, START))


def test_dpmpp_3m_is_that_of_diffusers() -> None:
    """Heun's weight in their second step, as in k-diffusion; they stop at the smallest trained level."""
    options = {"algorithm_type": "dpmsolver++", "solver_order": 3, "solver_type": "heun", "lower_order_final": False}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **options, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(20)
    assert_same(ours_in_vp("dpmpp_3m", START, levels_of(scheduler)), theirs_from(scheduler, START))


@pytest.mark.parametrize("prediction, peer_name", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant, end", [("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min")])
def test_unipc_is_that_of_diffusers(
    order: int, variant: str, num_steps: int, end: str, prediction: str, peer_name: str
) -> None:
    """Their bh1 is not a number where it ends at 0."""
    options = {"solver_order": order, "solver_type": variant, "final_sigmas_type": end, "prediction_type": peer_name}
    scheduler = UniPCMultistepScheduler(**BETAS, **options)
    scheduler.set_timesteps(num_steps)
    ours = ours_in_vp("unipc", START, levels_of(scheduler), prediction, order=order, variant=variant)
    assert_same(ours, theirs_from(scheduler, START))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_that_of_diffusers(order: int, num_steps: int) -> None:
    """Their polynomial is in log sigma; with `lower_order_final` off the last steps are of full order, as ours."""
    scheduler = DEISMultistepScheduler(**BETAS, solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(num_steps)
    ours = ours_in_vp("deis", START, levels_of(scheduler), order=order, mode="logrho")
    assert_same(ours, theirs_from(scheduler, START))


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0, None])
@pytest.mark.parametrize("orders", [(1, 1), (2, 2), (3, 3), (3, 4)])
@pytest.mark.parametrize("num_steps", [2, 20])
def test_sa_solver_is_that_of_diffusers(orders: tuple[int, int], tau: float | None, num_steps: int) -> None:
    """tau None: 1 at timesteps 200 to 800, the default of both. They draw noise at every step, used or not.

    Their levels are made double: in single precision their weights of order 3 and 4 have lost three digits.
    """
    predictor, corrector = orders
    options = {"predictor_order": predictor, "corrector_order": corrector}
    if tau is not None:
        options["tau_func"] = lambda t: tau
    scheduler = SASolverScheduler(**BETAS, **options)
    scheduler.set_timesteps(num_steps)
    levels, inside = levels_of(scheduler), {"s_tmin": 0.0, "s_tmax": 100.0} if tau is not None else {}
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    noise = Draws(START.shape)
    for t in scheduler.timesteps:
        if tau is None and t > 800:
            noise()
    ours = ours_in_vp(
        "sa_solver", START, levels, "eps", noise, eta=1.0 if tau is None else tau, order=predictor, corrector=corrector,
        simple=True, **inside,
    )  # fmt: skip
    assert_same(ours, theirs_from(scheduler, START))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_is_that_of_diffusers(spacing: str) -> None:
    offset = {"steps_offset": 1} if spacing == "leading" else {}
    scheduler = DDPMScheduler(**BETAS, timestep_spacing=spacing, clip_sample=False, **offset)
    scheduler.set_timesteps(20)
    sigmas = [SD1.sigma(float(t)) for t in scheduler.timesteps] + [0.0]
    if spacing != "linspace":
        assert sigmas == pytest.approx(sampling_sigmas(spacing, SD1, 20), rel=1e-12)
    assert_same(ours_in_vp("ddpm", START, sigmas, noise=Draws(START.shape)), theirs_from(scheduler, START))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_lcm_is_that_of_diffusers(num_steps: int) -> None:
    scheduler = LCMScheduler(**BETAS)
    scheduler.set_timesteps(num_steps)
    sigmas = lcm(SD1, num_steps)
    assert sigmas[:-1] == [float(SD1.sigmas[int(t)]) for t in scheduler.timesteps]
    assert_same(ours_in_vp("lcm", START, sigmas, noise=Draws(START.shape)), theirs_from(scheduler, START))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_tcd_is_that_of_diffusers(num_steps: int, eta: float) -> None:
    """Theirs ends at the smallest trained level."""
    scheduler = TCDScheduler(**BETAS)
    scheduler.set_timesteps(num_steps)
    sigmas = [*lcm(SD1, num_steps)[:-1], SD1.sigma_min]
    theirs = theirs_from(scheduler, START, lambda: {"eta": eta})
    assert_same(ours_in_vp("tcd", START, sigmas, noise=Draws(START.shape), eta=eta, noise_schedule=SD1), theirs)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    """Euler on v from sigma 4096, where x is pure noise."""
    scheduler = EulerDiscreteScheduler(
        **BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    sigmas = sampling_sigmas("trailing", schedule, 10)
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=2e-3)
    theirs = theirs_from(scheduler, START * math.sqrt(1 + sigmas[0] ** 2))
    assert difference(ours_in_vp("euler", START, sigmas, "v", schedule=schedule), theirs) < 2e-3


# The original PLMS.


def original_plms(z: Tensor, num_steps: int) -> Tensor:
    """`PLMSSampler.p_sample_plms` of the original code, in its variance-preserving form and its own names."""
    timesteps = np.arange(0, 1000, 1000 // num_steps) + 1
    alphacums = SD1.alphas_cumprod
    alphas, alphas_prev = alphacums[timesteps], np.append(alphacums[0], alphacums[timesteps[:-1]])
    time_range = np.flip(timesteps)
    old_eps: list[Tensor] = []

    def model(z: Tensor, t: int) -> Tensor:
        return network(z, torch.full((len(z),), float(t)))

    def get_x_prev(z: Tensor, e_t: Tensor, index: int) -> Tensor:
        a_t, a_prev = float(alphas[index]), float(alphas_prev[index])
        pred_x0 = (z - math.sqrt(1 - a_t) * e_t) / math.sqrt(a_t)
        return math.sqrt(a_prev) * pred_x0 + math.sqrt(1 - a_prev) * e_t

    for i, t in enumerate(time_range):
        index = len(time_range) - i - 1
        e_t = model(z, t)
        if len(old_eps) == 0:
            e_t_next = model(get_x_prev(z, e_t, index), time_range[min(i + 1, len(time_range) - 1)])
            e_t_prime = (e_t + e_t_next) / 2
        elif len(old_eps) == 1:
            e_t_prime = (3 * e_t - old_eps[-1]) / 2
        elif len(old_eps) == 2:
            e_t_prime = (23 * e_t - 16 * old_eps[-1] + 5 * old_eps[-2]) / 12
        else:
            e_t_prime = (55 * e_t - 59 * old_eps[-1] + 37 * old_eps[-2] - 9 * old_eps[-3]) / 24
        z = get_x_prev(z, e_t_prime, index)
        old_eps.append(e_t)
        if len(old_eps) >= 4:
            old_eps.pop(0)
    return z


@pytest.mark.parametrize("num_steps", [2, 4, 5, 20, 30, 50])
def test_plms_is_the_original(num_steps: int) -> None:
    """From 2 steps on: with a single one the original asks for the trial's noise at t = 1, though it lies at t = 0.

    Not with those, 3 or 27 for one, for which the original's last timestep is 1000, past the end of its own table.
    """
    assert_same(ours_in_vp("plms", START, ddim(SD1, num_steps)), original_plms(START, num_steps))


@pytest.mark.parametrize("num_steps", [4, 20, 50])
def test_plms_is_that_of_diffusers(num_steps: int) -> None:
    """PNDM without its Runge-Kutta steps repeats the second timestep, which is the original's first pair."""
    scheduler = PNDMScheduler(**BETAS, **DDIM_OPTIONS, skip_prk_steps=True)
    scheduler.set_timesteps(num_steps)
    assert len(scheduler.timesteps) == num_steps + 1
    assert_same(ours_in_vp("plms", START, ddim(SD1, num_steps)), theirs_from(scheduler, START))


def test_every_scheduler_of_diffusers_for_stable_diffusion_is_found() -> None:
    """All that its Stable Diffusion pipelines may hold, `KarrasDiffusionSchedulers`, and the three newer ones."""
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    for name in [*(known.name for known in KarrasDiffusionSchedulers), "LCMScheduler", "TCDScheduler"]:
        assert hasattr(diffusers, name)
        find_sampler(name)
