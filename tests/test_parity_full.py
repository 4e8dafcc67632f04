"""Stable Diffusion 1.5 at full size against diffusers, the same random weights in both: `make parity`.

The weights of the U-Net are random everywhere and its last layer is scaled so that it answers with unit deviation,
as a trained one does. About 7 GB of memory; minutes on one core.
"""

import logging

import pytest
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import ClassifierFree
from sfumato.diffusion.samplers import drive, find_sampler
from sfumato.diffusion.schedule import NoiseSchedule, sampling_sigmas
from sfumato.families import SD1
from sfumato.models.unet import UNet
from sfumato.types import Answer, Cond, Query
from sfumato.weights.diffusers_layout import to_diffusers, unet_keys
from tests.test_parity_networks import diffusers_unet, randn, randomise

log = logging.getLogger(__name__)  # figures are seen with --log-cli-level=INFO
pytestmark = pytest.mark.parity
GUIDANCE, STEPS = 7.5, 4
CONTEXT = randn(2, 77, 768, seed=5)  # rows: prompt, negative


@pytest.fixture(scope="module")
def networks() -> tuple[UNet, UNet2DConditionModel]:
    """Ours, and diffusers' own copy of its weights."""
    ours = UNet(SD1.unet)
    randomise(ours)
    with torch.inference_mode():
        scale = ours(randn(2, 4, 16, 16), torch.tensor([801.0, 801.0]), CONTEXT).std()
    for parameter in ours.out[2].parameters():
        parameter.div_(scale)
    theirs = diffusers_unet(SD1.unet).eval().requires_grad_(False)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), unet_keys(SD1.unet)))
    return ours, theirs


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, Euclidean."""
    return float((ours - theirs).norm() / theirs.norm())


def test_one_call(networks: tuple[UNet, UNet2DConditionModel]) -> None:
    ours, theirs = networks
    x, t = randn(2, 4, 64, 64), torch.tensor([981.0, 21.0])
    with torch.inference_mode():
        out = ours(x, t, CONTEXT)
        expected = theirs(x, t, encoder_hidden_states=CONTEXT).sample
        swapped = ours(x, t, CONTEXT.flip(0))
    log.info("one U-Net call: relative difference %.1e", relative(out, expected))
    assert 0.1 < expected.std() < 10
    assert relative(swapped, out) > 1e-2, "the context must matter"
    assert relative(out, expected) < 1e-4


def test_plms_with_guidance(networks: tuple[UNet, UNet2DConditionModel]) -> None:
    """Ours in sigma-space against diffusers' PNDM in variance-preserving scale, from one start noise."""
    ours, theirs = networks
    noise = randn(1, 4, 32, 32, seed=9)
    with torch.inference_mode():
        found = sfumato_plms(ours, noise)
        expected = diffusers_plms(theirs, noise)
    log.info("PLMS: relative difference %.1e", relative(found, expected))
    assert relative(found, noise) > 0.1, "the sampler must have moved"
    assert relative(found, expected) < 1e-4


def sfumato_plms(unet: UNet, noise: Tensor) -> Tensor:
    """Latents (1, 4, h, w) in variance-preserving scale, as they reach the autoencoder before its scale."""
    schedule, sampler = NoiseSchedule(SD1.schedule), find_sampler("plms")
    denoiser = Denoiser(lambda x, t, cond: unet(x, t, cond.context), schedule, SD1.prediction)
    guidance = ClassifierFree(Cond(CONTEXT[:1]), Cond(CONTEXT[1:]), GUIDANCE)

    def answer(query: Query) -> Answer:
        x0 = denoiser(query.x.repeat(2, 1, 1, 1), [query.sigma] * 2, Cond(CONTEXT))
        return guidance.combine(x0.split(1))

    sigmas = sampling_sigmas(sampler.schedule, schedule, STEPS)
    x = drive(sampler.run(noise * sampler.start_scale(sigmas[0]), sigmas, lambda: noise), answer)
    return x * (1 + sigmas[-1] ** 2) ** -0.5


def diffusers_plms(unet: UNet2DConditionModel, noise: Tensor) -> Tensor:
    """The loop of diffusers' text-to-image pipeline, with the scheduler of the published SD 1.5."""
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = unet(scheduler.scale_model_input(x.repeat(2, 1, 1, 1), t), t, encoder_hidden_states=CONTEXT).sample
        positive, negative = out.chunk(2)
        x = scheduler.step(negative + GUIDANCE * (positive - negative), t, x).prev_sample
    return x
