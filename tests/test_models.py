"""The networks alone, without a peer: their size at full scale (meta device), what they refuse, what they promise."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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
from sfumato.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from sfumato.models.unet import UNet, UNetConfig

SD2 = UNetConfig(context_dim=1024, head_channels=64, linear_projection=True)
PUBLISHED_UNETS = {
    "sd1": (UNetConfig(), 859_520_964),
    "sd1 inpainting": (UNetConfig(in_channels=9), 859_535_364),
    "sd2": (SD2, 865_910_724),
    "sd2 depth": (replace(SD2, in_channels=5), 865_913_604),
    "sd2 upscaler": (
        UNetConfig(
            in_channels=7,
            channels=256,
            channel_mult=(1, 2, 2, 4),
            transformer_depth=(0, 1, 1, 1),
            context_dim=1024,
            linear_projection=True,
            num_classes=1000,
            cross_only=(True, True, True, False),
        ),
        473_398_020,
    ),
    "xl": (
        replace(
            SD2,
            channel_mult=(1, 2, 4),
            transformer_depth=(0, 2, 10),
            middle_depth=10,
            context_dim=2048,
            vector_dim=2816,
        ),
        2_567_463_684,
    ),
    "xl refiner": (
        replace(SD2, channels=384, transformer_depth=(0, 4, 4, 0), middle_depth=4, context_dim=1280, vector_dim=2560),
        2_259_526_660,
    ),
}
SMALL = UNetConfig(
    channels=8, channel_mult=(1, 2), transformer_depth=(1, 1), context_dim=12, num_heads=2, norm_groups=4
)
TEXT = CLIPTextConfig(vocab_size=99, width=16, num_layers=3, num_heads=2, max_length=8, projection=10)
IDS = torch.tensor([[97, 5, 98, 0, 0, 0], [97, 42, 8, 61, 7, 98]])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seeded(module: nn.Module) -> nn.Module:
    """Random weights everywhere, also where a network starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- full size, without memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED_UNETS)
def test_unets_have_the_published_size(name: str) -> None:
    config, expected = PUBLISHED_UNETS[name]
    with torch.device("meta"):
        assert count(UNet(config)) == expected


def test_other_networks_have_the_published_size() -> None:
    with torch.device("meta"):
        assert count(CLIPText(CLIP_L_TEXT)) == 123_060_480
        assert count(CLIPText(OPENCLIP_H_TEXT)) == 354_032_640
        assert count(CLIPText(OPENCLIP_G_TEXT)) == 694_659_840
        assert count(CLIP(CLIPConfig(CLIP_L_TEXT, CLIP_L_VISION))) == 427_616_513
        assert count(CLIP(CLIPConfig(OPENCLIP_H_TEXT, OPENCLIP_H_VISION, embed_dim=1024))) == 986_109_441
        assert count(Autoencoder(AutoencoderConfig())) == 83_653_863
        tiny = TinyAutoencoder(TinyAutoencoderConfig())
        assert (count(tiny.encoder), count(tiny.decoder)) == (1_222_532, 1_222_531)


# -- U-Net ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"transformer_depth": (1,)}, "transformer_depth"),
        ({"cross_only": (True,)}, "cross_only"),
        ({"vector_dim": 4, "num_classes": 3}, "vector_dim=4 and num_classes=3"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"norm_groups": 3}, "norm_groups=3"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_unet_refuses_what_does_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNet(replace(SMALL, **changes))


@pytest.mark.parametrize(
    "changes, vector, words",
    [
        ({"vector_dim": 6}, None, r"pooled vector \(B, 6\), got None"),
        ({"vector_dim": 6}, torch.zeros(2, dtype=torch.long), r"pooled vector \(B, 6\), got torch.int64"),
        ({"num_classes": 5}, None, r"classes \(B,\) from 0 to 4, got None"),
        ({"num_classes": 5}, torch.zeros(2, 6), r"classes \(B,\) from 0 to 4, got torch.float32 of shape \(2, 6\)"),
        ({"num_classes": 5}, torch.zeros(2), "got torch.float32"),
    ],
)
def test_unet_needs_its_vector(changes: dict[str, int], vector: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNet(replace(SMALL, **changes))(randn(2, 4, 8, 8), torch.zeros(2), randn(2, 7, 12), vector)


def test_classes_change_the_answer_row_by_row() -> None:
    unet = seeded(UNet(replace(SMALL, num_classes=5)))
    x, t, context = randn(1, 4, 8, 8).repeat(3, 1, 1, 1), torch.full((3,), 9.0), randn(1, 7, 12).repeat(3, 1, 1)
    out = unet(x, t, context, torch.tensor([0, 4, 0]))
    assert torch.equal(out[0], out[2])
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_cross_only_levels_take_keys_from_the_context() -> None:
    """The widths tell which attention reads what: the marked level's first one the context, the middle's never."""
    state = UNet(replace(SMALL, cross_only=(True, False))).state_dict()
    keys = {name.split(".transformer")[0]: tensor.shape[1] for name, tensor in state.items() if "attn1.to_k" in name}
    fine = ("input_blocks.1.1", "input_blocks.2.1", "output_blocks.3.1", "output_blocks.4.1", "output_blocks.5.1")
    assert {name for name, width in keys.items() if width == SMALL.context_dim} == set(fine)
    assert keys["middle_block.1"] == keys["input_blocks.4.1"] == 16
    assert len(keys) == 11


def test_cross_only_block_joins_no_two_cells() -> None:
    """Also where context and channels have one width, so that nothing but the flag tells what attention reads."""
    unet = seeded(UNet(replace(SMALL, context_dim=8, cross_only=(True, False))))
    block = unet.input_blocks[1][1].transformer_blocks[0]
    x, context = randn(1, 6, 8), randn(1, 7, 8, seed=2)
    moved = x.clone()
    moved[:, 5] += randn(8, seed=3)
    out, other = block(x, context), block(moved, context)
    assert torch.equal(out[:, :5], other[:, :5])
    assert (out[:, 5] - other[:, 5]).abs().max() > 1e-2
    assert (out - block(x, context + 1)).abs().amax(dim=-1).min() > 1e-3  # each cell reads the context


# -- CLIP -------------------------------------------------------------------------------------------------------------


def test_pooled_text_goes_through_each_layer_once() -> None:
    text = seeded(CLIPText(TEXT))
    calls: list[int] = []
    for index, layer in enumerate(text.text_model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    text.forward_pooled(IDS, skip_last=2)
    assert calls == [0, 1, 2]
    text(IDS, skip_last=2)
    assert calls == [0, 1, 2, 0]


@pytest.mark.parametrize("skip_last", [0, 1, 2])
@pytest.mark.parametrize("final_norm", [True, False])
def test_pooled_text_is_the_last_layers_whatever_is_skipped(skip_last: int, final_norm: bool) -> None:
    text = seeded(CLIPText(TEXT))
    states, pooled = text.forward_pooled(IDS, skip_last, final_norm)
    assert torch.equal(states, text(IDS, skip_last, final_norm))
    assert pooled.shape == (2, 10)
    last = text(IDS)
    expected = text.text_projection(torch.stack([last[0, 2], last[1, 5]]))  # where the end tokens are
    torch.testing.assert_close(pooled, expected)


def test_pooled_text_is_read_at_the_first_end_token() -> None:
    text = seeded(CLIPText(TEXT))
    more = torch.cat([IDS[:1], torch.tensor([[98, 98]])], dim=1)
    torch.testing.assert_close(text.forward_pooled(IDS[:1])[1], text.forward_pooled(more)[1])


def test_clip_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="projection=None"):
        CLIPText(replace(TEXT, projection=None)).forward_pooled(IDS)
    with pytest.raises(ValueError, match="skip_last=3.*0 to 2"):
        CLIPText(TEXT).forward_pooled(IDS, skip_last=3)
    with pytest.raises(ValueError, match="projection=10.*embed_dim=20"):
        CLIP(CLIPConfig(TEXT, CLIPVisionConfig(8, 4, 16, 1, 2), embed_dim=20))
    assert "text_projection.weight" in CLIPText(TEXT).state_dict()
    assert "text_projection.weight" not in CLIPText(replace(TEXT, projection=None)).state_dict()


# -- tiny autoencoder -------------------------------------------------------------------------------------------------


def test_tiny_autoencoder_has_the_original_names() -> None:
    state = TinyAutoencoder(TinyAutoencoderConfig()).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {
        "encoder.0.bias": (64,),
        "encoder.1.conv.0.weight": (64, 64, 3, 3),
        "encoder.2.weight": (64, 64, 3, 3),  # stride 2
        "encoder.14.weight": (4, 64, 3, 3),
        "decoder.1.weight": (64, 4, 3, 3),  # 0 is the limit, 2 a ReLU
        "decoder.3.conv.4.bias": (64,),
        "decoder.7.weight": (64, 64, 3, 3),  # after doubling
        "decoder.19.weight": (3, 64, 3, 3),
    }
    assert expected.items() <= shapes.items()
    assert not {"encoder.2.bias", "decoder.7.bias"} & set(shapes)
    assert {name.split(".")[1] for name in shapes if name.startswith("decoder")} == set(
        "1 3 4 5 7 8 9 10 12 13 14 15 17 18 19".split()
    )


def test_tiny_autoencoder_speaks_minus_one_to_one() -> None:
    """Its halves work in [0, 1]: black is 0 to the encoder, and a decoder that says 0 means black."""
    tiny = seeded(TinyAutoencoder(TinyAutoencoderConfig(width=8, blocks=(1, 1, 1))))
    assert tiny.config.factor == 4
    black = -torch.ones(1, 3, 8, 12)
    assert torch.equal(tiny.encode(black), tiny.encoder(torch.zeros(1, 3, 8, 12)))
    for parameter in tiny.decoder[-1].parameters():
        parameter.zero_()
    assert torch.equal(tiny.decode(randn(1, 4, 2, 3)), black)


def test_tiny_autoencoder_limits_latents_softly() -> None:
    tiny = seeded(TinyAutoencoder(TinyAutoencoderConfig(width=8, blocks=(1, 1))))
    z = randn(1, 4, 2, 3)
    assert torch.equal(tiny.decode(1e3 * z), tiny.decode(1e4 * z))
    torch.testing.assert_close(tiny.decoder[0](1e-2 * z), 1e-2 * z, rtol=1e-3, atol=0)  # a line about 0
