"""The JSON configs of diffusers folders: every family there and back, published ones, and what is refused or logged."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sfumato.families import FAMILIES
from sfumato.weights.layouts.diffusers_configs import components, configs_of, family_of


@pytest.mark.parametrize("name", FAMILIES)
def test_full_size_configs_both_ways(name: str) -> None:
    configs = json.loads(json.dumps(configs_of(FAMILIES[name])))
    assert family_of(configs) == FAMILIES[name]
    assert configs["model_index.json"]["scheduler"][1] == configs["scheduler/scheduler_config.json"]["_class_name"]


def published(name: str) -> dict[str, Any]:
    """The configs as they were published, in short: SD 1.5, its inpainting, 2.1, the upscaler, XL base and refiner."""
    xl, two = name.startswith("xl"), name.startswith("sd2")
    wide, upscaler, refiner = [320, 640, 1280, 1280], name == "sd2-upscaler", name == "xl-refiner"
    unet: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": wide, "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 9 if "inpaint" in name else 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    if two or xl:
        unet |= {"dual_cross_attention": False, "use_linear_projection": True, "cross_attention_dim": 1024}
        unet |= {"attention_head_dim": [5, 10, 20, 20], "sample_size": 96, "num_class_embeds": None}
    if upscaler:
        unet |= {
            "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024], "in_channels": 7,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3, "num_class_embeds": 1000,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "sample_size": 128,
            "only_cross_attention": [True, True, True, False],
        }  # fmt: skip
    if xl:
        unet |= {
            "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20], "block_out_channels": wide[:3], "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, "sample_size": 128,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "upcast_attention": None,
            "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "time_embedding_dim": None,
            "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
            "class_embed_type": None, "num_attention_heads": None, "resnet_time_scale_shift": "default",
        }  # fmt: skip
    if refiner:
        unet |= {
            "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280, "transformer_layers_per_block": 4,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "projection_class_embeddings_input_dim": 2560,
        }  # fmt: skip
    levels = 3 if upscaler else 4
    vae: dict[str, Any] = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels, "in_channels": 3, "latent_channels": 4,
        "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * levels, **({"scaling_factor": 0.13025} if xl else {}),
    }  # fmt: skip

    def text(width: int, layers: int, heads: int, activation: str, kind: str = "CLIPTextModel") -> dict[str, Any]:
        return {
            "architectures": [kind], "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": activation,
            "hidden_size": width, "intermediate_size": 4 * width, "layer_norm_eps": 1e-05, "vocab_size": 49408,
            "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": heads,
            "num_hidden_layers": layers, "pad_token_id": 1, "projection_dim": 512 if width == 1024 else width,
        }  # fmt: skip

    scheduler = {
        "_class_name": "DDIMScheduler" if two else "EulerDiscreteScheduler" if xl else "PNDMScheduler",
        "beta_end": 0.02 if upscaler else 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
        "beta_start": 0.0001 if upscaler else 0.00085, "num_train_timesteps": 1000, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None, "clip_sample": False,
        **({"prediction_type": "v_prediction"} if two else {}),
    }  # fmt: skip
    configs = {"unet/config.json": unet, "vae/config.json": vae, "scheduler/scheduler_config.json": scheduler}
    pad: dict[str, Any] = {"pad_token": "!"}
    if xl:
        configs["text_encoder_2/config.json"] = text(1280, 32, 20, "gelu", "CLIPTextModelWithProjection")
        configs["tokenizer_2/special_tokens_map.json"] = configs["tokenizer_2/tokenizer_config.json"] = pad
    if not refiner:
        configs["text_encoder/config.json"] = text(1024, 23, 16, "gelu") if two else text(768, 12, 12, "quick_gelu")
        configs["tokenizer/special_tokens_map.json"] = pad if two else {"pad_token": "<|endoftext|>"}
        configs["tokenizer/tokenizer_config.json"] = {"pad_token": "<|endoftext|>"}  # wrong in 2.x
    pipelines = {
        "sd1": "StableDiffusionPipeline", "sd1-inpaint": "StableDiffusionInpaintPipeline",
        "sd2": "StableDiffusionPipeline", "sd2-upscaler": "StableDiffusionUpscalePipeline",
        "xl": "StableDiffusionXLPipeline", "xl-refiner": "StableDiffusionXLImg2ImgPipeline",
    }  # fmt: skip
    index: dict[str, Any] = {"_class_name": pipelines[name], "text_encoder": ["transformers", "CLIPTextModel"]}
    if xl:
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["force_zeros_for_empty_prompt"] = not refiner
    if refiner:
        index |= {"text_encoder": [None, None], "requires_aesthetics_score": True}
    return {"model_index.json": index} | configs


@pytest.mark.parametrize("name", ["sd1", "sd1-inpaint", "sd2", "sd2-upscaler", "xl", "xl-refiner"])
def test_published_configs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    configs = published(name)
    assert family_of(configs) == FAMILIES[name]
    assert not caplog.records, "all published fields are known"
    without_index = {path: config for path, config in configs.items() if path != "model_index.json"}
    family = replace(FAMILIES[name], zero_empty_negative=name.startswith("xl"))
    if name == "sd2-upscaler":
        family = replace(family, latent_scale=0.18215)  # only the pipeline knew better
    assert replace(family_of(without_index), name=name, defaults=family.defaults) == family
    bare = {path: config for path, config in configs.items() if not path.startswith("tokenizer")}
    assert family_of(bare) == FAMILIES[name]
    written = configs_of(FAMILIES[name])
    for path, config in configs.items():
        if path.startswith(("unet", "vae")):  # every published field that is written has the published value
            common = (set(config) & set(written[path])) - {"_diffusers_version", "sample_size"}
            assert {key: written[path][key] for key in common} == {key: config[key] for key in common}


def test_a_refiner_with_its_encoder_as_the_first() -> None:
    configs = published("xl-refiner")
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False}
    moved = {path.replace("_2/", "/"): config for path, config in configs.items()} | {"model_index.json": index}
    family = family_of(moved)
    assert family == FAMILIES["xl-refiner"]
    assert components(family)["text"] == "text_encoder_2"
    assert components(family, moved)["text"] == "text_encoder"


WRONG = [
    ("unet", "dual_cross_attention", True, "False is allowed"),
    ("unet", "resnet_time_scale_shift", "scale_shift", "'default' is allowed"),
    ("unet", "mid_block_type", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    ("unet", "mid_block_type", None, "UNetMidBlock2DCrossAttn"),
    ("unet", "act_fn", "gelu", "silu"),
    ("unet", "class_embed_type", "timestep", "None is allowed"),
    ("unet", "addition_embed_type", "text", "text_time"),
    ("unet", "time_cond_proj_dim", 256, "None is allowed"),
    ("unet", "time_embedding_type", "fourier", "positional"),
    ("unet", "encoder_hid_dim_type", "text_proj", "None is allowed"),
    ("unet", "only_cross_attention", [True, False], "true or false for all, or a list of 4"),
    ("unet", "only_cross_attention", "mid", "true or false"),
    ("unet", "in_channels", 6, "with 4 latent channels one of 4, 9, 5, 8, 7"),
    ("unet", "transformer_layers_per_block", [1, [1, 1], 1, 1], "whole number"),
    ("unet", "layers_per_block", [2, 2, 2, 3], "one number for all"),
    ("unet", "block_out_channels", [320, 600, 1280, 1280], "multiples of the first"),
    ("unet", "down_block_types", ["AttnDownBlock2D"] * 4, "CrossAttnDownBlock2D"),
    ("unet", "up_block_types", ["CrossAttnUpBlock2D"] * 4, "the mirror of down_block_types"),
    ("unet", "attention_head_dim", [8, 8, 5, 8], "heads of one number or of one width"),
    ("unet", "attention_head_dim", 7, "divide"),
    ("unet", "norm_eps", 1e-6, "1e-05 is allowed"),
    ("unet", "norm_num_groups", None, "a whole number above 0"),
    ("unet", "sample_size", [64, 96], "one number for all"),
    ("unet", "_class_name", "UNet2DModel", "UNet2DConditionModel is needed"),
    ("vae", "_class_name", "AutoencoderTiny", "AutoencoderKL is needed"),
    ("vae", "latents_mean", [0.1] * 4, "None is allowed"),
    ("vae", "shift_factor", 0.1, "None"),
    ("vae", "use_quant_conv", False, "True is allowed"),
    ("vae", "up_block_types", ["AttnUpDecoderBlock2D"] * 4, "UpDecoderBlock2D"),
    ("vae", "out_channels", 4, "3, as many as in_channels"),
    ("vae", "scaling_factor", "big", "a number is needed"),
    ("text_encoder", "hidden_act", "relu", "'quick_gelu' or 'gelu'"),
    ("text_encoder", "intermediate_size", 99, "4 times hidden_size"),
    ("text_encoder", "vocab_size", 49410, "514 to 49408"),
    ("text_encoder", "layer_norm_eps", 1e-6, "1e-05"),
    ("text_encoder", "model_type", "t5", "clip_text_model"),
    ("scheduler", "_class_name", "FlowMatchEulerDiscreteScheduler", "kin is needed"),
    ("scheduler", "_class_name", "EDMEulerScheduler", "kin is needed"),
    ("scheduler", "beta_schedule", "linear", "'scaled_linear' is needed"),
    ("scheduler", "trained_betas", [0.1, 0.2], "None is allowed"),
    ("scheduler", "prediction_type", "flow", "'epsilon' or 'v_prediction' or 'sample'"),
    ("scheduler", "num_train_timesteps", 0, "above 0"),
    ("model_index", "_class_name", "AltDiffusionPipeline", "kin is needed"),
    ("model_index", "_class_name", ["mine", "Mine"], "kin is needed"),
    ("tokenizer", "pad_token", "no such token", "CLIP's vocabulary"),
]  # fmt: skip
PATHS = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
PATHS["tokenizer"] = "tokenizer/special_tokens_map.json"


@pytest.mark.parametrize(("file", "field", "value", "allowed"), WRONG)
def test_what_our_networks_cannot_do(file: str, field: str, value: Any, allowed: str) -> None:
    configs = published("sd1")
    path = PATHS.get(file, f"{file}/config.json")
    configs[path] = configs[path] | {field: value}
    with pytest.raises(ValueError) as caught:
        family_of(configs)
    text = str(caught.value)
    assert path.rpartition("/")[2] in text
    assert field in text
    assert allowed in text
    assert "\n" not in text


def test_other_text_encoders_and_missing_files() -> None:
    configs = published("sd1")
    index = configs["model_index.json"] | {"text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]}
    with pytest.raises(ValueError, match=r"model_index.json: text_encoder is a Roberta.*CLIPTextModel"):
        family_of(configs | {"model_index.json": index})
    for path in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        with pytest.raises(ValueError, match=f"{path} is missing"):
            family_of({name: config for name, config in configs.items() if name != path})
    unfit = configs["unet/config.json"] | {"cross_attention_dim": 1024}
    with pytest.raises(ValueError, match="do not fit together: context_dim=1024"):
        family_of(configs | {"unet/config.json": unfit})
    upscaler = configs_of(FAMILIES["sd2-upscaler"])
    low = upscaler["low_res_scheduler/scheduler_config.json"] | {"beta_end": 0.03}
    with pytest.raises(ValueError, match="low_res_scheduler/"):
        family_of(upscaler | {"low_res_scheduler/scheduler_config.json": low})


def test_unknown_fields_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    configs = published("sd1")
    configs["unet/config.json"] |= {"brand_new": 3, "other_new": None, "upcast_attention": True, "decay": 0.99}
    assert family_of(configs) == FAMILIES["sd1"]
    assert [record.getMessage() for record in caplog.records] == [
        "unet/config.json: unknown fields are left aside: brand_new=3"
    ]


def test_a_family_that_is_nearly_known() -> None:
    configs = published("sd1")
    configs["vae/config.json"] |= {"scaling_factor": 0.2}
    family = family_of(configs)
    assert (family.name, family.latent_scale, family.defaults) == ("sd1-like", 0.2, FAMILIES["sd1"].defaults)
    shorter = published("xl")
    shorter["unet/config.json"] |= {"transformer_layers_per_block": [1, 2, 4]}
    assert family_of(shorter).name == "xl-like"
    assert family_of(shorter).unet.transformer_depth == (0, 2, 4)


def test_what_diffusers_cannot_do() -> None:
    sd1, xl = FAMILIES["sd1"], FAMILIES["xl"]
    for family, words in (
        (replace(sd1, unet=replace(sd1.unet, middle_depth=0)), "middle_depth=0"),
        (replace(sd1, unet=replace(sd1.unet, transformer_depth=(1, 1, 1, 2))), "middle_depth=1"),
        (replace(sd1, size=500), "size=500: a multiple of 8"),
        (replace(sd1, texts=(replace(sd1.texts[0], final_norm=False),)), "final_norm=False"),
        (replace(xl, texts=(replace(xl.texts[0], skip_last=0), xl.texts[1])), "skip_last=0"),
        (replace(sd1, texts=(replace(sd1.texts[0], pad_token=50000),)), "pad_token=50000"),
    ):
        with pytest.raises(ValueError, match=words):
            configs_of(family)
