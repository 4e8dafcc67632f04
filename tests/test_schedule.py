"""Noise levels against diffusers, k-diffusion and the rule of the original DDIM sampler."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.diffusion.schedule import SCHEDULES, NoiseSchedule, ScheduleConfig, ddim, karras, sampling_sigmas, uniform
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


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 27, 30, 50, 250, 333, 500, 501, 999])
def test_levels_fall(name: str, n: int) -> None:
    """Strictly: two equal levels in a row make DPM++ 2M divide by a step of length 0."""
    levels = sampling_sigmas(name, SD1, n)
    assert all(high > low for high, low in pairwise(levels))
    assert levels[-1] >= 0
    assert levels[0] <= SD1.sigma_max * (1 + 1e-12)
    assert all(type(level) is float for level in levels)


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
    with pytest.raises(ValueError, match=r"schedule='cosine': one of uniform, ddim, karras"):
        sampling_sigmas("cosine", SD1, 10)
