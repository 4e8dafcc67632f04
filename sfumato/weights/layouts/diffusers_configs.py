"""The JSON configs of a diffusers folder, written from a Family; `family_of`, which reads them, is here by name too.

Where a family computes something that no pipeline of diffusers does, that is an error. Knows no weights.
"""

from __future__ import annotations

import json
from typing import Any

from sfumato.families import Family, TextTower
from sfumato.weights.layouts.diffusers_family import family_of, is_xl, text_components
from sfumato.weights.layouts.diffusers_fields import (
    BASE,
    CROSS,
    INDEX,
    LOW_RES,
    PIPELINES,
    PLAIN,
    PLAIN_TEXT,
    PREDICTIONS,
    PROJECTED_TEXT,
    REFINER,
    REFINER_PIPELINE,
    SCHEDULER,
    UNET,
    VAE,
    Configs,
)
from sfumato.weights.layouts.diffusers_tokenizer import tokenizer_configs, vocabulary_files

__all__ = ["components", "configs_of", "family_of", "folder_files", "stored_layers"]

Json = dict[str, Any]
VERSION = "0.21.0"  # the diffusers in whose words this is written
SCHEDULER_OWN: dict[str, Json] = {
    "EulerDiscreteScheduler": {"interpolation_type": "linear", "use_karras_sigmas": False},
}


def components(family: Family, configs: Configs | None = None) -> dict[str, str]:
    """For each of `family.parts` the name of its folder; `configs` are those of a folder that was read.

    The refiner's one text encoder is the second of the pipeline, but some folders have it as the first.
    """
    texts = ["text_encoder_2"] if is_xl(family) and len(family.texts) == 1 else ["text_encoder", "text_encoder_2"]
    if configs is not None:
        texts = text_components(configs)
    return {"unet": "unet", "autoencoder": "vae", **dict(zip(family.text_parts, texts, strict=False))}


def stored_layers(family: Family, part: str) -> int | None:
    """How many layers of a text encoder a folder holds: all (None), or those that a pipeline without skipping reads."""
    tower = family.texts[family.text_parts.index(part)]
    return tower.config.num_layers - tower.skip_last if tower.skip_last and not is_xl(family) else None


# -- writing ----------------------------------------------------------------------------------------------------------


def folder_files(family: Family) -> dict[str, str]:
    """Path -> text of every file of a folder but the weights: all configs, and the tokenizers' vocabularies."""
    files = {path: json.dumps(config, indent=2, sort_keys=True) + "\n" for path, config in configs_of(family).items()}
    for part, component in components(family).items():
        if part in family.text_parts:
            tower = family.texts[family.text_parts.index(part)]
            folder = component.replace("text_encoder", "tokenizer")
            vocabulary = vocabulary_files(tower.config.vocab_size)
            files |= {f"{folder}/{name}": text for name, text in vocabulary.items()}
    return files


def configs_of(family: Family) -> dict[str, Json]:
    """Path -> JSON for all configs of a family's folder; ValueError where no pipeline of diffusers computes the same.

    Where a single text encoder skips layers (not XL's), fewer layers are stored: `stored_layers`.
    """
    configs = {INDEX: _index(family), UNET: _unet_config(family), VAE: _vae_config(family)}
    configs[SCHEDULER] = _scheduler_config(family)
    if family.concat == "lowres":
        betas = {name: configs[SCHEDULER][name] for name in ("beta_start", "beta_end", "num_train_timesteps")}
        configs[LOW_RES] = _headed("DDPMScheduler") | betas | {"beta_schedule": "scaled_linear", "clip_sample": True}
    for part, component in components(family).items():
        if part in family.text_parts:
            tower = family.texts[family.text_parts.index(part)]
            configs[f"{component}/config.json"] = _text_config(family, part)
            tokenizer = component.replace("text_encoder", "tokenizer")
            files = tokenizer_configs(tower.config.vocab_size, tower.config.max_length, tower.pad_token)
            configs |= {f"{tokenizer}/{name}": config for name, config in files.items()}
    return configs


def _headed(name: str) -> Json:
    return {"_class_name": name, "_diffusers_version": VERSION}


def _index(family: Family) -> Json:
    xl = is_xl(family)
    if len(family.texts) > (2 if xl else 1) or (xl, family.concat) not in PIPELINES:
        raise ValueError(
            f"texts, concat={family.concat!r}: diffusers has no pipeline with {len(family.texts)} text encoders "
            f"and this beside x"
        )
    refiner = family.size_cond == REFINER
    if refiner and family.concat == "picture":
        raise ValueError(f"size_cond={REFINER}: diffusers has no pipeline with this and concat='picture'")
    pipeline = REFINER_PIPELINE if refiner and not family.concat else PIPELINES[xl, family.concat]
    texts = [name for part, name in components(family).items() if part in family.text_parts]
    index = _headed(pipeline) | {
        "scheduler": ["diffusers", _scheduler_config(family)["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name in ("text_encoder", "text_encoder_2") if xl else ("text_encoder",):
        there = name in texts
        class_name = _text_class(family.texts[texts.index(name)]) if there else None
        index[name] = ["transformers", class_name] if there else [None, None]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"] if there else [None, None]
    if xl:
        index["force_zeros_for_empty_prompt"] = family.zero_empty_negative
        return index | ({"requires_aesthetics_score": True} if refiner else {})
    if family.concat == "lowres":
        return index | {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    index["feature_extractor"] = [None, None]
    if family.concat == "depth":
        return index | {"depth_estimator": [None, None]}  # whoever loads it passes one
    return index | {"safety_checker": [None, None], "requires_safety_checker": False}


def _depths(family: Family) -> int | list[int]:
    """Transformer blocks at each resolution as diffusers says it: 1 where there are none, the middle's the last."""
    unet = family.unet
    depths, middle = unet.transformer_depth, unet.middle_depth
    if not middle or depths[-1] not in (0, middle):
        raise ValueError(
            f"middle_depth={middle}: diffusers allows a number above 0 that is also the last resolution's depth, if it "
            f"has one ({depths[-1]})"
        )
    used = {depth for depth in depths if depth} | {middle}
    return middle if len(used) == 1 else [depth or 1 for depth in depths[:-1]] + [middle]


def _unet_config(family: Family) -> Json:
    unet, factor = family.unet, family.autoencoder.factor
    if family.size % factor:
        raise ValueError(f"size={family.size}: a multiple of {factor} is needed")
    widths = [unet.channels * mult for mult in unet.channel_mult]
    attended = [bool(depth) for depth in unet.transformer_depth]
    config = _headed("UNet2DConditionModel") | {
        "act_fn": "silu",
        "attention_head_dim": [unet.heads(width) for width in widths] if unet.head_channels else unet.num_heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [CROSS[0] if one else PLAIN[0] for one in attended],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": unet.norm_groups,
        "num_class_embeds": unet.num_classes,
        "only_cross_attention": list(unet.cross_only) or False,
        "out_channels": unet.out_channels,
        "sample_size": family.size // factor,
        "transformer_layers_per_block": _depths(family),
        "up_block_types": [CROSS[1] if one else PLAIN[1] for one in reversed(attended)],
        "use_linear_projection": unet.linear_projection,
    }
    if is_xl(family):
        if family.size_cond not in (BASE, REFINER):
            raise ValueError(f"size_cond={family.size_cond}: diffusers allows {BASE} or {REFINER}")
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": family.size_dim,
            "projection_class_embeddings_input_dim": unet.vector_dim,
        }
    return config


def _vae_config(family: Family) -> Json:
    config = family.autoencoder
    levels = len(config.channel_mult)
    return _headed("AutoencoderKL") | {
        "act_fn": "silu",
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.image_channels,
        "sample_size": family.size,
        "scaling_factor": family.latent_scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_class(tower: TextTower) -> str:
    return PLAIN_TEXT if tower.config.projection is None else PROJECTED_TEXT


def _text_config(family: Family, part: str) -> Json:
    tower = family.texts[family.text_parts.index(part)]
    config, xl = tower.config, is_xl(family)
    if tower.final_norm == xl or (xl and tower.skip_last != 1):
        raise ValueError(
            f"skip_last={tower.skip_last}, final_norm={tower.final_norm}: diffusers reads "
            f"{'the penultimate layer without' if xl else 'the last layer with'} the final norm"
        )
    return {
        "architectures": [_text_class(tower)],
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": stored_layers(family, part) or config.num_layers,
        "pad_token_id": config.vocab_size - 1 if tower.pad_token is None else tower.pad_token,
        "projection_dim": config.projection or config.width,
        "vocab_size": config.vocab_size,
    }


def _scheduler_config(family: Family) -> Json:
    """The scheduler of the published folder of this kind; PNDM's knows no zero terminal SNR, so then DDIM's."""
    schedule, concat = family.schedule, family.concat
    inpaint1 = concat == "inpaint" and family.texts[0].config.quick_gelu  # SD 1.5's is DDIM, SD 2's PNDM
    if is_xl(family):
        name = "EulerDiscreteScheduler"
    elif concat == "picture":
        name = "EulerAncestralDiscreteScheduler"
    elif family.prediction == "v" or schedule.zero_terminal_snr or inpaint1:
        name = "DDIMScheduler"
    else:
        name = "PNDMScheduler"
    config = _headed(name) | {
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": PREDICTIONS[family.prediction],
        # As in the published folders, also where this scheduler knows none of them: a user may change to one that does.
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        **SCHEDULER_OWN.get(name, {}),
    }
    if schedule.zero_terminal_snr:  # Lin et al. 2023, section 3.3
        return config | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config | ({"timestep_spacing": "leading"} if is_xl(family) else {})  # the folders of 1.x and 2.x say nothing
