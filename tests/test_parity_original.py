"""Our networks against the original code: the same tensors under the same names, loaded strictly, give equal outputs.

`ldm` is CompVis' and Stability AI's own (SD 1.x and 2.x); its norms have 32 groups, so tiny means 32 channels. The text
towers of SD 2.x and XL come from OpenCLIP, whose names differ from ours.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sfumato.families import TextTower
from sfumato.models.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.models.clip import (
    CLIP,
    CLIP_L_TEXT,
    CLIP_L_VISION,
    OPENCLIP_G_TEXT,
    OPENCLIP_H_TEXT,
    OPENCLIP_H_VISION,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from sfumato.models.unet import UNet, UNetConfig
from sfumato.weights.layouts.original_names import text_table
from sfumato.weights.layouts.tables import to_layout
from tests.ldm_peer import load_ldm, load_open_clip, open_clip_config, original_unet
from tests.test_parity_networks import agree, randn, randomise

# -- U-Net ------------------------------------------------------------------------------------------------------------

SD1 = UNetConfig(channels=32, channel_mult=(1, 2, 2), transformer_depth=(1, 1, 0), context_dim=12, num_heads=2)
SD2 = replace(SD1, head_channels=16, linear_projection=True)
UNETS = {
    "1.x": SD1,
    "1.x inpainting": replace(SD1, in_channels=9),
    "2.x": SD2,
    "2.x depth, one block": replace(SD2, in_channels=5, num_res_blocks=1),
    "2.0 upscaler": replace(
        SD1,
        in_channels=7,
        transformer_depth=(0, 1, 1),
        linear_projection=True,
        num_classes=10,
        cross_only=(True, True, False),
    ),
}


def ldm_unet(config: UNetConfig) -> nn.Module:
    return original_unet(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        model_channels=config.channels,
        channel_mult=config.channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=[2**index for index, depth in enumerate(config.transformer_depth) if depth],
        num_heads=-1 if config.head_channels else config.num_heads,
        num_head_channels=config.head_channels or -1,
        context_dim=config.context_dim,
        use_linear_in_transformer=config.linear_projection,
        num_classes=config.num_classes,
        disable_self_attentions=config.cross_only or None,
    ).eval()


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    config = UNETS[name]
    ours, theirs = UNet(config), ldm_unet(config)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, context, t = randn(2, config.in_channels, 8, 12), randn(2, 7, 12, seed=2), torch.tensor([999, 421])
    classes = torch.tensor([3, 9]) if config.num_classes else None
    with torch.inference_mode():
        agree(ours(x, t, context, classes), theirs(x, t, context, y=classes))


# -- autoencoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mult", [(1, 2, 2, 2), (1, 2, 2)], ids=["f8", "f4, the upscaler's"])
def test_autoencoder(mult: tuple[int, ...]) -> None:
    config = AutoencoderConfig(channels=32, channel_mult=mult)
    shape = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 32,
        "in_channels": config.image_channels,
        "out_ch": config.image_channels,
        "ch": config.channels,
        "ch_mult": mult,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    theirs = load_ldm("models.autoencoder").AutoencoderKL(shape, loss, embed_dim=config.latent_channels).eval()
    ours = Autoencoder(config)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images, noise = randn(2, 3, 32, 24).clamp(-1, 1), randn(2, 4, 32 // config.factor, 24 // config.factor)
    with torch.inference_mode():
        posterior, expected = ours.encode(images), theirs.encode(images)
        agree(posterior.sample(noise), expected.mean + expected.std * noise)
        torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-5, atol=1e-4)
        agree(ours.decode(noise), theirs.decode(noise))


# -- OpenCLIP ---------------------------------------------------------------------------------------------------------

OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn.q_proj.": "attn.in_proj_",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
TEXT = CLIPTextConfig(99, 32, 3, 4, 16, quick_gelu=False, projection=20)
VISION = CLIPVisionConfig(image_size=24, patch_size=8, width=48, num_layers=2, num_heads=4, quick_gelu=False)
IDS = torch.tensor([[97, 5, 17, 3, 98] + [0] * 11, [97, *range(40, 54), 98]])  # the text towers take full rows only


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> theirs: query, key and value are one tensor there, and the projections are transposed."""
    found = {}
    for name, tensor in state.items():
        theirs = name
        for part, replacement in OPEN_CLIP.items():
            theirs = theirs.replace(part, replacement)
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")])
        if "k_proj" not in name and "v_proj" not in name:
            found[theirs] = tensor.T if name in TRANSPOSED else tensor
    return found


def open_clip(text: CLIPTextConfig, vision: CLIPVisionConfig, embed_dim: int) -> nn.Module:
    module = load_open_clip()
    return module.CLIP(
        embed_dim,
        vision_cfg=module.CLIPVisionCfg(
            layers=vision.num_layers,
            width=vision.width,
            head_width=vision.width // vision.num_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        text_cfg=module.CLIPTextCfg(
            context_length=text.max_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.num_heads,
            layers=text.num_layers,
        ),
        quick_gelu=text.quick_gelu,
    ).eval()


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_both_towers(quick_gelu: bool) -> None:
    text, vision = replace(TEXT, quick_gelu=quick_gelu), replace(VISION, quick_gelu=quick_gelu)
    ours, theirs = CLIP(CLIPConfig(text, vision, embed_dim=20)), open_clip(text, vision, 20)
    randomise(ours)
    theirs.load_state_dict(to_open_clip(ours.state_dict()), strict=True)
    images = randn(3, 3, 24, 24)
    with torch.inference_mode():
        agree(ours.text_features(IDS), theirs.encode_text(IDS, normalize=True))
        agree(ours.image_features(images), theirs.encode_image(images, normalize=True))


@pytest.mark.parametrize("layer, skip_last", [("last", 0), ("penultimate", 1)])
def test_text_tower_of_the_original_embedder(layer: str, skip_last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FrozenOpenCLIPEmbedder, SD 2.x's, through the table that loads its checkpoints; pooled is OpenCLIP's own."""
    ours, theirs = CLIPText(TEXT), open_clip(TEXT, VISION, 20)
    randomise(ours)
    state = ours.state_dict()
    tower = TextTower(TEXT, prefix="", openclip=True)
    theirs.load_state_dict(theirs.state_dict() | to_layout(state, text_table(tower, state)), strict=True)
    with torch.inference_mode():
        pooled = theirs.encode_text(IDS)
    for block in theirs.transformer.resblocks:
        block.attn.batch_first = False  # as in the OpenCLIP that the embedder was written for: it turns x round itself
    encoders = load_ldm("modules.encoders.modules")
    monkeypatch.setattr(
        encoders.open_clip, "create_model_and_transforms", lambda *a, **k: (theirs, None, None), raising=False
    )
    embedder = encoders.FrozenOpenCLIPEmbedder(device="cpu", layer=layer)
    with torch.inference_mode():
        expected = embedder.encode_with_transformer(IDS)
        agree(ours(IDS, skip_last=skip_last), expected)
        states, found = ours.forward_pooled(IDS, skip_last=skip_last)
        agree(states, expected)
        agree(found, pooled)


@pytest.mark.parametrize(
    "name, text, vision",
    [
        ("ViT-L-14-quickgelu", CLIP_L_TEXT, CLIP_L_VISION),
        ("ViT-H-14", OPENCLIP_H_TEXT, OPENCLIP_H_VISION),
        ("ViT-bigG-14", OPENCLIP_G_TEXT, None),
    ],
)
def test_presets_are_the_published_shapes(name: str, text: CLIPTextConfig, vision: CLIPVisionConfig | None) -> None:
    published = open_clip_config(name)
    shape, quick_gelu = published["text_cfg"], published.get("quick_gelu", False)
    assert text == CLIPTextConfig(
        shape["vocab_size"],
        shape["width"],
        shape["layers"],
        shape["heads"],
        shape["context_length"],
        quick_gelu,
        text.projection and published["embed_dim"],
    )
    if vision is not None:
        shape = published["vision_cfg"]
        heads = shape["width"] // shape.get("head_width", 64)
        assert vision == CLIPVisionConfig(
            shape["image_size"], shape["patch_size"], shape["width"], shape["layers"], heads, quick_gelu
        )
        with torch.device("meta"):
            ours = CLIP(CLIPConfig(text, vision, published["embed_dim"]))
            theirs = open_clip(text, vision, published["embed_dim"])
        assert count(ours) == count(theirs)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
