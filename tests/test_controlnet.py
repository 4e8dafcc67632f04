"""ControlNets: what they add to the U-Net, against diffusers' at tiny size, and their files in every layout."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from sfumato.families import FAMILIES, Model
from sfumato.models.controlnet import ControlNet, hint_widths
from sfumato.models.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from sfumato.models.residuals import Residuals
from sfumato.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.models.unet import UNet, UNetConfig
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.controls import load_control, load_ip_adapter, load_t2i_adapter, save_control
from sfumato.weights.controls.names import control_keys
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.diffusers_names import from_diffusers, to_diffusers, unet_keys
from tests.test_parity_networks import UNETS, diffusers_unet, randn, randomise
from tests.tiny import TINIES, random_parts

WIDTHS = (4, 6, 8)  # f = 4
KINDS = ("sd1", "sd2", "xl")


def control(config: UNetConfig, seed: int = 0) -> ControlNet:
    return randomise(ControlNet(config, hint_widths=WIDTHS), seed)  # type: ignore[return-value]


def told(config: UNetConfig, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """x, t, context, vector and hint."""
    vector = None if config.vector_dim is None else randn(batch, config.vector_dim, seed=4)
    hint = torch.rand(batch, 3, 32, 64, generator=torch.Generator().manual_seed(5))
    x, t = randn(batch, config.in_channels, 8, 16), torch.tensor([3.0, 700.0])[:batch]
    return x, t, randn(batch, 7, config.context_dim, seed=3), vector, hint


# -- residuals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_residuals_the_answer_is_as_it_was_to_the_bit(kind: str) -> None:
    unet = randomise(UNet(UNETS[kind]))
    *args, _ = told(UNETS[kind])
    plain = unet(*args)
    assert torch.equal(unet(*args, residuals=None), plain)
    assert torch.equal(unet(*args, residuals=Residuals()), plain)


@torch.no_grad()
def test_each_residual_is_added_where_it_says() -> None:
    config = UNETS["sd1"]
    unet = randomise(UNet(config))
    *args, _ = told(config)
    seen: dict[str, Tensor] = {}
    for name in ("input_blocks.2", "input_blocks.3", "middle_block", "output_blocks.0", "output_blocks.1"):
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen.__setitem__(name, given[0].clone())
        )
    unet(*args)
    before = dict(seen)
    levels = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    shapes = [(2, c, 8 >> level, 16 >> level) for c, level in zip(unet.skip_channels, levels, strict=True)]
    skips = tuple(randn(*shape, seed=9 + index) for index, shape in enumerate(shapes))
    middle = randn(*shapes[-1], seed=8)
    unet(*args, residuals=Residuals(skips, middle))
    width = middle.shape[1]
    assert torch.equal(seen["input_blocks.3"], before["input_blocks.3"])  # the way down does not see them
    assert torch.equal(seen["middle_block"], before["middle_block"])
    x, skip = seen["output_blocks.0"].split(width, dim=1)
    plain_x, plain_skip = before["output_blocks.0"].split(width, dim=1)
    torch.testing.assert_close(x, plain_x + middle)
    torch.testing.assert_close(skip, plain_skip + skips[-1])
    inner = randn(*shapes[2], seed=7)
    unet(*args, residuals=Residuals(inner={2: inner}))
    assert torch.equal(seen["input_blocks.2"], before["input_blocks.2"])
    torch.testing.assert_close(seen["input_blocks.3"], before["input_blocks.3"] + inner)


def test_residuals_add_up_and_are_scaled() -> None:
    a = Residuals((torch.ones(2), torch.ones(2)), torch.ones(1), {3: torch.ones(1)})
    b = Residuals((torch.full((2,), 2.0), torch.full((2,), 3.0)), None, {5: torch.ones(1), 3: torch.ones(1)})
    both = a + b
    assert [float(skip[0]) for skip in both.skips] == [3, 4]
    assert float(both.middle) == 1
    assert {index: float(value) for index, value in both.inner.items()} == {3: 2, 5: 1}
    assert len(both) == 5
    own = both.scaled([1, 10, 100, 1000, 10000])  # inner 3, inner 5, skips, middle
    assert (float(own.inner[3]), float(own.inner[5])) == (2, 10)
    assert [float(skip[0]) for skip in own.skips] == [300, 4000]
    assert float(own.middle) == 10000
    assert float(both.scaled(0.5).skips[1][0]) == 2
    assert (Residuals() + a).skips is a.skips
    with pytest.raises(ValueError, match="weights: 2 given, one number or 5 are needed"):
        both.scaled([1.0, 2.0])
    with pytest.raises(ValueError, match="of different U-Nets"):
        _ = a + Residuals((torch.ones(1),))


def test_residuals_of_another_unet_are_refused() -> None:
    config = UNETS["sd1"]
    unet = UNet(config)
    *args, _ = told(config)
    with pytest.raises(ValueError, match="skips: 2 residuals, this U-Net has 9 input blocks"):
        unet(*args, residuals=Residuals((torch.zeros(1), torch.zeros(1))))
    with pytest.raises(ValueError, match="inner: block 9"):
        unet(*args, residuals=Residuals(inner={9: torch.zeros(1)}))


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_controlnet_changes_no_bit(kind: str) -> None:
    unet = randomise(UNet(UNETS[kind]))
    x, t, context, vector, _ = told(UNETS[kind])
    network = ControlNet.from_unet(unet)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert network.factor == 8
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight"):
        assert torch.equal(network.get_parameter(name), unet.get_parameter(name))
    residuals = network(x, t, context, vector, torch.rand(2, 3, 64, 128))
    assert len(residuals.skips) == len(unet.input_blocks)
    assert all(float(skip.abs().max()) == 0 for skip in residuals.skips)
    assert torch.equal(unet(x, t, context, vector, residuals=residuals), unet(x, t, context, vector))


def test_what_is_zero_learns() -> None:
    """The first step moves the ways out, the second what is behind them (Zhang et al. 2023, section 3.1)."""
    config = UNETS["sd1"]
    unet = randomise(UNet(config))
    network = ControlNet.from_unet(unet, factor=4)
    x, t, context, vector, hint = told(config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    target = randn(2, 4, 8, 16, seed=6)
    losses = []
    for _ in range(4):
        loss = (unet(x, t, context, vector, residuals=network(x, t, context, vector, hint)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    first = network.input_hint_block[0]
    assert isinstance(first, nn.Conv2d) and float(first.weight.grad.abs().max()) > 0


def test_hints_that_do_not_fit_are_refused() -> None:
    config = UNETS["sd1"]
    x, t, context, vector, hint = told(config)
    with pytest.raises(ValueError, match=r"hint: of shape \(2, 3, 16, 64\), \(B, 3, 32, 64\) is needed"):
        control(config)(x, t, context, vector, hint[:, :, :16])
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 64\) is needed"):
        control(config)(x, t, context, vector, hint[:, :1])
    with pytest.raises(ValueError, match="factor=6: a power of 2"):
        hint_widths(6)
    assert hint_widths(8) == (16, 32, 96, 256)
    assert [len(hint_widths(factor)) for factor in (1, 2, 4, 16)] == [1, 2, 3, 5]


@torch.no_grad()
def test_one_hint_serves_all_and_pooled_is_the_mean() -> None:
    config = UNETS["sd1"]
    x, t, context, vector, hint = told(config)
    network = control(config)
    one, both = network(x, t, context, vector, hint[:1]), network(x, t, context, vector, hint[:1].expand(2, -1, -1, -1))
    for a, b in zip(one.skips, both.skips, strict=True):
        torch.testing.assert_close(a, b)
    network.pooled = True
    pooled = network(x, t, context, vector, hint[:1])
    torch.testing.assert_close(pooled.skips[3], one.skips[3].mean(dim=(2, 3), keepdim=True))
    assert pooled.middle is not None and pooled.middle.shape[2:] == (1, 1)
    wide = torch.cat([x, randn(2, 5, 8, 16)], dim=1)  # an inpainting model's
    torch.testing.assert_close(network(wide, t, context, vector, hint[:1]).skips[0], pooled.skips[0])


# -- against diffusers ------------------------------------------------------------------------------------------------


def diffusers_control(config: UNetConfig, widths: tuple[int, ...] = WIDTHS) -> ControlNetModel:
    depths = config.transformer_depth
    added = {}
    if config.vector_dim is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    blocks = tuple(config.channels * mult for mult in config.channel_mult)
    return ControlNetModel(
        in_channels=config.in_channels,
        block_out_channels=blocks,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        transformer_layers_per_block=[depth or 1 for depth in depths[:-1]] + [depths[-1] or config.middle_depth],
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in blocks),
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        conditioning_embedding_out_channels=widths,
        **added,
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steered_answers_are_diffusers(kind: str) -> None:
    """Their weights into ours, then ours into theirs: the residuals, and the steered U-Net's answer."""
    config = UNETS[kind]
    ours, theirs = ControlNet(config, hint_widths=WIDTHS).eval(), diffusers_control(config)
    unet, their_unet = randomise(UNet(config), 7), diffusers_unet(config).eval()
    their_unet.load_state_dict(to_diffusers(unet.state_dict(), unet_keys(config)), strict=True)
    keys = control_keys(ours)
    x, t, context, _, hint = told(config)
    added, vector = {}, None
    if config.vector_dim is not None:
        text_embeds, time_ids = randn(2, 10, seed=11), torch.arange(12.0).reshape(2, 6)
        added = {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}
        numbers = their_unet.add_time_proj(time_ids.flatten()).reshape(2, -1)
        vector = torch.cat([text_embeds, numbers], dim=1)

    def compare() -> None:
        down, middle = theirs(x, t, context, hint, return_dict=False, **added)
        residuals = ours(x, t, context, vector, hint)
        for mine, other in zip(residuals.skips, down, strict=True):
            assert float(other.std()) > 0.05
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(residuals.middle, middle, rtol=1e-5, atol=1e-4)
        steered = unet(x, t, context, vector, residuals=residuals)
        expected = their_unet(
            x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle, **added
        ).sample
        torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-4)
        assert float((steered - unet(x, t, context, vector)).abs().max()) > 0.05

    randomise(theirs, 1)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), keys), strict=True)
    compare()
    randomise(ours, 2)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), keys), strict=True)
    compare()


@pytest.mark.parametrize("name, parameters", [("sd1", 361_279_120), ("sd2-base", 364_228_240), ("xl", 1_251_014_160)])
def test_full_size_is_diffusers(name: str, parameters: int) -> None:
    config = FAMILIES[name].unet
    with torch.device("meta"):
        ours, theirs = ControlNet(config), diffusers_control(config, (16, 32, 96, 256))
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    keys = control_keys(ours)
    assert {keys[name].name: tensor.shape for name, tensor in ours.state_dict().items()} == expected


def test_names_are_the_originals() -> None:
    with torch.device("meta"):
        state = ControlNet(UNetConfig()).state_dict()
    assert state["input_hint_block.14.weight"].shape == (320, 256, 3, 3)
    assert state["zero_convs.11.0.weight"].shape == (1280, 1280, 1, 1)
    assert state["middle_block_out.0.bias"].shape == (1280,)
    assert state["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape == (320, 768)
    assert len(state) == 340


# -- files ------------------------------------------------------------------------------------------------------------


def model_of(kind: str, tmp_path: Path) -> Model:
    path = tmp_path / f"{kind}.safetensors"
    save_checkpoint(path, TINIES[kind], random_parts(TINIES[kind]), torch.float32)
    return load_model(path)


def network_of(model: Model, seed: int = 3) -> ControlNet:
    config = model.family.unet
    if model.family.concat:
        config = replace(config, in_channels=4)
    return randomise(ControlNet(config, hint_widths=(4, 4, 6, 8)), seed)  # type: ignore[return-value]


def same(a: nn.Module, b: nn.Module, **near: float) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(near or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint", "sd2", "xl"])
def test_every_layout_loads(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    network = network_of(model)
    save_control(tmp_path / "control.safetensors", network)
    tensors, header = load_safetensors(tmp_path / "control.safetensors")
    assert all(name.startswith("control_model.") for name in tensors) and header == {"format": "pt"}
    save_control(tmp_path / "folder", network)
    bare = {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "bare.safetensors", bare, {})
    torch.save({"state_dict": tensors | {"first_stage_model.x": torch.zeros(1)}}, tmp_path / "whole.pth")
    save_safetensors(tmp_path / "flat.safetensors", to_diffusers(network.state_dict(), control_keys(network)), {})
    for name in ("control.safetensors", "bare.safetensors", "whole.pth", "flat.safetensors", "folder"):
        found = load_control(tmp_path / name, model)
        assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
        assert found.config.in_channels == network.config.in_channels
        same(found, network)


def test_a_smaller_one_loads(tmp_path: Path) -> None:
    """With fewer transformer blocks than the U-Net has, as the "mid" ones for XL."""
    model = model_of("xl", tmp_path)
    config = replace(model.family.unet, transformer_depth=(0, 0, 1), middle_depth=1)
    assert config.transformer_depth != model.family.unet.transformer_depth
    network = randomise(ControlNet(config, hint_widths=(4, 4, 6, 8)), 3)
    assert isinstance(network, ControlNet)
    save_control(tmp_path / "mid.safetensors", network)
    save_control(tmp_path / "mid", network)
    for name in ("mid.safetensors", "mid"):
        found = load_control(tmp_path / name, model)
        assert found.config == config
        same(found, network)


@torch.no_grad()
def test_a_folder_is_diffusers_own(tmp_path: Path) -> None:
    model = model_of("sd2", tmp_path)
    network = network_of(model)
    save_control(tmp_path / "ours", network)
    theirs = ControlNetModel.from_pretrained(tmp_path / "ours").eval()
    x, t, context = randn(1, 4, 8, 8), torch.tensor([5.0]), randn(1, 7, network.config.context_dim)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    down, middle = theirs(x, t, context, hint, return_dict=False)
    residuals = network(x, t, context, None, hint)
    torch.testing.assert_close(residuals.middle, middle, rtol=1e-5, atol=1e-4)
    randomise(theirs, 8).save_pretrained(tmp_path / "theirs")
    found = load_control(tmp_path / "theirs", model)
    down, middle = theirs(x, t, context, hint, return_dict=False)
    residuals = found(x, t, context, None, hint)
    torch.testing.assert_close(residuals.skips[2], down[2], rtol=1e-5, atol=1e-4)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config |= {"controlnet_conditioning_channel_order": "bgr", "global_pool_conditions": True}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    found = load_control(tmp_path / "theirs", model)
    assert found.pooled and not load_control(tmp_path / "theirs", model, pooled=False).pooled
    found.pooled = False
    torch.testing.assert_close(found(x, t, context, None, hint.flip(1)).skips[2], down[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint"])
def test_differences_are_added_to_the_models_own(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    network = network_of(model)
    base = model.unet.state_dict()
    stored = {"difference": torch.ones(())}
    for name, tensor in network.state_dict().items():
        own = base[name][:, : tensor.shape[1]] if name in base and tensor.ndim == 4 else base.get(name, 0)
        stored[f"control_model.{name}"] = tensor - own
    save_safetensors(tmp_path / "difference.safetensors", stored, {})
    same(load_control(tmp_path / "difference.safetensors", model), network, rtol=0, atol=1e-6)


def test_precision_and_pooling_are_kept(tmp_path: Path) -> None:
    model = replace(model_of("sd1", tmp_path), dtype=torch.bfloat16)
    network = network_of(model)
    save_control(tmp_path / "t2i_shuffle.safetensors", network, torch.float16)
    tensors, _ = load_safetensors(tmp_path / "t2i_shuffle.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    found = load_control(tmp_path / "t2i_shuffle.safetensors", model)
    assert found.pooled and {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    network.pooled = True
    save_control(tmp_path / "plain.safetensors", network)
    assert load_control(tmp_path / "plain.safetensors", model).pooled


def test_what_does_not_fit_is_told_in_a_line(tmp_path: Path) -> None:
    model = model_of("sd1", tmp_path)

    def refused(name: str, words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            load_control(tmp_path / name, model)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"control={str(tmp_path / name)!r}: ")

    other = network_of(model_of("xl", tmp_path))
    save_control(tmp_path / "xl.safetensors", other)
    refused("xl.safetensors", "width 8, context 24 and vector 60 .*; the model is of tiny-sd1, with 8, 8 and None")
    refused("sd1.safetensors", "it is a Stable Diffusion U-Net, no ControlNet")
    refused("none.safetensors", "no such file or folder")
    grey = randomise(ControlNet(model.family.unet, hint_channels=1, hint_widths=(4, 4, 6, 8)))
    save_control(tmp_path / "grey.safetensors", grey)
    refused("grey.safetensors", "its hint has 1 channels, 3 are needed")
    assert load_control(tmp_path / "grey.safetensors", model, hint_channels=1).hint_channels == 1
    save_control(tmp_path / "four.safetensors", control(model.family.unet))
    refused("four.safetensors", "its hint is 4 times as large as the latents, 8 times")
    tensors, _ = load_safetensors(tmp_path / "four.safetensors")
    save_control(tmp_path / "good.safetensors", network_of(model))
    tensors, _ = load_safetensors(tmp_path / "good.safetensors")
    save_safetensors(tmp_path / "more.safetensors", tensors | {"control_model.task_embedding": torch.zeros(2)}, {})
    refused("more.safetensors", "the tensor task_embedding is in no network")
    del tensors["control_model.zero_convs.0.0.bias"]
    save_safetensors(tmp_path / "less.safetensors", tensors, {})
    refused("less.safetensors", "the tensor zero_convs.0.0.bias is missing")
    save_safetensors(tmp_path / "lora.safetensors", {"lora_controlnet": torch.zeros(1)}, {})
    refused("lora.safetensors", "it is a Control-LoRA, no ControlNet")
    (tmp_path / "empty").mkdir()
    refused("empty", "a folder without config.json")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Path}))
    refused("evil.pth", ".")
    with pytest.raises(ValueError, match="pickles are not written"):
        save_control(tmp_path / "out.pth", grey)
    with pytest.raises(ValueError, match="a new or empty folder is needed"):
        save_control(tmp_path, grey)


def test_full_size_of_another_family_is_named(tmp_path: Path) -> None:
    """By shapes alone: the message names the family that a file looks like."""
    model = model_of("sd1", tmp_path)
    stored = {
        "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
    }
    save_safetensors(tmp_path / "sd2.safetensors", stored, {})
    with pytest.raises(ValueError, match=r"width 320, context 1024 and vector None \(one of sd2\)"):
        load_control(tmp_path / "sd2.safetensors", model)


DAMAGE = {
    "a scalar": lambda tensor: torch.zeros(()),
    "flat": lambda tensor: tensor.flatten(),
    "nothing": lambda tensor: torch.zeros(0, *tensor.shape[1:]),
    "whole numbers": lambda tensor: tensor.long(),
    "more": lambda tensor: torch.cat([tensor, tensor]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named_in_a_line(damage: str, tmp_path: Path) -> None:
    """Of every kind of network: whichever tensor is of another shape or type, nothing but a ValueError comes."""
    model = model_of("sd1", tmp_path)
    unet = model.family.unet
    widths = tuple(unet.channels * mult for mult in unet.channel_mult)
    adapter = T2IAdapter(T2IAdapterConfig(channels=widths, unet_blocks=unet.num_res_blocks))
    dims = [attention.to_q.out_features for attention in cross_attentions(model.unet)]
    pictures = IPAdapter(IPAdapterConfig(20, unet.context_dim, 4, 1, 8, 64, 1), dims)
    network = network_of(model)
    for state, load in (
        (network.state_dict(), load_control),
        (to_diffusers(network.state_dict(), control_keys(network)), load_control),
        (adapter.state_dict(), load_t2i_adapter),
        (pictures.state_dict(), load_ip_adapter),
    ):
        names = list(state)
        marked = [name for name in names if name.split(".")[0] != "input_blocks"]
        for name in [*names[:3], *marked[:: max(1, len(marked) // 5)]]:
            broken = DAMAGE[damage](state[name])
            if broken.shape == state[name].shape and broken.is_floating_point():
                continue
            save_safetensors(tmp_path / "broken.safetensors", {**state, name: broken}, {})
            with pytest.raises(ValueError, match="broken.safetensors") as caught:
                load(tmp_path / "broken.safetensors", model)
            assert "\n" not in str(caught.value)
