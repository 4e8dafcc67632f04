"""The denoiser's two halves agree: a network that answers the training target is a perfect denoiser."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.diffusion.denoiser import PREDICTIONS, Denoiser
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig())
X0, NOISE = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LEVELS = st.floats(SCHEDULE.sigma_min, SCHEDULE.sigma_max)
TIMESTEPS = st.lists(st.integers(0, 999), min_size=3, max_size=3)


def denoiser(prediction: str, answer: Tensor) -> Denoiser[None]:
    """One whose network answers this, whatever it is asked."""
    return Denoiser(lambda x, t, cond: answer, SCHEDULE, prediction)


def column(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


def definition(prediction: str, abar: np.ndarray) -> Tensor:
    """Ho et al. 2020: the noise; Salimans & Ho 2022: v = alpha eps - sigma_vp x0, with alpha^2 = abar; or x0."""
    if prediction == "sample":
        return X0
    return NOISE if prediction == "eps" else column(abar**0.5) * NOISE - column((1 - abar) ** 0.5) * X0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@settings(deadline=None)
@given(levels=st.lists(LEVELS, min_size=3, max_size=3))
def test_the_target_denoises_to_x0(prediction: str, levels: list[float]) -> None:
    sigma = torch.tensor(levels, dtype=torch.float32)
    target = denoiser(prediction, X0).target(X0, NOISE, sigma)
    x = X0 + sigma[:, None, None, None] * NOISE
    x0 = denoiser(prediction, target)(x, sigma.tolist(), None)
    assert (x0 - X0).abs().max() < 3e-6 * (1 + max(levels))  # float32 loses the digits that sigma * noise takes


@pytest.mark.parametrize("prediction", PREDICTIONS)
@settings(deadline=None)
@given(t=TIMESTEPS)
def test_the_target_is_the_definition(prediction: str, t: list[int]) -> None:
    abar = SCHEDULE.alphas_cumprod[t]
    target = denoiser(prediction, X0).target(X0, NOISE, torch.tensor(SCHEDULE.sigmas[t], dtype=torch.float32))
    torch.testing.assert_close(target, definition(prediction, abar), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@settings(deadline=None)
@given(t=TIMESTEPS)
def test_the_loss_of_the_definition_is_0(prediction: str, t: list[int]) -> None:
    abar = SCHEDULE.alphas_cumprod[t]
    right = denoiser(prediction, definition(prediction, abar))
    assert right.loss(X0, NOISE, torch.tensor(t), None).max() < 1e-10
    wrong = denoiser(prediction, definition(prediction, abar) + 0.5)
    torch.testing.assert_close(wrong.loss(X0, NOISE, torch.tensor(t), None), torch.full((3,), 0.25), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_network_sees_the_same_in_training_and_in_sampling(prediction: str) -> None:
    """x in variance-preserving scale, sqrt(abar) x0 + sqrt(1 - abar) noise, the timestep, and the cond untouched."""
    seen: list[tuple[Tensor, Tensor, object]] = []

    def network(x: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append((x, t, cond))
        return x

    model: Denoiser[object] = Denoiser(network, SCHEDULE, prediction)
    t, cond = [3, 500, 999], object()
    x, _ = SCHEDULE.add_noise(X0, NOISE, torch.tensor(t))
    model.loss(X0, NOISE, torch.tensor(t), cond)
    model(x, [float(SCHEDULE.sigmas[step]) for step in t], cond)
    abar = SCHEDULE.alphas_cumprod[t]
    for x_in, steps, told in seen:
        expected = column(abar**0.5) * X0 + column((1 - abar) ** 0.5) * NOISE
        torch.testing.assert_close(x_in, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(steps.float(), torch.tensor([3.0, 500.0, 999.0]))
        assert told is cond
    assert len(seen) == 2


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@settings(deadline=None)
@given(t=TIMESTEPS)
def test_min_snr_weights_are_those_of_hang_et_al(gamma: float, t: list[int]) -> None:
    """Hang et al. 2023: min(SNR, gamma) / SNR for the noise, / (SNR + 1) for v, / 1 for x0; SNR = abar / (1 - abar)."""
    abar = SCHEDULE.alphas_cumprod[t]
    snr = abar / (1 - abar)
    for prediction, below in (("eps", snr), ("v", snr + 1), ("sample", np.ones_like(snr))):
        model = denoiser(prediction, torch.zeros_like(X0))
        plain = model.loss(X0, NOISE, torch.tensor(t), None)
        weighed = model.loss(X0, NOISE, torch.tensor(t), None, min_snr_gamma=gamma)
        expected = torch.tensor(np.minimum(snr, gamma) / below, dtype=torch.float32)
        torch.testing.assert_close(weighed / plain, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", ""])
def test_an_unknown_prediction_is_refused_with_the_names(prediction: str) -> None:
    with pytest.raises(ValueError, match=f"prediction='{prediction}': one of eps, v"):
        Denoiser(lambda x, t, cond: x, SCHEDULE, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_may_be_shown_more_noise_than_it_is_asked_for(prediction: str) -> None:
    """Ning et al. 2023: the input is perturbed, the target is not."""
    t, more = torch.tensor([3, 500, 999]), NOISE + 0.1 * X0.flip(0)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: None) -> Tensor:
        seen.append(x)
        return definition(prediction, SCHEDULE.alphas_cumprod[t])

    assert Denoiser(network, SCHEDULE, prediction).loss(X0, NOISE, t, None, shown_noise=more).max() < 1e-10
    x, sigma = SCHEDULE.add_noise(X0, more, t)
    torch.testing.assert_close(seen[0], x / (1 + column(sigma.numpy()).square()).sqrt())
