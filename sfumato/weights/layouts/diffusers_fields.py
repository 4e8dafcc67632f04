"""The words of diffusers' and transformers' JSON configs: files, classes, fields, and reading fields one by one.

Data: for each kind of file the fields that may have one meaning only, and those that say nothing to our networks, so
that none is silently ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

log = logging.getLogger(__name__)

Configs = Mapping[str, Mapping[str, Any]]  # path in the folder -> its JSON

INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"
SCHEDULER, LOW_RES = "scheduler/scheduler_config.json", "low_res_scheduler/scheduler_config.json"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "sample": "sample"}
BASE, REFINER = ("original", "crop", "target"), ("original", "crop", "aesthetic")  # XL's size conditions
PLAIN_TEXT, PROJECTED_TEXT = "CLIPTextModel", "CLIPTextModelWithProjection"
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")  # with attention, without

# A family's pipeline, by whether it is of XL's kind and its `concat`.
PIPELINES = {
    (False, None): "StableDiffusionPipeline",
    (False, "inpaint"): "StableDiffusionInpaintPipeline",
    (False, "depth"): "StableDiffusionDepth2ImgPipeline",
    (False, "picture"): "StableDiffusionInstructPix2PixPipeline",
    (False, "lowres"): "StableDiffusionUpscalePipeline",
    (True, None): "StableDiffusionXLPipeline",
    (True, "inpaint"): "StableDiffusionXLInpaintPipeline",
    (True, "picture"): "StableDiffusionXLInstructPix2PixPipeline",
}
REFINER_PIPELINE = "StableDiffusionXLImg2ImgPipeline"
# Others that people save from, around the same networks.
ALSO = {"StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipelineLegacy", "LatentConsistencyModelPipeline"} | {
    f"StableDiffusion{xl}{kind}{task}Pipeline"
    for xl in ("", "XL")
    for kind in ("ControlNet", "PAG", "ControlNetPAG", "Adapter")
    for task in ("", "Img2Img", "Inpaint")
}
# Schedulers over the betas that a network was trained with; those of flow matching and EDM are not.
SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
        "UniPCMultistep",
    )
}  # fmt: skip

# Allowed values of a field; the first is what a missing one means.
Allowed = Mapping[str, tuple[Any, ...]]
UNET_ONLY: Allowed = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
VAE_ONLY: Allowed = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
TEXT_ONLY: Allowed = {"layer_norm_eps": (1e-5,), "model_type": ("clip_text_model",)}
SCHEDULER_ONLY: Allowed = {"timestep_type": ("discrete",), "trained_betas": (None,), "use_flow_sigmas": (False,)}

# What says nothing to a network that computes: precision, regularisation in training, where a file came from.
ANYWHERE = {"_class_name", "_commit_hash", "_diffusers_version", "_name_or_path", "_use_default_values"}
UNET_HARMLESS = {"addition_embed_type_num_heads", "dropout", "mid_block_only_cross_attention", "upcast_attention"}
EMA = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
VAE_HARMLESS = {"force_upcast", "sample_size"}
TEXT_HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "dropout", "dtype", "initializer_factor",
    "initializer_range", "pad_token_id", "torch_dtype", "transformers_version",
}  # fmt: skip
# How a sampler of diffusers steps; a family has none of its own, a job says which.
SCHEDULER_HARMLESS = {
    "algorithm_type", "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "original_inference_steps", "predict_x0", "sample_max_value", "set_alpha_to_one", "skip_prk_steps",
    "solver_order", "solver_p", "solver_type", "steps_offset", "thresholding", "timestep_scaling",
    "timestep_spacing", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas",
    "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip
# The components that have configs of their own, and what stands around the networks.
INDEX_HARMLESS = {
    "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "low_res_scheduler",
    "add_watermarker", "depth_estimator", "feature_extractor", "image_encoder", "max_noise_level",
    "requires_aesthetics_score", "requires_safety_checker", "safety_checker", "watermarker",
}  # fmt: skip


class Fields:
    """One JSON file's fields; every reading notes the field, so that at last `unread` tells what nobody asked for."""

    def __init__(self, configs: Configs, path: str) -> None:
        if path not in configs:
            raise ValueError(f"{path} is missing")
        self.path = path
        self.values = configs[path]
        self.read: set[str] = set(ANYWHERE)

    def wrong(self, name: str, allowed: str) -> ValueError:
        return ValueError(f"{self.path}: {name}={self.values.get(name)!r}: {allowed}")

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it stands, or the default where it is missing."""
        self.read.add(name)
        return self.values.get(name, default)

    def only(self, name: str, allowed: tuple[Any, ...]) -> Any:
        """A field of one of few values; null is as good as a missing one where that means false."""
        value = self.get(name, allowed[0])
        if value is None and allowed[0] is False:
            return False
        if value not in allowed:
            raise self.wrong(name, f"{' or '.join(repr(one) for one in allowed)} is allowed")
        return value

    def all_only(self, table: Allowed) -> None:
        for name, allowed in table.items():
            self.only(name, allowed)

    def whole(self, name: str, default: int | None) -> int:
        """A whole number above 0; without a default it must be there."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, "a whole number above 0 is needed")
        return value

    def optional(self, name: str) -> int | None:
        """A whole number above 0, or None."""
        return None if self.get(name) is None else self.whole(name, None)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float):
            raise self.wrong(name, "a number is needed")
        return float(value)

    def names(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.get(name, default)
        if not isinstance(value, (list, tuple)) or any(type(item) is not str for item in value):
            raise self.wrong(name, "a list of names is needed")
        return tuple(value)

    def numbers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Whole numbers above 0, one or more."""
        value = self.get(name, default)
        if (
            not isinstance(value, (list, tuple))
            or not value
            or any(type(item) is not int or item < 1 for item in value)
        ):
            raise self.wrong(name, "a list of whole numbers above 0 is needed")
        return tuple(value)

    def each(self, name: str, default: Any, levels: int, kind: type[Any] = int) -> tuple[Any, ...]:
        """A value for each level, written as a list or as one for all."""
        value = self.get(name, default)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
        whole = kind is int
        if len(values) != levels or any(type(item) is not kind or (whole and item < 1) for item in values):
            what = "whole number above 0" if whole else "true or false"
            raise self.wrong(name, f"a {what} for all, or a list of {levels}, is needed")
        return values

    def same(self, name: str, default: int, levels: int) -> int:
        """A whole number that must be the same for all."""
        values = self.each(name, default, levels)
        if len(set(values)) != 1:
            raise self.wrong(name, "one number for all is allowed")
        return values[0]

    def finish(self, harmless: Collection[str]) -> None:
        """Log the fields that nobody asked for and that are not known as harmless, unless they are null."""
        known = self.read | set(harmless)
        unread = [
            name for name, value in self.values.items() if name not in known and value not in (None, [None, None])
        ]
        if unread:
            shown = ", ".join(f"{name}={self.values[name]!r}" for name in sorted(unread))
            log.warning("%s: unknown fields are left aside: %s", self.path, shown)
