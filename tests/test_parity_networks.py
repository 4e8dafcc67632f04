"""Our networks against diffusers' and transformers', random weights carried through the key tables both ways.

Every weight is random first (norms too, and what starts at zero), so that no branch is silent and no two tensors of
one shape can be exchanged unseen.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families import Family, TextTower
from sfumato.models.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.models.clip import (
    CLIP,
    CLIP_L_TEXT,
    OPENCLIP_G_TEXT,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from sfumato.models.layers import timestep_embedding
from sfumato.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from sfumato.models.unet import UNet, UNetConfig
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.diffusers_names import autoencoder_keys, from_diffusers, text_keys, to_diffusers, unet_keys
from sfumato.weights.layouts.tables import Place, Table
from sfumato.weights.parts import build
from tests.test_models import PUBLISHED_UNETS


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for all parameters: matrices of deviation fan_in^-0.5, vectors 0.2 about what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * noise)
    return module.eval().requires_grad_(False)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05, "the outputs must say something"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def carry(ours: nn.Module, theirs: nn.Module, keys: Table, compare: Callable[[], None]) -> None:
    """Their weights into ours, then other weights from ours into theirs; `compare` each time; then there and back."""
    randomise(theirs, 1)
    ours.eval().load_state_dict(from_diffusers(theirs.state_dict(), keys), strict=True)
    compare()
    randomise(ours, 2)
    state = ours.state_dict()
    theirs.load_state_dict(to_diffusers(state, keys), strict=True)
    compare()
    back = from_diffusers(to_diffusers(state, keys), keys)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


# -- U-Net ------------------------------------------------------------------------------------------------------------

SMALL = UNetConfig(
    channels=8, channel_mult=(1, 2, 4), transformer_depth=(1, 1, 0), context_dim=12, num_heads=2, norm_groups=4
)
SD2 = replace(SMALL, head_channels=4, linear_projection=True)
UNETS = {
    "sd1": SMALL,
    "four levels, one block each": replace(
        SMALL, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), num_res_blocks=1
    ),
    "inpainting, three blocks": replace(
        SMALL, in_channels=9, channel_mult=(1, 2), transformer_depth=(1, 1), num_res_blocks=3
    ),
    "sd2": SD2,
    "sd2 depth": replace(SD2, in_channels=5),
    "sd2 upscaler": replace(
        SMALL,
        in_channels=7,
        channel_mult=(1, 2, 2),
        transformer_depth=(0, 1, 1),
        linear_projection=True,
        num_classes=20,
        cross_only=(True, True, False),
    ),
    "xl": replace(SD2, transformer_depth=(0, 1, 2), middle_depth=2, vector_dim=10 + 6 * 8),  # pooled, six numbers
    "xl refiner": replace(
        SD2,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 2, 2, 0),
        middle_depth=2,
        vector_dim=10 + 5 * 8,  # pooled, five numbers
    ),
}


def diffusers_unet(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' module of our config; its `attention_head_dim` counts heads, not their channels."""
    widths = tuple(config.channels * mult for mult in config.channel_mult)
    depths, middle = config.transformer_depth, config.middle_depth
    added = {}
    if config.vector_dim is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        transformer_layers_per_block=[depth or 1 for depth in depths[:-1]] + [depths[-1] or middle],
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in widths),
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        num_class_embeds=config.num_classes,
        only_cross_attention=config.cross_only or False,
        **added,
    )


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    config = UNETS[name]
    ours, theirs = UNet(config), diffusers_unet(config)
    x, context = randn(3, config.in_channels, 8, 16), randn(3, 7, 12, seed=2)  # not square
    t = torch.tensor([0.0, 999.0, 421.37])  # fractional too
    vector, added, classes = None, None, None
    if config.vector_dim is not None:
        pooled, times = randn(3, 10, seed=3), torch.tensor([[64.0, 128, 0, 0, 64, 128]] * 3)
        times = times[:, : (config.vector_dim - 10) // 8]
        added = {"text_embeds": pooled, "time_ids": times}
        vector = torch.cat([pooled, timestep_embedding(times.flatten(), 8).reshape(3, -1)], dim=1)
    elif config.num_classes is not None:
        vector = classes = torch.tensor([0, 19, 7])

    def compare() -> None:
        with torch.inference_mode():
            out = theirs(x, t, context, class_labels=classes, added_cond_kwargs=added).sample
            agree(ours(x, t, context, vector), out)

    carry(ours, theirs, unet_keys(config), compare)


def test_middle_without_a_transformer_has_two_blocks() -> None:
    keys = unet_keys(UNetConfig(channels=8, norm_groups=4, middle_depth=0))
    assert keys["middle_block.1.in_layers.0.weight"].name == "mid_block.resnets.1.norm1.weight"
    assert len(set(keys.values())) == len(keys)


# -- autoencoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(channels=8, norm_groups=4),
        AutoencoderConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, latent_channels=3, norm_groups=2),
    ],
    ids=["f8", "f4"],
)
def test_autoencoder(config: AutoencoderConfig) -> None:
    ours, theirs = Autoencoder(config), diffusers_autoencoder(config)
    images = randn(2, 3, 32, 48).clamp(-1, 1)
    z = randn(2, config.latent_channels, 4, 6)

    def compare() -> None:
        with torch.inference_mode():
            posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
            assert posterior.mean.shape[-2:] == (32 // config.factor, 48 // config.factor)
            agree(posterior.mean, expected.mean)
            agree(posterior.logvar, expected.logvar)
            agree(posterior.std, expected.std)
            torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-5, atol=1e-4)
            agree(ours.decode(z), theirs.decode(z).sample)

    carry(ours, theirs, autoencoder_keys(config), compare)


def diffusers_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    levels = len(config.channel_mult)
    return AutoencoderKL(
        block_out_channels=tuple(config.channels * mult for mult in config.channel_mult),
        layers_per_block=config.num_res_blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
    )


# -- tiny autoencoder -------------------------------------------------------------------------------------------------


def tiny_keys(state: Mapping[str, Tensor]) -> Table:
    """Ours -> diffusers': its decoder's layers leave the limit of the latents out of the count."""
    keys = {}
    for name in state:
        half, number, rest = name.split(".", 2)
        keys[name] = Place(f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}")
    return keys


@pytest.mark.parametrize(
    "config",
    [
        TinyAutoencoderConfig(),
        TinyAutoencoderConfig(width=8, blocks=(1, 2)),
        TinyAutoencoderConfig(latent_channels=16, width=8, blocks=(2, 1, 3)),
    ],
    ids=["published", "f2", "f4, 16 channels"],
)
def test_tiny_autoencoder(config: TinyAutoencoderConfig) -> None:
    ours = TinyAutoencoder(config)
    theirs = AutoencoderTiny(
        encoder_block_out_channels=(config.width,) * len(config.blocks),
        decoder_block_out_channels=(config.width,) * len(config.blocks),
        latent_channels=config.latent_channels,
        num_encoder_blocks=config.blocks,
        num_decoder_blocks=config.blocks[::-1],
    )
    images = randn(2, 3, 32, 48).clamp(-1, 1)
    z = 3 * randn(2, config.latent_channels, 4, 6)  # beyond the limit too

    def compare() -> None:
        with torch.inference_mode():
            latents = ours.encode(images)
            assert latents.shape[-2:] == (32 // config.factor, 48 // config.factor)
            agree(latents, theirs.encode(images).latents)
            agree(ours.decode(z), theirs.decode(z).sample)

    carry(ours, theirs, tiny_keys(ours.state_dict()), compare)


# -- CLIP -------------------------------------------------------------------------------------------------------------

TEXT = CLIPTextConfig(vocab_size=99, width=32, num_layers=3, num_heads=4, max_length=16)
IDS = torch.tensor([[97, 5, 17, 3, 98, 98, 98, 98], [97, 42, 8, 61, 7, 23, 96, 98], [97, 98, 0, 0, 0, 0, 0, 0]])


def transformers_text(config: CLIPTextConfig, eos: int | None = None) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        hidden_act="quick_gelu" if config.quick_gelu else "gelu",
        projection_dim=config.projection or 512,
        bos_token_id=config.vocab_size - 2,
        eos_token_id=config.vocab_size - 1 if eos is None else eos,
    )


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_text(quick_gelu: bool) -> None:
    config = CLIPTextConfig(99, 32, 3, 4, 16, quick_gelu)
    ours, theirs = CLIPText(config), CLIPTextModel(transformers_text(config)).eval()

    def compare() -> None:
        with torch.inference_mode():
            for ids in (IDS, IDS[:, :4], IDS.repeat(1, 2)):  # padded, without padding, the full length
                out = theirs(ids, output_hidden_states=True)
                agree(ours(ids), out.last_hidden_state)
                agree(ours(ids, skip_last=1), theirs.final_layer_norm(out.hidden_states[-2]))
                agree(ours(ids, skip_last=2, final_norm=False), out.hidden_states[-3])

    carry(ours, theirs, text_keys(config, prefix=""), compare)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_text_with_projection(quick_gelu: bool) -> None:
    config = replace(TEXT, quick_gelu=quick_gelu, projection=20)
    ours, theirs = CLIPText(config), CLIPTextModelWithProjection(transformers_text(config)).eval()

    def compare() -> None:
        with torch.inference_mode():
            for ids in (IDS, IDS.repeat(1, 2)):  # two end tokens: the first counts
                out = theirs(ids, output_hidden_states=True)
                states, pooled = ours.forward_pooled(ids, skip_last=1, final_norm=False)  # as XL reads it
                agree(states, out.hidden_states[-2])
                agree(pooled, out.text_embeds)
                states, pooled = ours.forward_pooled(ids)
                agree(states, out.last_hidden_state)
                agree(pooled, out.text_embeds)

    carry(ours, theirs, text_keys(config), compare)


@pytest.mark.parametrize(
    "eos, quick_gelu",
    [(98, True), (2, True), (98, False)],
    ids=["end token of the configuration", "2 as in the published one", "gelu"],
)
def test_clip_both_towers(eos: int, quick_gelu: bool) -> None:
    text = replace(TEXT, quick_gelu=quick_gelu)
    vision = CLIPVisionConfig(24, 8, width=48, num_layers=2, num_heads=4, quick_gelu=quick_gelu)
    ours = CLIP(CLIPConfig(text, vision, embed_dim=20))
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    theirs = CLIPModel(
        transformers.CLIPConfig(
            text_config=transformers_text(text, eos).to_dict(),
            vision_config={"image_size": 24, "patch_size": 8, "hidden_size": 48, "intermediate_size": 192, **depth},
            projection_dim=20,
        )
    )
    images = randn(3, 3, 24, 24)

    def compare() -> None:
        with torch.inference_mode():
            out = theirs(input_ids=IDS, pixel_values=images)
            agree(ours.text_features(IDS), out.text_embeds)
            agree(ours.image_features(images), out.image_embeds)
            similarity = ours.logit_scale.exp() * ours.text_features(IDS) @ ours.image_features(images).T
            torch.testing.assert_close(similarity, out.logits_per_text, rtol=1e-5, atol=1e-4)

    carry(ours, theirs, {name: Place(name) for name in ours.state_dict()}, compare)  # the published names are ours


# -- full size, without memory ----------------------------------------------------------------------------------------


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sd2 upscaler", "xl", "xl refiner"])
def test_full_size_unet(name: str) -> None:
    config, _ = PUBLISHED_UNETS[name]
    with torch.device("meta"):
        compare_shapes(UNet(config), diffusers_unet(config), unet_keys(config))


def test_full_size_autoencoder() -> None:
    config = AutoencoderConfig()
    with torch.device("meta"):
        compare_shapes(Autoencoder(config), diffusers_autoencoder(config), autoencoder_keys(config))


def test_full_size_text() -> None:
    with torch.device("meta"):
        theirs = CLIPTextModel(transformers_text(CLIP_L_TEXT))
        compare_shapes(CLIPText(CLIP_L_TEXT), theirs, text_keys(CLIP_L_TEXT, prefix=""))
        theirs = CLIPTextModelWithProjection(transformers_text(OPENCLIP_G_TEXT))
        compare_shapes(CLIPText(OPENCLIP_G_TEXT), theirs, text_keys(OPENCLIP_G_TEXT))
    assert all(ours_name == place.name for ours_name, place in text_keys(CLIP_L_TEXT).items())


def compare_shapes(ours: nn.Module, theirs: nn.Module, keys: Table) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert shapes(to_diffusers(state, keys)) == shapes(expected)
    assert shapes(from_diffusers(expected, keys)) == shapes(state)


def test_layout_is_strict() -> None:
    keys = text_keys(TEXT)
    state = CLIPText(TEXT).state_dict()
    first = "text_model.embeddings.position_embedding.weight"
    for rename in (to_diffusers, from_diffusers):
        with pytest.raises(ValueError, match=f"{first} is missing"):
            rename({name: tensor for name, tensor in state.items() if name != first}, keys)
        with pytest.raises(ValueError, match=r"1 tensors.*first text_model\.more"):
            rename(state | {"text_model.more": torch.zeros(1)}, keys)


# -- single files -----------------------------------------------------------------------------------------------------

TINY = Family(
    name="tiny",
    texts=(TextTower(CLIPTextConfig(vocab_size=600, width=12, num_layers=2, num_heads=2), skip_last=1, pad_token=0),),
    unet=SMALL,
    autoencoder=AutoencoderConfig(channels=4, norm_groups=2),
    schedule=ScheduleConfig(beta_end=0.02),
    prediction="v",
    size=64,
    latent_scale=0.7,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A file of the tiny family, and the weights that went into it."""
    parts = {name: randomise(module, seed).state_dict() for seed, (name, module) in enumerate(build(TINY).items())}
    save_checkpoint(tmp_path / "tiny.safetensors", TINY, parts)
    return tmp_path / "tiny.safetensors", parts


def test_checkpoint_round_trip(checkpoint: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    path, parts = checkpoint
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing half written is left
    with safe_open(str(path), framework="pt") as file:
        assert Family.from_json(file.metadata()["sfumato.family"]) == TINY
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    model = load_model(path)
    assert (model.family, model.name, model.precision, len(model.hash)) == (TINY, "tiny", "float32", 10)
    assert model.tokenizers[0].vocab_size == 600
    for name, state in parts.items():
        module = model.networks[name]
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        loaded = module.state_dict()
        assert set(loaded) == set(state)
        for key, tensor in state.items():
            assert loaded[key].dtype == torch.float32
            assert torch.equal(loaded[key], tensor.half().float())
    assert load_model(path, dtype=torch.bfloat16).precision == "bfloat16"


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors, header = load_safetensors(path)
    change(tensors)
    other = path.with_name("changed.safetensors")
    save_safetensors(other, tensors, header)
    return other


def test_checkpoint_is_strict(checkpoint: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    path, _ = checkpoint
    name = "model.diffusion_model.out.2.bias"

    def refused(change: Callable[[dict[str, Tensor]], object], words: str) -> None:
        with pytest.raises(ValueError, match=f"changed.safetensors.*{words}"):
            load_model(rewritten(path, change))

    refused(lambda tensors: tensors.pop(name), f"{name} is missing")
    refused(lambda tensors: tensors.update({name: torch.zeros(5)}), rf"{name} has shape \(5,\), expected \(4,\)")
    refused(lambda tensors: tensors.update({"model.diffusion_model.zzz": torch.zeros(1)}), "zzz is in no network")
    old = {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(1), "first_stage_model.loss.logvar": torch.zeros(1)}
    load_model(rewritten(path, lambda tensors: tensors.update(old)))  # known and rightly unused


def test_saving_is_strict(checkpoint: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    path, parts = checkpoint
    with pytest.raises(ValueError, match=r"unet: 1 tensors are unknown.*more"):
        save_checkpoint(path, TINY, {**parts, "unet": {**parts["unet"], "more": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"autoencoder: the tensor .* is missing"):
        save_checkpoint(path, TINY, {name: parts[name] for name in ("unet", "text")})


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, words in (
        ("none.safetensors", "no such file"),
        ("old.ckpt", "not a readable"),
        ("bad.safetensors", ""),
    ):
        if not name.startswith("none"):
            (tmp_path / name).write_bytes(b"not tensors at all")
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            load_model(tmp_path / name)
    save_safetensors(tmp_path / "lora.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"lora.safetensors.*no Stable Diffusion checkpoint"):
        load_model(tmp_path / "lora.safetensors")
    save_safetensors(tmp_path / "odd.safetensors", {"a": torch.zeros(1)}, {"sfumato.family": '{"name": "odd"}'})
    with pytest.raises(ValueError, match=r"odd.safetensors.*not a family"):
        load_model(tmp_path / "odd.safetensors")
