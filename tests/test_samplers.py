"""Samplers against known answers and against peers.

Known answers: for data N(0, s^2) the denoiser is x s^2 / (s^2 + sigma^2) and the ODE's solution keeps
x / sqrt(s^2 + sigma^2); for data that is one point the ancestral steps are exact at any length.
Peers: k-diffusion's functions, diffusers' schedulers, and the original PLMS formulas, on the same nonlinear networks.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from sfumato.diffusion import samplers
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.samplers import SAMPLERS, drive, find_sampler, sampler
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig, ddim, karras, uniform
from sfumato.types import Answer, Query
from tests.peers import load_k_diffusion

k_sampling, _ = load_k_diffusion()
SD1 = NoiseSchedule(ScheduleConfig())
STD = 0.7  # s, the deviation of the Gaussian data
NUM_SAMPLES = 20_000
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALL_TRAINED = 28  # linspace(0, 999, 28) steps by 37: every level is a trained one, with a whole timestep


def gaussian(query: Query) -> Answer:
    """The exact denoiser of data N(0, s^2)."""
    return Answer(query.x * STD**2 / (STD**2 + query.sigma**2))


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def seeded_noise(shape: Sequence[int], seed: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(tuple(shape), generator=generator, dtype=dtype)


# Order of convergence.


def smooth(num_steps: int) -> list[float]:
    """Karras levels from the largest to the smallest trained sigma, without the 0 that hides the order."""
    return karras(SD1, num_steps + 1)[:-1]


def equal(num_steps: int) -> list[float]:
    """Equal steps in sigma, the case for which the weights of PLMS are made."""
    return [float(level) for level in np.linspace(3.0, 0.1, num_steps + 1)]


def measured_order(name: str, levels: Callable[[int], list[float]], num_steps: int) -> list[float]:
    """log2 of the fall in relative error from n to 2n and from 2n to 4n steps."""
    errors = []
    for n in (num_steps, 2 * num_steps, 4 * num_steps):
        sigmas = levels(n)
        x = torch.full((1, 1, 1, 1), sigmas[0], dtype=torch.float64)
        final = drive(SAMPLERS[name].run(x, sigmas, no_noise), gaussian)
        exact = float(x) * math.sqrt((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2))
        errors.append(abs(float(final) / exact - 1))
    return [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]


@pytest.mark.parametrize("name, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("plms", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    assert measured_order(name, smooth, 40) == pytest.approx([order, order], abs=0.25)


def test_euler_is_not_of_order_2() -> None:
    assert max(measured_order("euler", smooth, 40)) < 1.5


def test_plms_is_of_higher_order_where_its_weights_are_exact() -> None:
    """On equal steps in sigma: order 4 of its steps, less what the three starting steps of lower order cost."""
    assert min(measured_order("plms", equal, 80)) > 2.75


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpmpp_2m", "plms"])
def test_the_last_step_to_0_is_finite(name: str) -> None:
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for num_steps in (1, 2, 50):
        final = drive(SAMPLERS[name].run(x * SD1.sigma_max, karras(SD1, num_steps), no_noise), gaussian)
        assert final.isfinite().all()
    exact = SD1.sigma_max * STD / math.sqrt(STD**2 + SD1.sigma_max**2)
    assert float(final) == pytest.approx(exact, rel=0.05)


# Stochastic samplers.


def assert_moments(x: Tensor, mean: float, variance: float, slack: float = 0.0) -> None:
    """Within five standard errors, and a relative `slack` of the variance for steps of finite length."""
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / x.numel())
    assert abs(float(x.var()) / variance - 1) < 5 * math.sqrt(2 / x.numel()) + slack


@pytest.mark.parametrize("name, eta", [("euler_a", 1.0), ("ddim", 0.5), ("ddim", 1.0)])
def test_stochastic_samplers_keep_the_moments_of_a_gaussian(name: str, eta: float) -> None:
    """Variance s^2 + sigma^2 at every level visited, s^2 at the end; 400 steps stay within 2 % of it."""
    sigmas = karras(SD1, 400)
    noise = seeded_noise((1, 1, 1, NUM_SAMPLES))

    def denoise(query: Query) -> Answer:
        assert_moments(query.x, 0.0, STD**2 + query.sigma**2, slack=0.02)
        return gaussian(query)

    x = noise() * math.sqrt(STD**2 + sigmas[0] ** 2)
    assert_moments(drive(SAMPLERS[name].run(x, sigmas, noise, eta=eta), denoise), 0.0, STD**2, slack=0.02)


@pytest.mark.parametrize("name", ["euler_a", "ddim"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_steps_are_exact_for_a_single_point(name: str, eta: float) -> None:
    """Song et al. 2021, eq. 12 is the posterior given x0: with one x0, each level's law is N(x0, sigma^2) exactly."""
    sigmas = [10.0, 6.0, 1.0, 0.9, 0.2, 0.0]
    noise = seeded_noise((1, 1, 1, NUM_SAMPLES))

    def denoise(query: Query) -> Answer:
        assert_moments(query.x, 3.0, query.sigma**2)
        return Answer(torch.full_like(query.x, 3.0))

    final = drive(SAMPLERS[name].run(3.0 + noise() * sigmas[0], sigmas, noise, eta=eta), denoise)
    torch.testing.assert_close(final, torch.full_like(final, 3.0), atol=1e-5, rtol=0)


def test_without_eta_no_noise_is_drawn() -> None:
    x = torch.ones(1, 1, 2, 2)
    final = drive(SAMPLERS["euler_a"].run(x, uniform(SD1, 5), no_noise, eta=0.0), gaussian)
    torch.testing.assert_close(final, drive(SAMPLERS["euler"].run(x, uniform(SD1, 5), no_noise), gaussian))


# k-diffusion.

CENTRES = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of three Gaussians of deviation 0.3; x (B, 2, 4, 4), sigma (B,)."""
    var = 0.3**2 + sigma.square()[:, None]
    distance = (x[:, None] - CENTRES.to(x)).square().sum(dim=(2, 3, 4))
    mean = torch.einsum("bk,kchw->bchw", (-distance / (2 * var)).softmax(dim=1), CENTRES.to(x))
    return mean + (0.3**2 / var)[..., None, None] * (x - mean)


@pytest.mark.parametrize("levels", [karras, uniform, ddim])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "euler_a"])
def test_parity_with_k_diffusion(name: str, levels: Callable[[NoiseSchedule, int], list[float]]) -> None:
    sigmas = levels(SD1, 10)
    x = seeded_noise((2, 2, 4, 4), dtype=torch.float64)() * sigmas[0]
    noise, peer_noise = (seeded_noise((2, 2, 4, 4), seed=2, dtype=torch.float64) for _ in range(2))
    calls = {"ours": 0, "theirs": 0}

    def denoise(query: Query) -> Answer:
        calls["ours"] += 1
        return Answer(mixture(query.x, torch.full((2,), query.sigma, dtype=torch.float64)))

    def peer_model(x: Tensor, sigma: Tensor) -> Tensor:
        calls["theirs"] += 1
        return mixture(x, sigma)

    function = k_sampling.sample_euler_ancestral if name == "euler_a" else getattr(k_sampling, f"sample_{name}")
    options = {"noise_sampler": lambda *_: peer_noise()} if name == "euler_a" else {}
    theirs = function(peer_model, x, torch.tensor(sigmas, dtype=torch.float64), disable=True, **options)
    ours = drive(SAMPLERS[name].run(x, sigmas, noise), denoise)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-9
    assert calls["ours"] == calls["theirs"]


# diffusers.

WEIGHTS = seeded_noise((8, 2, 3, 3), seed=3)() / 3, seeded_noise((2, 8, 3, 3), seed=4)() / 6


def network(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    """A small fixed network in x and t (B,), one of those that predict about unit variance."""
    shift = (t.float() / 1000)[:, None, None, None]
    return F.conv2d(torch.sin(F.conv2d(x, WEIGHTS[0], padding=1) + 3 * shift), WEIGHTS[1], padding=1) + 0.5 * x


def ours_in_vp(
    name: str,
    z: Tensor,
    sigmas: list[float],
    prediction: str = "eps",
    noise: Callable[[], Tensor] = no_noise,
    model: Callable[[Tensor, Tensor, object], Tensor] = network,
    **options: float,
) -> Tensor:
    """z in variance-preserving scale at the first level -> the same at the last, by our sampler and denoiser."""
    denoiser: Denoiser[None] = Denoiser(model, SD1, prediction)
    x = z * math.sqrt(1 + sigmas[0] ** 2)
    steps = SAMPLERS[name].run(x, sigmas, noise, **options)
    final = drive(steps, lambda query: Answer(denoiser(query.x, [query.sigma] * len(query.x), None)))
    return final / math.sqrt(1 + sigmas[-1] ** 2)


def theirs_from(scheduler: object, x: Tensor, options: Callable[[], dict[str, object]] = dict) -> Tensor:
    """Run a diffusers scheduler whose timesteps are set from x in the scheduler's own scale."""
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), torch.full((len(x),), float(t)))
        x = scheduler.step(out, t, x, **options()).prev_sample
    return x


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.01
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


START = seeded_noise((2, 2, 8, 8), seed=6)()
DDIM_OPTIONS = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


@pytest.mark.parametrize("prediction, peer_name", [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [1, 20, 50])
def test_ddim_is_that_of_diffusers(num_steps: int, eta: float, prediction: str, peer_name: str) -> None:
    scheduler = DDIMScheduler(**BETAS, **DDIM_OPTIONS, clip_sample=False, prediction_type=peer_name)
    scheduler.set_timesteps(num_steps)
    noise, peer_noise = seeded_noise(START.shape), seeded_noise(START.shape)
    theirs = theirs_from(scheduler, START, lambda: {"eta": eta, "variance_noise": peer_noise() if eta else None})
    assert_same(ours_in_vp("ddim", START, ddim(SD1, num_steps), prediction, noise, eta=eta), theirs)


@pytest.mark.parametrize("prediction, peer_name", [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("name, peer", [("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler)])
def test_euler_and_heun_are_those_of_diffusers(name: str, peer: type, prediction: str, peer_name: str) -> None:
    scheduler = peer(**BETAS, timestep_spacing="linspace", prediction_type=peer_name)
    scheduler.set_timesteps(ALL_TRAINED)
    sigmas = uniform(SD1, ALL_TRAINED)
    x = START * math.sqrt(1 + sigmas[0] ** 2)
    assert_same(ours_in_vp(name, START, sigmas, prediction), theirs_from(scheduler, x))


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
    ours = ours_in_vp("dpmpp_2m", START, sigmas, model=lambda x, t, cond: network(x, t.round()))
    assert_same(ours, theirs_from(scheduler, START))


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


# How often the network is asked, and how x starts.


@pytest.mark.parametrize(
    "name, calls", [("euler", 10), ("euler_a", 10), ("ddim", 10), ("dpmpp_2m", 10), ("heun", 19), ("plms", 11)]
)
def test_number_of_evaluations(name: str, calls: int) -> None:
    asked: list[float] = []

    def denoise(query: Query) -> Answer:
        asked.append(query.sigma)
        return gaussian(query)

    x = torch.ones(1, 1, 1, 1)
    drive(SAMPLERS[name].run(x, karras(SD1, 10), seeded_noise(x.shape)), denoise)
    assert len(asked) == calls
    assert min(asked) > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_scale(name: str) -> None:
    """The original DDIM and PLMS start from unit variance in variance-preserving scale, k-diffusion from sigma."""
    expected = math.sqrt(1 + 14.0**2) if name in ("ddim", "plms") else 14.0
    assert SAMPLERS[name].start_scale(14.0) == expected


# The registry.


@pytest.mark.parametrize(
    "spelling, name",
    [
        *((name, name) for name in SAMPLERS),
        *((name.upper().replace("_", " "), name) for name in SAMPLERS),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++2m", "dpmpp_2m"),
        ("k_dpmpp_2m", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("Euler a", "euler_a"),
        ("k_euler_a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("k_euler", "euler"),
        ("EulerDiscreteScheduler", "euler"),
        ("k-heun", "heun"),
        ("HeunDiscreteScheduler", "heun"),
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "plms"),
        ("k_plms", "plms"),
    ],
)
def test_a_sampler_is_found_in_any_spelling(spelling: str, name: str) -> None:
    assert find_sampler(spelling) is SAMPLERS[name]


@pytest.mark.parametrize("name", ["magic", "", "euler b", "dpmpp"])
def test_an_unknown_sampler_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(ValueError, match="one of") as caught:
        find_sampler(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in SAMPLERS)


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts the registry back as it was."""
    known, aliases = dict(SAMPLERS), dict(samplers._ALIASES)
    yield
    for table, before in ((SAMPLERS, known), (samplers._ALIASES, aliases)):
        table.clear()
        table.update(before)


def test_one_decorated_function_adds_a_sampler(registry: None) -> None:
    @sampler("Leap!", schedule="karras", start="prior")
    def one_leap(x: Tensor, sigmas: Sequence[float], noise: Callable[[], Tensor]) -> samplers.Steps:
        return (yield Query(x, sigmas[0])).x0

    found = find_sampler("leap")
    assert found is find_sampler("One Leap")
    assert (found.name, found.schedule, found.start) == ("one_leap", "karras", "prior")
    final = drive(found.run(torch.ones(1, 1, 1, 1), [STD, 0.0], no_noise), gaussian)
    assert float(final) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one_leap"):
        find_sampler("magic")
