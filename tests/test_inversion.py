"""Inversion: against its closed form and the sampler it inverts, back to the picture, and null-text inversion."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sfumato
from sfumato.diffusion.guidance import ClassifierFree, Moment
from sfumato.diffusion.samplers import drive
from sfumato.diffusion.samplers.euler import ddim
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.evaluate.quality import psnr
from sfumato.families import Model
from sfumato.images import from_uint8
from sfumato.tasks.decoding import weights_in
from sfumato.tasks.inversion import Inversion, invert, inverted, null_guidance, null_text, redrawn, rising
from sfumato.tasks.previews import drawings, full
from sfumato.types import Answer, Query
from sfumato.weights.checkpoint import load_model

SPREAD = 0.7  # deviation of the data whose exact denoiser is known
LEVELS = [0.03, 0.1, 0.3, 0.8, 2.0, 6.0, 14.0]


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path) -> Model:
    """A tiny model whose random U-Net heeds its prompt: else words would hardly matter to it."""
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "attn2.to_out" in name:
                parameter.mul_(20)
    return model


@pytest.fixture(scope="module")
def box() -> Model:
    return load_model(Path(sfumato.__file__).parent / "box.safetensors")


def gaussian(query: Query) -> Answer:
    """The exact denoiser of data N(0, SPREAD^2)."""
    return Answer(query.x * SPREAD**2 / (SPREAD**2 + query.sigma**2))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(x: Tensor, rising_levels: list[float]) -> Tensor:
    return drive(ddim(x, rising_levels[::-1], lambda: torch.zeros_like(x)), gaussian)


def test_inversion_follows_the_flow_to_first_order() -> None:
    """On Gaussian data x / sqrt(SPREAD^2 + sigma^2) stays the same along the flow; the error halves with the steps."""
    x, errors = noise(1, 4, 8, 8).double(), []
    for steps in (100, 200):
        levels = np.geomspace(0.03, 14, steps + 1).tolist()
        found = drive(invert(x, levels), gaussian)
        exact = x * ((SPREAD**2 + levels[-1] ** 2) / (SPREAD**2 + levels[0] ** 2)) ** 0.5
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.02 and 1.8 < errors[0] / errors[1] < 2.2


@pytest.mark.parametrize("levels", [LEVELS, [0.0, *LEVELS]])
def test_rounds_converge_to_the_samplers_inverse(levels: list[float]) -> None:
    x, errors = noise(2, 4, 4, 4).double(), []
    for rounds in (0, 2, 4, 8, 60):
        found = drive(invert(x, levels, rounds), gaussian)
        errors.append(((back(found, levels) - x).norm() / x.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05 and errors[-1] < 1e-3


def test_the_path_and_the_queries_are_as_said() -> None:
    asked: list[float] = []
    path: list[Tensor] = []

    def denoise(query: Query) -> Answer:
        asked.append(query.sigma)
        return gaussian(query)

    x = noise(1, 4, 2, 2)
    end = drive(invert(x, [0.0, 0.5, 2.0], 1, path.append), denoise)
    assert asked == [0.5, 0.5, 0.5, 2.0]  # at 0 the network cannot be asked
    assert len(path) == 3 and path[0] is x and path[-1] is end


def test_levels_rise_and_end_early_where_asked(small: Model) -> None:
    levels = rising(small, 10)
    schedule = NoiseSchedule(small.family.schedule)
    assert levels[0] == schedule.sigma_min and len(levels) == 11 and levels == sorted(levels)
    assert rising(small, 10, 0.5) == levels[:6] and rising(small, 10, 0.0) == levels[:2]


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_a_picture_comes_back(small: Model, size: tuple[int, int]) -> None:
    """Rounds bring what is drawn again nearer; other words and other scales lead elsewhere."""
    latents = noise(2, 4, *size)
    errors = []
    for rounds in (0, 1, 8):
        inversion = inverted(latents, "a red apple", small, steps=8, rounds=rounds)
        errors.append((redrawn(inversion, "a red apple", small) - latents).square().mean().sqrt().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1 * errors[0]
    assert inversion.x.shape == latents.shape and len(inversion.path) == 9
    elsewhere = (redrawn(inversion, "a blue cat", small, 5.0) - latents).square().mean().sqrt().item()
    assert elsewhere > 5 * errors[2]


def test_each_picture_is_inverted_as_if_alone(small: Model) -> None:
    latents = noise(3, 4, 8, 8)
    together = inverted(latents, "a tree", small, steps=4, rounds=1).x
    alone = torch.cat([inverted(one[None], "a tree", small, steps=4, rounds=1).x for one in latents])
    assert torch.allclose(together, alone, atol=1e-4)


def test_prompts_that_change_on_the_way_change_at_the_same_levels(small: Model) -> None:
    """[a:b:0.5] is b in the drawing's second half: inversion's first steps, at little noise, are told b."""
    latents = noise(1, 4, 8, 8)
    first = inverted(latents, "[a red apple:a blue cat:0.5]", small, steps=6).path
    late, early = (inverted(latents, text, small, steps=6).path for text in ("a blue cat", "a red apple"))
    assert torch.equal(first[2], late[2]) and not torch.equal(first[2], early[2])
    assert not torch.equal(first[6], late[6])


def followed(inversion: Inversion, small: Model, scale: float, contexts: list[Tensor] | None) -> float:
    """Root mean squared distance of the drawing at `scale` from where the inversion began."""
    found = redrawn(inversion, inversion.job.prompt, small, scale, contexts=contexts)
    return (found - inversion.path[0] * (1 + inversion.sigmas[0] ** 2) ** -0.5).square().mean().sqrt().item()


def test_null_text_follows_the_path_under_guidance(small: Model) -> None:
    inversion = inverted(noise(2, 4, 8, 8), "a red apple", small, steps=4, rounds=10)
    before = [parameter.clone() for parameter in small.unet.parameters()]
    contexts = null_text(inversion, small, 5.0, rounds=12, rate=0.05, enough=0)
    plain, followed_ = followed(inversion, small, 5.0, None), followed(inversion, small, 5.0, contexts)
    assert followed_ < 0.5 * plain
    assert len(contexts) == 4 and all(context.shape == (2, 77, 16) for context in contexts)
    assert not any(context.requires_grad or context.is_inference() for context in contexts)
    assert all(torch.equal(one, other) for one, other in zip(before, small.unet.parameters(), strict=True))
    assert not torch.is_grad_enabled() or all(parameter.grad is None for parameter in small.unet.parameters())


def test_null_text_without_rounds_is_the_empty_prompt(small: Model) -> None:
    inversion = inverted(noise(1, 4, 8, 8), "a red apple", small, steps=4)
    contexts = null_text(inversion, small, 5.0, rounds=0)
    assert torch.allclose(
        redrawn(inversion, "a red apple", small, 5.0, contexts=contexts),
        redrawn(inversion, "a red apple", small, 5.0),
        atol=1e-5,
    )


def test_null_text_stops_where_it_is_near_enough(small: Model) -> None:
    """At guidance 1 of a refined inversion the path is met without any change of the context."""
    inversion = inverted(noise(1, 4, 8, 8), "a red apple", small, steps=4, rounds=30)
    contexts = null_text(inversion, small, 1.0, rounds=5)
    assert all(torch.equal(context, contexts[0]) for context in contexts)


def test_null_text_widens_weights_for_its_time(small: Model) -> None:
    """The U-Net in bfloat16 gives contexts in float32, and is in bfloat16 after; pictures follow the path better."""
    inversion = inverted(noise(1, 4, 8, 8), "a red apple", small, steps=4, rounds=10)
    with weights_in(torch.bfloat16, *small.networks.values()):
        half = replace(small, dtype=torch.bfloat16)
        contexts = null_text(inversion, half, 5.0, rounds=8, rate=0.05, enough=0)
        assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}
        assert contexts[0].dtype == torch.float32
    assert followed(inversion, small, 5.0, contexts) < 0.8 * followed(inversion, small, 5.0, None)


def test_each_step_has_its_own_unconditional_context(small: Model) -> None:
    inversion = inverted(noise(1, 4, 8, 8), "a red apple", small, steps=4)
    contexts = [torch.full((1, 77, 16), float(step)) for step in range(4)]
    plan = null_guidance(contexts, "a blue cat", inversion, small, 5.0)
    assert isinstance(plan, ClassifierFree) and plan.scale == 5.0
    for step in range(4):
        positive, empty = plan.rows(Moment(step, 1.0, step / 4, torch.empty(0)))
        assert torch.equal(empty.context, contexts[step]) and not torch.equal(positive.context, empty.context)


def test_nonsense_is_said_in_a_line(small: Model) -> None:
    latents = noise(1, 4, 8, 8)
    inversion = inverted(latents, "a tree", small, steps=2)
    for call, message in (
        (lambda: drive(invert(latents, [1.0, 0.5]), gaussian), r"sigmas=\(1.0, 0.5\): .* rising"),
        (lambda: inverted(latents[0], "", small, 2), r"latents: their shape is \(4, 8, 8\)"),
        (lambda: inverted(noise(1, 16, 8, 8), "", small, 2), r"\(B, 4, h, w\) is needed"),
        (lambda: inverted(latents, "", small, 0), "steps=0: a whole number from 1 to 999"),
        (lambda: inverted(latents, "", small, 2, rounds=-1), "rounds=-1"),
        (lambda: inverted(latents, "", small, 2, strength=1.5), "strength=1.5: a number from 0 to 1"),
        (lambda: redrawn(inversion, "", small, guidance=-1), "guidance=-1"),
        (lambda: redrawn(inversion, "", small, contexts=[]), "contexts: there are 0, one for each of 2 steps"),
        (lambda: null_text(inversion, small, rate=2.0), "rate=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_box_draws_a_picture_again(box: Model) -> None:
    """PSNR against the picture's own decode: DDIM alone, refined, and with guidance, which leads away."""
    picture = drawings(1, 64, seed=4)
    with torch.inference_mode():
        latents = box.autoencoder.encode(from_uint8(picture)).mean * box.family.latent_scale
    preview = full(box)
    found = []
    for rounds, guidance in ((0, 1.0), (2, 1.0), (2, 5.0)):
        inversion = inverted(latents, "a red apple", box, steps=8, rounds=rounds)
        found.append(psnr(preview(redrawn(inversion, "a red apple", box, guidance)), preview(latents)))
    assert found[1] > found[0] + 3 and found[1] > 30 and found[2] < found[1] - 5
