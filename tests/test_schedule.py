"""Noise levels against diffusers, k-diffusion, ComfyUI's and A1111's rules, and that of the original DDIM sampler."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sfumato.diffusion.schedule import (
    SCHEDULE_LABELS,
    SCHEDULES,
    NoiseSchedule,
    ScheduleConfig,
    ddim,
    find_schedule,
    karras,
    sampling_sigmas,
    uniform,
)
from tests.peers import load_k_diffusion

k_sampling, k_external = load_k_diffusion()
SD1 = NoiseSchedule(ScheduleConfig())


@pytest.mark.parametrize("beta_end", [0.012, 0.02])
def test_sigmas_are_those_of_diffusers_scaled_linear(beta_end: float) -> None:
    peer = DDIMScheduler(1000, 0.00085, beta_end, "scaled_linear")
    ours = NoiseSchedule(ScheduleConfig(beta_end=beta_end))
    abar = peer.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours.alphas_cumprod, abar, rtol=2e-5)  # theirs are summed up in float32
    np.testing.assert_allclose(ours.sigmas, np.sqrt((1 - abar) / abar), rtol=2e-5)
    assert (ours.sigma_min, ours.sigma_max) == (ours.sigmas[0], ours.sigmas[-1])


def test_sd1_ends_at_the_known_levels() -> None:
    assert SD1.sigma_min == pytest.approx(0.0292, abs=5e-5)  # the numbers that k-diffusion users know
    assert SD1.sigma_max == pytest.approx(14.6146, abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 30, 999])
def test_uniform_is_get_sigmas_of_k_diffusion(n: int) -> None:
    peer = k_external.DiscreteSchedule(torch.from_numpy(SD1.sigmas), quantize=False).get_sigmas(n)
    np.testing.assert_allclose(uniform(SD1, n), peer.numpy(), rtol=1e-5)  # their timesteps are float32


@pytest.mark.parametrize("n", [1, 2, 7, 30, 999])
def test_karras_is_that_of_k_diffusion(n: int) -> None:
    peer = k_sampling.get_sigmas_karras(n, SD1.sigma_min, SD1.sigma_max)
    np.testing.assert_allclose(karras(SD1, n), peer.numpy(), rtol=2e-5)  # theirs is float32 to the 7th power


@pytest.mark.parametrize("n", [50, 30, 4, 1, 999])
def test_ddim_visits_the_timesteps_of_the_original(n: int) -> None:
    """`make_ddim_timesteps`: range(0, T, T // n) + 1. It ends at abar[0]; 1000, which no network knows, is 999."""
    original = sorted({min(t + 1, 999) for t in range(0, 1000, 1000 // n)})
    levels = ddim(SD1, n)
    assert levels[:-1] == [float(SD1.sigmas[t]) for t in reversed(original)]
    assert levels[-1] == SD1.sigma_min
    if n in (50, 4, 1):
        assert len(levels) == n + 1


@settings(deadline=None)
@given(st.floats(0, 999))
def test_timestep_inverts_sigma(t: float) -> None:
    assert SD1.timestep(SD1.sigma(t)) == pytest.approx(t, abs=1e-7)


@settings(deadline=None)
@given(st.floats(SD1.sigma_min, SD1.sigma_max))
def test_sigma_inverts_timestep(sigma: float) -> None:
    assert SD1.sigma(SD1.timestep(sigma)) == pytest.approx(sigma, rel=1e-10)


def test_trained_levels_are_exact() -> None:
    assert [SD1.sigma(t) for t in range(1000)] == pytest.approx(SD1.sigmas, rel=1e-14)
    assert [SD1.timestep(float(sigma)) for sigma in SD1.sigmas] == pytest.approx(range(1000), abs=1e-9)


def test_between_trained_levels_log_sigma_is_linear() -> None:
    assert SD1.sigma(500.5) == pytest.approx(np.sqrt(SD1.sigmas[500] * SD1.sigmas[501]), rel=1e-12)


def test_levels_outside_the_trained_range_give_its_ends() -> None:
    assert (SD1.timestep(1e-4), SD1.timestep(1e4)) == (0, 999)
    assert (SD1.sigma(-1), SD1.sigma(2000)) == pytest.approx((SD1.sigma_min, SD1.sigma_max), rel=1e-14)


LIMITS = {"lcm": 50, "sd_turbo": 10}
ENDS_ABOVE_0 = {"ddim", "kl_optimal"}
TABLES = ("align_your_steps", "ays", "align_your_steps_32", "align_your_steps_gits")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 27, 30, 50, 250, 333, 500, 501, 999])
def test_levels_fall(name: str, n: int) -> None:
    """Strictly: two equal levels in a row make DPM++ 2M divide by a step of length 0."""
    if n > LIMITS.get(name, 999):
        with pytest.raises(ValueError, match=f"steps={n}: the {name} schedule allows 1 to {LIMITS[name]}"):
            sampling_sigmas(name, SD1, n)
        return
    levels = sampling_sigmas(name, SD1, n)
    assert all(high > low for high, low in pairwise(levels))
    assert (levels[-1] > 0) == (name in ENDS_ABOVE_0)
    assert levels[0] <= SD1.sigma_max * (1 + (1e-4 if name in TABLES else 1e-12))
    assert all(type(level) is float for level in levels)


EXACT_COUNT = sorted(set(SCHEDULES) - {"ddim", "ddim_uniform", "beta_comfy"})


@pytest.mark.parametrize("name", EXACT_COUNT)
@pytest.mark.parametrize("n", [1, 4, 10])
def test_n_steps_are_n_steps(name: str, n: int) -> None:
    assert len(sampling_sigmas(name, SD1, n)) == n + 1


@pytest.mark.parametrize("name", EXACT_COUNT)
def test_discard_drops_the_next_to_last_level(name: str) -> None:
    kept, more = sampling_sigmas(name, SD1, 9, discard=True), sampling_sigmas(name, SD1, 10)
    assert kept == [*more[:-2], more[-1]]


# Other programs.


@pytest.mark.parametrize("n", [2, 7, 30, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_those_of_diffusers(spacing: str, n: int) -> None:
    options = {"steps_offset": 1} if spacing == "leading" else {}
    peer = EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing=spacing, **options)
    peer.set_timesteps(n)
    np.testing.assert_allclose(sampling_sigmas(spacing, SD1, n), peer.sigmas.numpy(), rtol=3e-5)


@pytest.mark.parametrize("n", [2, 7, 30])
@pytest.mark.parametrize("name", ["exponential", "beta"])
def test_curves_are_those_of_diffusers(name: str, n: int) -> None:
    peer = EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", **{f"use_{name}_sigmas": True})
    peer.set_timesteps(n)
    np.testing.assert_allclose(sampling_sigmas(name, SD1, n), peer.sigmas.numpy(), rtol=3e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 30, 999])
def test_exponentials_are_those_of_k_diffusion(n: int) -> None:
    for name in ("exponential", "polyexponential"):
        peer = getattr(k_sampling, f"get_sigmas_{name}")(n, SD1.sigma_min, SD1.sigma_max)
        np.testing.assert_allclose(sampling_sigmas(name, SD1, n), peer.numpy(), rtol=2e-5)


def test_exponential_falls_by_one_factor() -> None:
    levels = np.array(sampling_sigmas("exponential", SD1, 20)[:-1])
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0], rtol=1e-12)


def test_rules_of_comfyui_and_a1111_by_hand() -> None:
    """Timesteps at four steps, worked out from the rules' words; 999 is the noisiest."""
    for name, timesteps in {
        "normal": [999, 666, 333, 0],
        "sgm_uniform": [999, 749.25, 499.5, 249.75],
        "simple": [999, 749, 499, 249],
        "ddim_uniform": [751, 501, 251, 1],
        "leading": [751, 501, 251, 1],
        "trailing": [999, 749, 499, 249],
        "turbo": [999, 749, 499, 249],
        "sd_turbo": [999, 899, 799, 699],
        "lcm": [999, 759, 499, 259],
    }.items():
        levels = sampling_sigmas(name, SD1, 4)
        assert [SD1.timestep(level) for level in levels[:-1]] == pytest.approx(timesteps, abs=1e-6), name
        assert levels[-1] == 0


def test_beta_of_comfyui_is_on_timesteps() -> None:
    places = np.rint(stats.beta.ppf(1 - np.arange(8) / 8, 0.6, 0.6) * 999)
    assert sampling_sigmas("beta_comfy", SD1, 8)[:-1] == [float(SD1.sigmas[int(place)]) for place in places]


def test_beta_of_a1111_is_on_sigma() -> None:
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, 8), 0.6, 0.6)
    expected = SD1.sigma_min + quantiles * (SD1.sigma_max - SD1.sigma_min)
    np.testing.assert_allclose(sampling_sigmas("beta", SD1, 8)[:-1], expected, rtol=1e-10)


def test_kl_optimal_has_even_arctangents() -> None:
    for name, count in (("kl_optimal", 9), ("kl_optimal_comfy", 8)):
        levels = [level for level in sampling_sigmas(name, SD1, 8) if level > 0]
        assert len(levels) == count
        assert (levels[0], levels[-1]) == pytest.approx((SD1.sigma_max, SD1.sigma_min))
        np.testing.assert_allclose(np.diff(np.arctan(levels), n=2), 0, atol=1e-12)


def test_linear_quadratic_is_straight_then_a_parabola_with_the_same_slope() -> None:
    done = 1 - np.array(sampling_sigmas("linear_quadratic", SD1, 20)) / SD1.sigma_max
    np.testing.assert_allclose(done[:11], np.arange(11) * 0.0025, atol=1e-12)
    np.testing.assert_allclose(np.diff(done[10:], n=3), 0, atol=1e-12)
    bend = np.diff(done[10:], n=2)[0]
    assert done[11] - done[10] == pytest.approx(0.0025 + bend / 2)  # slope at 10, and half the bend
    assert done[-1] == 1


def test_align_your_steps_are_the_published_levels() -> None:
    """At 11 levels, and at diffusers' timesteps within a step of the trained ones."""
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    assert sampling_sigmas("align_your_steps", SD1, 11) == pytest.approx([*published, 0.0])
    assert sampling_sigmas("ays", SD1, 10) == pytest.approx([*published[:-1], 0.0])
    for table, timesteps in (
        ("sd1", AysSchedules["StableDiffusionTimesteps"]),
        ("sdxl", AysSchedules["StableDiffusionXLTimesteps"]),
    ):
        levels = sampling_sigmas("ays", SD1, 10, table=table)
        assert [SD1.timestep(level) for level in levels[:-1]] == pytest.approx(timesteps, abs=2.5)
    np.testing.assert_allclose(
        sampling_sigmas("ays", SD1, 10, table="sdxl")[:-1], AysSchedules["StableDiffusionXLSigmas"][:10], rtol=1e-3
    )
    assert sampling_sigmas("align_your_steps_32", SD1, 32)[:3] == pytest.approx([14.615, 11.2395, 8.6436], rel=1e-4)


def test_tables_are_resampled_in_log_sigma() -> None:
    levels = sampling_sigmas("align_your_steps", SD1, 21)
    assert levels[1] == pytest.approx((14.615 * 6.475) ** 0.5)
    assert (levels[0], levels[20]) == pytest.approx((14.615, 0.029))


@pytest.mark.parametrize("name", TABLES)
def test_an_unknown_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="table='sd3': one of sd1, sdxl"):
        sampling_sigmas(name, SD1, 5, table="sd3")


# Zero terminal SNR.


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    peer = EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True)
    ours = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    abar = peer.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours.alphas_cumprod[:-1], abar[:-1], rtol=2e-3)  # theirs is a float32 product of betas
    np.testing.assert_allclose(ours.alphas_cumprod[:900], abar[:900], rtol=3e-5)
    assert ours.alphas_cumprod[-1] == abar[-1] == 2.0**-24
    assert ours.sigma_max == pytest.approx(4096, rel=1e-6)
    assert ours.sigma_min == pytest.approx(SD1.sigma_min, rel=1e-12)  # algorithm 1 leaves the first level


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - set(TABLES)))
def test_levels_fall_at_zero_terminal_snr(name: str) -> None:
    levels = sampling_sigmas(name, NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)), 10)
    assert all(high > low for high, low in pairwise(levels))
    assert np.isfinite(levels).all()


# Names.


@pytest.mark.parametrize(
    "spelling, name",
    [
        *((name, name) for name in SCHEDULES),
        *((label, name) for name, label in SCHEDULE_LABELS.items()),
        ("Karras", "karras"),
        ("SGM Uniform", "sgm_uniform"),
        ("SGMUniform", "sgm_uniform"),
        ("KL Optimal", "kl_optimal"),
        ("Align Your Steps", "align_your_steps"),
        ("Align Your Steps GITS", "align_your_steps_gits"),
        ("Automatic", "automatic"),
        ("automatic", "automatic"),
        ("Polyexponential", "polyexponential"),
        ("discrete", "uniform"),
        ("linear_quadratic", "linear_quadratic"),
    ],
)
def test_a_schedule_is_found_in_any_spelling(spelling: str, name: str) -> None:
    assert find_schedule(spelling) == name


def test_a_slip_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"schedule='karas': did you mean karras\?"):
        find_schedule("karas")


def test_the_samplers_own_schedule_has_no_levels() -> None:
    with pytest.raises(ValueError, match="schedule='automatic': the sampler's own"):
        sampling_sigmas("automatic", SD1, 5)


def test_add_noise_adds_the_level_of_each_row() -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x, sigma = SD1.add_noise(x0, noise, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(sigma, torch.tensor(SD1.sigmas[[0, 500, 999]], dtype=torch.float32))
    torch.testing.assert_close(x[1], x0[1] + float(SD1.sigmas[500]) * noise[1])


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(beta_start=0.0),
        ScheduleConfig(beta_start=0.02, beta_end=0.01),
        ScheduleConfig(beta_end=1.0),
        ScheduleConfig(beta_start=float("nan")),
        ScheduleConfig(num_timesteps=1),
    ],
)
def test_impossible_schedules_are_refused(config: ScheduleConfig) -> None:
    with pytest.raises(ValueError, match="schedule"):
        NoiseSchedule(config)


@pytest.mark.parametrize("name, n, words", [("uniform", 0, "steps=0"), ("karras", -1, "steps=-1")])
def test_too_few_steps_are_refused(name: str, n: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampling_sigmas(name, SD1, n)


def test_ddim_refuses_more_steps_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"steps=1000: .* 1 to 999"):
        sampling_sigmas("ddim", SD1, 1000)


def test_an_unknown_schedule_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"schedule='cosine': one of uniform, normal, .*karras"):
        sampling_sigmas("cosine", SD1, 10)
