"""T2I-Adapters: against diffusers' at tiny size, features and steered answers, and their files in every layout."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.models.controlnet import ControlNet
from sfumato.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.models.unet import UNet, UNetConfig
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.controls import load_t2i_adapter, save_control, save_t2i_adapter
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.diffusers_names import to_diffusers, unet_keys
from tests.test_parity_networks import UNETS, diffusers_unet, randn, randomise
from tests.tiny import TINIES, random_parts

FULL = T2IAdapterConfig(channels=(8, 16, 32), factor=4)
KINDS = {
    "full": FULL,
    "full, grey, three blocks": replace(FULL, in_channels=1, num_res_blocks=3),
    "light": T2IAdapterConfig(channels=(8, 16, 32, 32), num_res_blocks=4, factor=4, kind="light"),
    "xl": T2IAdapterConfig(channels=(8, 16, 32, 32), factor=8, kind="xl"),
}


def hint(batch: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, 64, 32, generator=torch.Generator().manual_seed(2))


def theirs_of(config: T2IAdapterConfig) -> diffusers.T2IAdapter:
    light = config.kind == "light"
    return diffusers.T2IAdapter(
        in_channels=config.in_channels,
        channels=list(config.channels[:-1] if light else config.channels),
        num_res_blocks=config.num_res_blocks,
        downscale_factor=config.factor,
        adapter_type={"full": "full_adapter", "light": "light_adapter", "xl": "full_adapter_xl"}[config.kind],
    )


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert float(other.std()) > 0.05
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, config, parameters", [
    ("full", T2IAdapterConfig(), 77_369_280),
    ("light", T2IAdapterConfig(num_res_blocks=4, kind="light"), 18_689_200),
    ("xl", T2IAdapterConfig(factor=16, kind="xl"), 79_028_160),
])  # fmt: skip
def test_full_size_is_diffusers(name: str, config: T2IAdapterConfig, parameters: int) -> None:
    with torch.device("meta"):
        ours, theirs = T2IAdapter(config), theirs_of(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == parameters


def test_names_are_tencents() -> None:
    with torch.device("meta"):
        full = T2IAdapter(T2IAdapterConfig()).state_dict()
        light = T2IAdapter(T2IAdapterConfig(num_res_blocks=4, kind="light")).state_dict()
    assert full["conv_in.weight"].shape == (320, 192, 3, 3)
    assert full["body.2.in_conv.weight"].shape == (640, 320, 1, 1) and "body.6.in_conv.weight" not in full
    assert full["body.7.block2.bias"].shape == (1280,)
    assert light["body.0.in_conv.weight"].shape == (80, 192, 1, 1)
    assert light["body.3.body.3.block2.weight"].shape == (320, 320, 3, 3)
    assert light["body.3.out_conv.weight"].shape == (1280, 320, 1, 1)


@pytest.mark.parametrize("kind, unet_kind", [("full", "sd1"), ("full", "sd2"), ("xl", "xl")])
@torch.no_grad()
def test_steered_answers_are_diffusers(kind: str, unet_kind: str, tmp_path: Path) -> None:
    """Features are added where diffusers' pipelines add them."""
    config: UNetConfig = UNETS[unet_kind]
    adapter = randomise(T2IAdapter(KINDS[kind]))
    unet, their_unet = randomise(UNet(config), 7), diffusers_unet(config).eval()
    their_unet.load_state_dict(to_diffusers(unet.state_dict(), unet_keys(config)), strict=True)
    x, t, context = randn(2, 4, 16, 8), torch.tensor([3.0, 700.0]), randn(2, 7, config.context_dim)
    added, vector = {}, None
    if config.vector_dim is not None:
        embeds, numbers = randn(2, 10, seed=11), torch.arange(12.0).reshape(2, 6)
        added = {"added_cond_kwargs": {"text_embeds": embeds, "time_ids": numbers}}
        vector = torch.cat([embeds, their_unet.add_time_proj(numbers.flatten()).reshape(2, -1)], dim=1)
    residuals = adapter(hint())
    ours = unet(x, t, context, vector, residuals=residuals.scaled(0.5))
    features = [0.5 * feature.expand(2, -1, -1, -1) for feature in adapter.features(hint())]
    theirs = their_unet(x, t, context, down_intrablock_additional_residuals=features, **added).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert float((ours - unet(x, t, context, vector)).abs().max()) > 0.05


@torch.no_grad()
def test_a_grey_adapter_takes_the_mean_and_wrong_hints_are_told() -> None:
    adapter = randomise(T2IAdapter(KINDS["full, grey, three blocks"]))
    agree(adapter.features(hint()), adapter.features(hint().mean(dim=1, keepdim=True)))
    with pytest.raises(ValueError, match=r"hint: of shape \(1, 2, 64, 32\), \(B, 1, H, W\), H and W multiples of 4"):
        adapter(hint(channels=2))
    with pytest.raises(ValueError, match="multiples of 4"):
        adapter(hint()[:, :, :63])
    with pytest.raises(ValueError, match="kind='half': one of full, light, xl"):
        T2IAdapterConfig(kind="half")


# -- files ------------------------------------------------------------------------------------------------------------


def model_of(kind: str, tmp_path: Path) -> Model:
    path = tmp_path / f"{kind}.safetensors"
    save_checkpoint(path, TINIES[kind], random_parts(TINIES[kind]), torch.float32)
    return load_model(path)


def fitting(kind: str, model: Model) -> T2IAdapterConfig:
    """The config of a kind that fits a tiny model."""
    unet, factor = model.family.unet, model.family.autoencoder.factor
    widths = tuple(unet.channels * mult for mult in unet.channel_mult)
    channels = (*widths, widths[-1]) if kind == "xl" else widths
    found = replace(KINDS[kind], channels=channels, factor=2 * factor if kind == "xl" else factor)
    return replace(found, unet_blocks=unet.num_res_blocks)


@pytest.mark.parametrize("kind, family", [(kind, "xl" if kind == "xl" else "sd1") for kind in KINDS])
@torch.no_grad()
def test_files_go_there_and_back_and_are_diffusers(kind: str, family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    config = fitting(kind, model)
    network = randomise(T2IAdapter(config), 4)
    image = hint(channels=config.in_channels)
    save_t2i_adapter(tmp_path / "a.safetensors", network)
    save_t2i_adapter(tmp_path / "folder", network)
    tensors, _ = load_safetensors(tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth", "folder"):
        found = load_t2i_adapter(tmp_path / name, model)
        assert found.config == config and not found.training
        state = found.state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    theirs = diffusers.T2IAdapter.from_pretrained(tmp_path / "folder").eval()
    agree(network.features(image), theirs(image))
    randomise(theirs, 5).save_pretrained(tmp_path / "theirs")
    agree(load_t2i_adapter(tmp_path / "theirs", model).features(image), theirs(image))


@torch.no_grad()
def test_a_loaded_adapter_steers_its_model(tmp_path: Path) -> None:
    model = model_of("xl", tmp_path)
    save_t2i_adapter(tmp_path / "a.safetensors", randomise(T2IAdapter(fitting("xl", model))), torch.float16)
    residuals = load_t2i_adapter(tmp_path / "a.safetensors", model)(hint(1)[:, :, :32])
    args = (randn(1, 4, 4, 4), torch.tensor([4.0]), randn(1, 7, model.family.unet.context_dim))
    vector = randn(1, model.family.unet.vector_dim or 0)
    assert not torch.equal(model.unet(*args, vector, residuals=residuals), model.unet(*args, vector))


def test_what_does_not_fit_is_told_in_a_line(tmp_path: Path) -> None:
    sd1, xl = model_of("sd1", tmp_path), model_of("xl", tmp_path)

    def refused(name: str, model: Model, words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            load_t2i_adapter(tmp_path / name, model)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("adapter=")

    save_t2i_adapter(tmp_path / "x.safetensors", T2IAdapter(fitting("xl", xl)))
    refused("x.safetensors", sd1, r"kind xl for a U-Net of widths \(8, 16, 32, 32\); the model is of tiny-sd1")
    save_t2i_adapter(tmp_path / "s.safetensors", T2IAdapter(fitting("full", sd1)))
    refused("s.safetensors", xl, "kind full for a U-Net of widths")
    save_control(tmp_path / "c.safetensors", ControlNet(sd1.family.unet))
    refused("c.safetensors", sd1, "no T2I-Adapter")
    refused("sd1.safetensors", sd1, "it is a Stable Diffusion U-Net, no T2I-Adapter")
    tensors, _ = load_safetensors(tmp_path / "s.safetensors")
    save_safetensors(tmp_path / "more.safetensors", tensors | {"body.0.skep.weight": torch.zeros(1)}, {})
    refused("more.safetensors", sd1, "the tensor body.0.skep.weight is in no network")
    del tensors["body.1.block1.bias"]
    save_safetensors(tmp_path / "less.safetensors", tensors, {})
    refused("less.safetensors", sd1, "the tensor body.1.block1.bias is missing")
    with pytest.raises(ValueError, match="pickles are not written"):
        save_t2i_adapter(tmp_path / "a.bin", T2IAdapter(KINDS["full"]))
