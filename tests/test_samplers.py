"""Samplers against known answers, and their register. Other programs are in test_samplers_peers.py.

Known answers: for data N(0, s^2) the denoiser is x s^2 / (s^2 + sigma^2) and the ODE's solution keeps
x / sqrt(s^2 + sigma^2); for a mixture of two Gaussians a very fine Runge-Kutta solution; for data that is one point
the ancestral steps are exact at any length.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.noise import SeededNoise
from sfumato.diffusion.samplers import SAMPLERS, Steps, drive, find_sampler, registry, resolve, sampler
from sfumato.diffusion.schedule import SCHEDULE_LABELS, SCHEDULES, karras, sampling_sigmas, uniform
from sfumato.types import Answer, Query
from tests.sampler_cases import (
    SD1,
    STD,
    Draws,
    Silence,
    equal,
    exact_gaussian,
    exact_two_humps,
    gaussian,
    guided,
    orders,
    run,
    smooth,
    two_humps,
)

NUM_SAMPLES = 20_000
DETERMINISTIC = {  # what makes a sampler follow the ODE
    **{
        name: {}
        for name, found in SAMPLERS.items()
        if not {"eta", "s_noise"} & found.options or "s_churn" in found.options
    },
    **{name: {"eta": 0.0} for name, found in SAMPLERS.items() if found.takes_eta},
}
STOCHASTIC = [name for name in SAMPLERS if name not in DETERMINISTIC or SAMPLERS[name].takes_eta]

# Order of convergence.

GRID = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64).reshape(1, 1, 1, 11)


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    start, (first, *_, last) = GRID * SD1.sigma_max, smooth(2)
    return {"gaussian": exact_gaussian(start, first, last), "two_humps": exact_two_humps(start, first, last, 2000)}


def errors(name: str, data: str, exact: dict[str, Tensor], steps: Sequence[int], **options: object) -> list[float]:
    denoise = {"gaussian": gaussian, "two_humps": two_humps}[data]
    finals = (run(name, GRID * SD1.sigma_max, smooth(n), denoise, **options) for n in steps)
    return [float((final - exact[data]).abs().max()) for final in finals]


ORDERS: list[tuple[str, dict[str, object], float, float]] = [  # name, options, least and greatest measured order
    *((name, {}, 0.9, 1.2) for name in ("euler", "ddim", "heunpp2", "euler_cfg_pp", "ddim_cfg_pp")),
    *((name, {"eta": 0.0}, 0.9, 1.2) for name in ("euler_a", "tcd", "euler_a_cfg_pp")),
    *((name, {}, 0.75, 1.1) for name in ("gradient_estimation", "gradient_estimation_cfg_pp")),
    ("gradient_estimation", {"gamma": 1.5}, 1.9, 2.1),
    *((name, {}, 1.85, 2.1) for name in ("heun", "dpm2", "dpmpp_2s", "dpmpp_2m", "dpmpp_2m_cfg_pp")),
    *((name, {}, 1.85, 2.1) for name in ("plms", "ipndm", "exp_heun_2_x0", "res_multistep", "res_multistep_cfg_pp")),
    *((name, {"eta": 0.0}, 1.85, 2.1) for name in ("dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "seeds_2")),
    *((name, {"eta": 0.0}, 1.85, 2.1) for name in ("dpmpp_2m_sde_heun", "res_multistep_a", "dpmpp_2s_a_cfg_pp")),
    *((name, {"eta": 0.0}, 1.85, 2.1) for name in ("exp_heun_2_x0_sde", "res_multistep_a_cfg_pp")),
    ("ipndm_v", {}, 0.9, 2.0),
    ("dpmpp_3m", {}, 1.85, 2.3),
    ("dpmpp_3m_sde", {"eta": 0.0}, 1.85, 2.3),
    ("lms", {"order": 2}, 1.9, 2.1),
    ("lms", {"order": 3}, 2.75, 3.1),
    ("lms", {}, 3.1, 4.1),
    *(("deis", {"mode": mode}, 2.75, 3.8) for mode in ("tab", "logrho", "rhoab")),
    ("seeds_3", {"eta": 0.0}, 2.85, 3.1),
    *(("unipc", {"order": 1, "variant": variant}, 1.9, 2.1) for variant in ("bh1", "bh2")),
    *(("unipc", {"order": 2, "variant": variant, "lower": False}, 2.9, 3.1) for variant in ("bh1", "bh2")),
    *(("unipc", {"order": 3, "variant": variant, "lower": False}, 3.1, 4.1) for variant in ("bh1", "bh2")),
    *((name, {}, 2.0, 3.1) for name in ("unipc", "unipc_bh2")),
    ("sa_solver", {"eta": 0.0, "order": 1, "corrector": 0}, 0.9, 1.2),
    ("sa_solver", {"eta": 0.0, "order": 2, "corrector": 2, "simple": True}, 1.85, 2.4),
    ("sa_solver", {"eta": 0.0}, 1.9, 3.0),
    ("sa_solver_pece", {"eta": 0.0}, 1.9, 3.0),
]


@pytest.mark.parametrize("data", ["gaussian", "two_humps"])
@pytest.mark.parametrize("name, options, low, high", ORDERS)
def test_order_of_convergence(
    name: str, options: dict[str, object], low: float, high: float, data: str, exact: dict[str, Tensor]
) -> None:
    """From 80 to 160 steps, worst of eleven starts."""
    [order] = orders(errors(name, data, exact, (80, 160), **options))
    assert low < order < high


@pytest.mark.parametrize("data", ["gaussian", "two_humps"])
def test_dpm_fast_is_of_order_3_where_its_last_step_is_of_order_2(data: str, exact: dict[str, Tensor]) -> None:
    assert min(orders(errors("dpm_fast", data, exact, (41, 83, 167)))) > 2.5


@pytest.mark.parametrize("data", ["gaussian", "two_humps"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_is_as_exact_as_its_tolerance(order: int, data: str, exact: dict[str, Tensor]) -> None:
    rough, fine = (
        errors("dpm_adaptive", data, exact, (10,), rtol=rtol, atol=rtol, order=order) for rtol in (0.1, 1e-4)
    )
    assert fine[0] < 1e-3 < rough[0] / 20


def test_every_deterministic_sampler_has_its_order_measured() -> None:
    measured = {name for name, *_ in ORDERS} | {"dpm_fast", "dpm_adaptive"}
    assert set(DETERMINISTIC) - measured == set()


def test_plms_is_of_higher_order_where_its_weights_are_exact() -> None:
    """On equal steps in sigma: order 4 of its steps, less what the three starting steps of lower order cost."""
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    found = [float((run("plms", x, equal(n), gaussian) - exact_gaussian(x, 3.0, 0.1)).abs()) for n in (80, 160)]
    assert orders(found)[0] > 2.75


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_the_last_step_to_0_is_finite_and_right(name: str, num_steps: int) -> None:
    sigmas = karras(SD1, num_steps)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(1, 1, 1, 5) * sigmas[0]
    noise = Draws(x.shape, dtype=torch.float64)
    final = run(name, x, sigmas, gaussian, noise, **DETERMINISTIC.get(name, {}))
    assert final.isfinite().all()
    if num_steps == 50 and name in DETERMINISTIC:
        torch.testing.assert_close(final, exact_gaussian(x, sigmas[0], 0.0), rtol=0.06, atol=0.06)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_sampler_draws_no_noise(name: str) -> None:
    run(name, torch.ones(1, 1, 2, 2) * 14, uniform(SD1, 5), gaussian, Silence(), **DETERMINISTIC[name])


# Stochastic samplers.


def assert_moments(x: Tensor, mean: float, variance: float, slack: float = 0.0) -> None:
    """Within five standard errors, and a relative `slack` of the variance for steps of finite length."""
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / x.numel())
    assert abs(float(x.var()) / variance - 1) < 5 * math.sqrt(2 / x.numel()) + slack


CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}
MOMENTS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in STOCHASTIC if name not in ("lcm", "tcd", "heunpp2", "restart", "dpm_adaptive")),
    *((name, {"eta": 0.5}) for name in ("euler_a", "ddim", "dpmpp_2m_sde", "dpmpp_3m_sde", "seeds_3", "sa_solver")),
    *((name, CHURN) for name in ("heun", "dpm2")),
    ("er_sde", {"order": 1}),
    ("er_sde", {"order": 2}),
    ("dpm_fast", {"eta": 1.0}),
    ("restart", {}),
    ("sa_solver", {"s_tmin": 0.0, "s_tmax": 100.0}),
]


@pytest.mark.parametrize("name, options", MOMENTS)
def test_stochastic_samplers_keep_the_moments_of_a_gaussian(name: str, options: dict[str, object]) -> None:
    """Variance s^2 at the end within 3 %, of 150 steps of 20,000 pictures of one number."""
    sigmas = karras(SD1, 150)
    noise = Draws((1, 1, 1, NUM_SAMPLES))
    x = noise() * math.sqrt(STD**2 + sigmas[0] ** 2)
    drawn = noise.calls
    final = run(name, x, sigmas, gaussian, noise, **options)
    low = 0.0 if name != "dpm_fast" else SD1.sigma_min
    assert_moments(final, 0.0, STD**2 + low**2, slack=0.03)
    if name not in ("ddim", "ddim_cfg_pp", "dpm_fast") or options:
        assert noise.calls > drawn


@pytest.mark.parametrize("name", ["euler_a", "ddim", "ddpm", "dpmpp_2m_sde", "sa_solver"])
def test_stochastic_samplers_draw_both_humps(name: str) -> None:
    """30 % and 70 % of 20,000 numbers near the two centres, with their mean and variance over all."""
    sigmas = karras(SD1, 100)
    noise = Draws((1, 1, 1, NUM_SAMPLES))
    options = {"eta": 1.0} if SAMPLERS[name].takes_eta else {}
    final = run(name, noise() * sigmas[0], sigmas, two_humps, noise, **options)
    mean = 0.3 * -1.0 + 0.7 * 1.5
    assert float(final.mean()) == pytest.approx(mean, abs=0.06)  # it starts without the data's mean
    assert float(final.var()) == pytest.approx(0.4**2 + 0.21 * 2.5**2, rel=0.05)
    assert float((final < 0.25).float().mean()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("name", ["euler_a", "ddim", "tcd"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_steps_are_exact_for_a_single_point(name: str, eta: float) -> None:
    """Song et al. 2021, eq. 12 is the posterior given x0: with one x0, each level's law is N(x0, sigma^2) exactly."""
    sigmas = [10.0, 6.0, 1.0, 0.9, 0.2, 0.0]
    noise = Draws((1, 1, 1, NUM_SAMPLES))

    def denoise(query: Query) -> Answer:
        assert_moments(query.x, 3.0, query.sigma**2)
        return Answer(torch.full_like(query.x, 3.0))

    final = drive(SAMPLERS[name].run(3.0 + noise() * sigmas[0], sigmas, noise, eta=eta), denoise)
    torch.testing.assert_close(final, torch.full_like(final, 3.0), atol=1e-5, rtol=0)


def test_churn_adds_noise_only_within_its_range() -> None:
    x, sigmas = torch.zeros(1, 1, 8, 8), [8.0, 4.0, 2.0, 1.0]
    asked: list[float] = []

    def denoise(query: Query) -> Answer:
        asked.append(query.sigma)
        return gaussian(query)

    run("euler", x, sigmas, denoise, Draws(x.shape), s_churn=0.3, s_tmin=3.0, s_tmax=5.0)
    assert asked == pytest.approx([8.0, 4.0 * 1.1, 2.0])


# How often the network is asked, and how x starts.

EVALUATIONS = {  # of ten Karras steps that end at 0
    **dict.fromkeys(("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_2s", "dpmpp_sde", "sa_solver_pece", "seeds_2"), 19),
    **dict.fromkeys(("exp_heun_2_x0", "exp_heun_2_x0_sde", "dpmpp_2s_a_cfg_pp", "restart"), 19),
    "heunpp2": 27,
    "seeds_3": 28,
    "plms": 11,
}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_adaptive"])
def test_number_of_evaluations(name: str) -> None:
    asked: list[float] = []

    def denoise(query: Query) -> Answer:
        asked.append(query.sigma)
        return gaussian(query)

    x = torch.ones(1, 1, 1, 1)
    run(name, x, karras(SD1, 10), denoise, Draws(x.shape))
    assert len(asked) == EVALUATIONS.get(name, 10)
    assert min(asked) > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_scale(name: str) -> None:
    """The original DDIM and PLMS start from unit variance in variance-preserving scale, k-diffusion from sigma."""
    prior = name in ("ddim", "plms", "ddpm", "tcd", "unipc", "unipc_bh2", "ddim_cfg_pp")
    assert SAMPLERS[name].start_scale(14.0) == (math.sqrt(1 + 14.0**2) if prior else 14.0)


# Pictures do not depend on their batch.


@pytest.mark.parametrize("name", SAMPLERS)
def test_picture_3_of_4_is_that_picture_alone(name: str) -> None:
    found, shape = SAMPLERS[name], (2, 4, 4)
    sigmas = sampling_sigmas(found.schedule, SD1, 6, discard=found.discard)
    options: dict[str, object] = {"eta": 1.0} if found.takes_eta else {}

    def draw(seeds: list[int]) -> Tensor:
        noise = SeededNoise(seeds, shape, sigmas=sigmas)
        return run(name, noise() * found.start_scale(sigmas[0]), sigmas, guided, noise, **options)

    torch.testing.assert_close(draw([4, 5, 6, 7])[2:3], draw([6]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "cfg_pp" in name])
def test_without_guidance_cfg_pp_is_the_plain_sampler(name: str) -> None:
    plain, options = name.removesuffix("_cfg_pp"), {"eta": 0.0} if SAMPLERS[name].takes_eta else {}
    x = torch.linspace(-30, 30, 9, dtype=torch.float64).reshape(1, 1, 1, 9)
    ours, theirs = (run(n, x, karras(SD1, 8), two_humps, **options) for n in (name, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# The register.

SPELLINGS = {
    "euler": "Euler, k_euler, EulerDiscreteScheduler, sample_euler, EulerEDMSampler",
    "euler_a": "Euler a, k_euler_a, k_euler_ancestral, euler_ancestral, EulerAncestralDiscreteScheduler",
    "heun": "Heun, k-heun, HeunDiscreteScheduler, HeunEDMSampler",
    "heunpp2": "HeunPP2, heunpp2",
    "ddim": "DDIM, ddim, DDIMScheduler",
    "ddpm": "DDPM, DDPMScheduler",
    "plms": "PLMS, k_plms, PNDMScheduler, pndm",
    "lms": "LMS, k_lms, LMSDiscreteScheduler, LinearMultistepSampler",
    "dpm2": "DPM2, dpm_2, k_dpm_2, KDPM2DiscreteScheduler, kdpm_2",
    "dpm2_a": "DPM2 a, dpm_2_ancestral, k_dpm_2_a, KDPM2AncestralDiscreteScheduler, kdpm_2_a",
    "dpm_fast": "DPM fast, dpm_fast, k_dpm_fast",
    "dpm_adaptive": "DPM adaptive, dpm_adaptive, k_dpm_ad",
    "dpmpp_2s_a": "DPM++ 2S a, dpmpp_2s_ancestral, k_dpmpp_2s_a, dpm++2s_a, DPMPP2SAncestralSampler",
    "dpmpp_2s": "dpmpp_2s, DPMSolverSinglestepScheduler",
    "dpmpp_sde": "DPM++ SDE, dpmpp_sde, dpmpp_sde_gpu, k_dpmpp_sde, DPMSolverSDEScheduler",
    "dpmpp_2m": "DPM++ 2M, dpm++2m, k_dpmpp_2m, DPMSolverMultistepScheduler, DPMPP2MSampler, dpm_solver, DPM-Solver++",
    "dpmpp_2m_sde": "DPM++ 2M SDE, dpmpp_2m_sde_gpu, k_dpmpp_2m_sde, dpm++2m_sde",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun, dpmpp_2m_sde_heun_gpu, k_dpmpp_2m_sde_heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE, dpmpp_3m_sde_gpu, k_dpmpp_3m_sde",
    "dpmpp_3m": "dpmpp_3m",
    "restart": "Restart",
    "unipc": "UniPC, uni_pc",
    "unipc_bh2": "uni_pc_bh2, UniPCMultistepScheduler",
    "lcm": "LCM, k_lcm, LCMScheduler",
    "tcd": "TCD, TCDScheduler",
    "deis": "DEIS, DEISMultistepScheduler",
    "ipndm": "IPNDM, ipndm, IPNDMScheduler",
    "ipndm_v": "IPNDM_V, ipndm_v",
    "ddim_cfg_pp": "DDIM CFG++",
    "euler_cfg_pp": "euler_cfg_pp, Euler CFG++",
    "euler_a_cfg_pp": "euler_ancestral_cfg_pp, euler_a_cfg_pp, Euler a CFG++",
    "dpmpp_2s_a_cfg_pp": "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_2m_cfg_pp": "dpmpp_2m_cfg_pp",
    "res_multistep": "res_multistep",
    "res_multistep_a": "res_multistep_ancestral",
    "res_multistep_cfg_pp": "res_multistep_cfg_pp",
    "res_multistep_a_cfg_pp": "res_multistep_ancestral_cfg_pp",
    "gradient_estimation": "gradient_estimation, euler_ge",
    "gradient_estimation_cfg_pp": "gradient_estimation_cfg_pp",
    "er_sde": "er_sde, ER-SDE",
    "seeds_2": "seeds_2",
    "seeds_3": "seeds_3",
    "sa_solver": "sa_solver, SASolverScheduler, SA-Solver",
    "sa_solver_pece": "sa_solver_pece",
    "exp_heun_2_x0": "exp_heun_2_x0",
    "exp_heun_2_x0_sde": "exp_heun_2_x0_sde",
}


@pytest.mark.parametrize(
    "spelling, name",
    [
        *((name, name) for name in SAMPLERS),
        *((name.upper().replace("_", " "), name) for name in SAMPLERS),
        *((spelling, name) for name, line in SPELLINGS.items() for spelling in line.split(", ")),
    ],
)
def test_a_sampler_is_found_in_any_spelling(spelling: str, name: str) -> None:
    assert find_sampler(spelling) is SAMPLERS[name]
    assert resolve(spelling) == (SAMPLERS[name], SAMPLERS[name].schedule)


@pytest.mark.parametrize(
    "written, schedule, name, expected",
    [
        ("DPM++ 2M Karras", None, "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", None, "dpmpp_2m_sde", "exponential"),
        ("DPM++ 2M SDE Heun Karras", "Automatic", "dpmpp_2m_sde_heun", "karras"),
        ("DPM2 a Karras", "karras", "dpm2_a", "karras"),
        ("k_dpm_2_a_ka", None, "dpm2_a", "karras"),
        ("k_dpmpp_2m_sde_heun_exp", None, "dpmpp_2m_sde_heun", "exponential"),
        ("LMS Karras", "automatic", "lms", "karras"),
        ("Euler a SGM Uniform", None, "euler_a", "sgm_uniform"),
        ("euler_k", None, "euler", "karras"),
        ("ddim_trailing", None, "ddim", "trailing"),
        ("Euler a", "Automatic", "euler_a", "uniform"),
        ("Euler a Automatic", "KL Optimal", "euler_a", "kl_optimal"),
        ("dpmpp_2m_sde_gpu", "Align Your Steps", "dpmpp_2m_sde", "align_your_steps"),
        ("Euler a", "SGMUniform", "euler_a", "sgm_uniform"),
    ],
)
def test_names_that_hold_a_schedule_are_split(written: str, schedule: str | None, name: str, expected: str) -> None:
    assert resolve(written, schedule) == (SAMPLERS[name], expected)


def test_every_sampler_resolves_with_every_schedule_behind_it() -> None:
    for name, found in SAMPLERS.items():
        for schedule in SCHEDULES:
            assert resolve(f"{found.label} {schedule}") == (found, schedule), (name, schedule)


def test_two_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="asks for karras"):
        resolve("DPM++ 2M Karras", "exponential")


@pytest.mark.parametrize("find", [find_sampler, resolve])
@pytest.mark.parametrize("name", ["magic", "", "karras", "автомат"])
def test_an_unknown_sampler_is_refused_with_the_names(name: str, find: object) -> None:
    with pytest.raises(ValueError, match="one of") as caught:
        find(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in SAMPLERS)


@pytest.mark.parametrize("name, near", [("euler b", "euler"), ("dpmp 2m", "dpmpp_2m"), ("unipcc", "unipc")])
def test_a_slip_is_answered_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler='{name}': did you mean .*{near}") as caught:
        find_sampler(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 150


def test_options_are_the_keyword_arguments() -> None:
    assert SAMPLERS["euler"].options == {"s_churn", "s_tmin", "s_tmax", "s_noise"}
    assert SAMPLERS["plms"].options == {"velocity"}
    assert {name for name, found in SAMPLERS.items() if found.takes_schedule} == {"tcd"}
    assert not SAMPLERS["tcd"].options & {"noise_schedule"}
    assert {name for name, found in SAMPLERS.items() if found.discard} == {"dpm2", "dpm2_a", "dpmpp_3m_sde"}
    assert {name for name, found in SAMPLERS.items() if found.alone} == {"dpm_adaptive"}


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("unipc", {"variant": "bh3"}, "variant='bh3'"),
        ("unipc", {"order": 0}, "order=0"),
        ("lms", {"order": 5}, "order=5"),
        ("deis", {"mode": "x"}, "mode='x'"),
        ("dpmpp_2m_sde", {"solver": "x"}, "solver='x'"),
        ("dpm_adaptive", {"order": 4}, "order=4"),
        ("dpm_adaptive", {"rtol": 0.0}, "rtol=0.0"),
        ("er_sde", {"order": 4}, "order=4"),
        ("sa_solver", {"order": 9}, "order=9"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(name, torch.ones(1, 1, 1, 1), [2.0, 1.0, 0.0], gaussian, **options)


@pytest.fixture
def register() -> Iterator[None]:
    """Puts the register back as it was."""
    known, aliases = dict(SAMPLERS), dict(registry._ALIASES)
    yield
    for table, before in ((SAMPLERS, known), (registry._ALIASES, aliases)):
        table.clear()
        table.update(before)


def test_one_decorated_function_adds_a_sampler(register: None) -> None:
    @sampler("Leap!", schedule="karras", start="prior")
    def one_leap(x: Tensor, sigmas: Sequence[float], noise: object, *, height: float = 1.0) -> Steps:
        return (yield Query(x, sigmas[0])).x0

    found = find_sampler("leap")
    assert found is find_sampler("One Leap")
    assert (found.name, found.schedule, found.start, found.label) == ("one_leap", "karras", "prior", "Leap!")
    assert found.options == {"height"}
    final = drive(found.run(torch.ones(1, 1, 1, 1), [STD, 0.0], Silence()), gaussian)
    assert float(final) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one_leap"):
        find_sampler("magic")
    with pytest.raises(ValueError, match="a name of both"):
        sampler("Euler")(one_leap)


# The document.


def document_rows(heading: str) -> list[list[str]]:
    """Cells of the rows of the table under a heading of docs/samplers.md."""
    text = (Path(__file__).parent.parent / "docs/samplers.md").read_text()
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| `")
    ]


def test_the_document_lists_the_samplers_that_there_are() -> None:
    rows = document_rows("Samplers")
    assert [row[0] for row in rows] == list(SAMPLERS)
    for name, labels, _, _, _, schedule, options, *_ in rows:
        found = SAMPLERS[name]
        assert labels == ", ".join(found.labels)
        assert schedule == found.schedule + (" (discard)" if found.discard else "")
        assert options.replace("`", "") == ", ".join(sorted(found.options))


def test_the_document_lists_the_schedules_that_there_are() -> None:
    rows = document_rows("Schedules")
    assert [row[0] for row in rows] == list(SCHEDULES)
    assert [row[1] for row in rows] == [SCHEDULE_LABELS[name] for name in SCHEDULES]
