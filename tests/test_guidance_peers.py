"""What guidance asks of the network, and whole plans, against diffusers' networks and pipelines of the same weights."""

from collections.abc import Callable
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor

from sfumato.diffusion.guidance import Guidance, Options, plan
from sfumato.diffusion.noise import SeededNoise
from sfumato.diffusion.samplers import find_sampler
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.engine import Engine, Run
from sfumato.families import FAMILIES, Model
from sfumato.models.layers import slice_attention
from sfumato.models.unet import UNet, UNetConfig
from sfumato.types import Cond, NetState
from sfumato.weights.layouts.diffusers_names import to_diffusers, unet_keys
from tests.conftest import TINY
from tests.test_engine import assert_same, network_calls
from tests.test_parity_networks import diffusers_unet


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONFIG = UNetConfig(
    channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, transformer_depth=(1, 1, 0), context_dim=16, num_heads=2,
    norm_groups=4,
)  # fmt: skip
FINER = replace(CONFIG, num_res_blocks=2, transformer_depth=(0, 1, 2), middle_depth=2, num_heads=4)


def strong(unet: UNet) -> UNet:
    """With random weights that are large enough for attention to be far from even, and for words to matter."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in unet.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            gain = 3.0 if "attn1.to_q" in name else 1.0
            state[name] = gain * noise * tensor[0].numel() ** -0.5
        else:
            state[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    unet.load_state_dict(state)
    return unet.eval()


def networks(config: UNetConfig) -> tuple[UNet, diffusers.UNet2DConditionModel]:
    """Ours and theirs with the same random weights."""
    ours, theirs = strong(UNet(config)), diffusers_unet(config).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), unet_keys(config)))
    theirs.register_to_config(sample_size=64, attention_head_dim=config.num_heads)  # as pipelines want them
    return ours, theirs


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
@pytest.mark.parametrize("config", [CONFIG, FINER], ids=["shallow", "finer"])
def test_freeu_is_diffusers(config: UNetConfig, size: tuple[int, int]) -> None:
    ours, theirs = networks(config)
    x, t, context = randn(2, 4, *size), torch.tensor([3.0, 801.0]), randn(2, 7, 16, seed=1)
    with torch.inference_mode():
        plain = ours(x, t, context)
        theirs.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        expected = theirs(x, t, context).sample
        found = ours(x, t, context, state=NetState(freeu=(1.2, 1.4, 0.9, 0.2)))
        assert_same(found, expected)
        assert float((found - plain).abs().max()) > 1e-2 * float(plain.abs().max())
        assert torch.equal(ours(x, t, context), plain)
        assert torch.equal(ours(x, t, context, state=NetState()), plain)


def test_the_probed_map_is_the_networks_own() -> None:
    """With the map's weights averages of values are the attention's outcome; probing changes nothing else."""
    ours, _ = networks(CONFIG)
    maps: list[Tensor] = []
    x, t, context = randn(2, 4, 8, 12), torch.tensor([3.0, 801.0]), randn(2, 7, 16, seed=1)
    attention = ours.middle_block[1].transformer_blocks[0].attn1
    seen: list[tuple[Tensor, Tensor]] = []
    handle = attention.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.inference_mode():
        plain = ours(x, t, context)
        probed = ours(x, t, context, None, NetState(probe="middle_block"), maps)
        handle.remove()
        assert torch.equal(probed, plain)
        [found], (z, out) = maps, seen[-1]
        assert found.shape == (2, 2, 6, 6) and found.dtype == torch.float32
        v = attention.to_v(z).view(2, 6, 2, 8).transpose(1, 2)
        assert_same(attention.to_out((found @ v).transpose(1, 2).reshape(2, 6, 16)), out)
    assert float((found - 1 / 6).abs().max()) > 0.1


@pytest.mark.parametrize("state", [None, NetState(perturbed=("middle_block",), probe="output_blocks.3")])
def test_sliced_attention_is_the_same(state: NetState | None) -> None:
    ours, _ = networks(CONFIG)
    args = randn(2, 4, 8, 12), torch.tensor([3.0, 801.0]), randn(2, 7, 16, seed=1), None, state
    maps: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        whole = ours(*args, maps[0])
        slice_attention(ours, 5)
        assert_same(ours(*args, maps[1]), whole)
    assert [len(found) for found in maps] == [int(state is not None)] * 2
    for one, other in zip(*maps, strict=True):
        assert_same(one, other)


def test_blocks_are_named_and_others_refused() -> None:
    ours, _ = networks(FINER)
    blocks = ours.self_attention_blocks()
    assert blocks == (
        "middle_block",
        *(f"input_blocks.{i}" for i in (4, 5, 7, 8)),
        *(f"output_blocks.{i}" for i in range(6)),
    )
    args = randn(1, 4, 8, 8), torch.tensor([5.0]), randn(1, 7, 16)
    with torch.inference_mode():
        answers = [
            ours(*args, state=NetState(perturbed=(name,))) for name in (*blocks, "middle_block.1.transformer_blocks.1")
        ]
        answers.append(ours(*args))
    for index, one in enumerate(answers):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in answers[:index])
    for name in ("middle", "input_blocks.0", "input_blocks.99", "out"):
        for state in (NetState(perturbed=("middle_block", name)), NetState(probe=name)):
            with pytest.raises(ValueError, match=f"^block='{name}': .* in middle_block, input_blocks.4, "):
                ours(*args, state=state)
    bare = UNet(replace(CONFIG, transformer_depth=(0, 0, 0), middle_depth=0))
    with pytest.raises(ValueError, match="but in no block$"):
        bare(*args, state=NetState(probe="middle_block"))


def test_an_attention_to_the_context_alone_is_none_of_its_own() -> None:
    ours = UNet(replace(CONFIG, cross_only=(True, False, False)))
    assert ours.self_attention_blocks() == ("middle_block", "input_blocks.3", "output_blocks.2", "output_blocks.3")


def drive_like(
    unet: UNet, scheduler: diffusers.DDIMScheduler, latents: Tensor, make: Callable[[], Guidance]
) -> tuple[Tensor, list[int]]:
    """Final latents of our DDIM over the levels of diffusers', and the rows of each network call."""
    prediction = {"epsilon": "eps", "v_prediction": "v"}[scheduler.config.prediction_type]
    family = replace(TINY, schedule=FAMILIES["sd1"].schedule, unet=unet.config, prediction=prediction)
    model = Model(family, (), unet, None, (), torch.device("cpu"), torch.float32, "tiny", str)  # type: ignore[arg-type]
    levels = NoiseSchedule(family.schedule).sigmas
    sigmas = [*(float(levels[t]) for t in scheduler.timesteps), 0.0]
    noise = SeededNoise(range(len(latents)), latents.shape[1:])
    x = latents * (1 + sigmas[0] ** 2) ** 0.5
    run = Run(find_sampler("ddim").run(x, sigmas, noise), make(), sigmas)
    with network_calls(model) as rows:
        [found] = Engine(model).drive([run])
    assert found is not None
    return found, rows


def scheduler_of(prediction: str, steps: int) -> diffusers.DDIMScheduler:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


def pipeline_of(kind: type, unet: diffusers.UNet2DConditionModel, prediction: str, **more: object) -> object:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipe = kind(**parts, unet=unet, scheduler=scheduler_of(prediction, 3), requires_safety_checker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT, NEGATIVE, LATENTS = randn(2, 7, 16, seed=3), randn(2, 7, 16, seed=4), randn(2, 4, 16, 16, seed=5)
CALL = {
    "prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "latents": LATENTS, "height": 128, "width": 128,
    "num_inference_steps": 3, "output_type": "latent",
}  # fmt: skip


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scale, rescale", [(5.0, 0.0), (5.0, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize(
    "theirs_at, ours_at",
    [("mid", ("middle_block",)), (["mid", "up_blocks.1.attentions.0"], ("middle_block", "output_blocks.2"))],
    ids=["middle", "two blocks"],
)
def test_perturbed_attention_guidance_is_diffusers(
    theirs_at: object, ours_at: tuple[str, ...], scale: float, rescale: float, prediction: str
) -> None:
    ours, theirs = networks(CONFIG)
    pipe = pipeline_of(diffusers.StableDiffusionPAGPipeline, theirs, prediction, pag_applied_layers=theirs_at)
    expected = pipe(**CALL, guidance_scale=scale, guidance_rescale=rescale, pag_scale=3.0).images
    options = Options(scale, pag=3.0, pag_blocks=ours_at, rescale=rescale)
    found, rows = drive_like(
        ours, pipe.scheduler, LATENTS, lambda: plan(Cond(PROMPT), Cond(NEGATIVE), options, prediction)
    )
    assert_same(found, expected)
    assert rows == ([4, 2] if scale > 1 else [2, 2]) * 3  # the perturbed rows are a call of their own


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_self_attention_guidance_is_diffusers(scale: float, prediction: str) -> None:
    ours, theirs = networks(CONFIG)
    pipe = pipeline_of(diffusers.StableDiffusionSAGPipeline, theirs, prediction)
    drawn = {sag: pipe(**CALL, guidance_scale=scale, sag_scale=sag).images for sag in (0.0, 0.75)}
    found, rows = drive_like(
        ours,
        scheduler_of(prediction, 3),
        LATENTS,
        lambda: plan(Cond(PROMPT), Cond(NEGATIVE), Options(scale, sag=0.75), prediction),
    )
    assert_same(found, drawn[0.75])
    assert float((drawn[0.75] - drawn[0.0]).abs().max()) > 1e-2 * float(drawn[0.0].abs().max())
    assert rows == [4 if scale > 1 else 2, 2] * 3
