"""The names and ranges that help shows, so that no help waits for torch: a copy of what other packages own.

Nothing that runs reads them. tests/test_cli_names.py holds each of them equal to its owner's, and says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping

SAMPLERS = (
    "euler", "euler_a", "ddim", "ddpm", "lcm", "tcd", "heun", "heunpp2", "dpm2", "dpm2_a", "restart", "plms", "lms",
    "ipndm", "ipndm_v", "deis", "dpmpp_2s_a", "dpmpp_2s", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde", "dpmpp_3m", "dpm_fast", "dpm_adaptive", "unipc", "unipc_bh2", "sa_solver", "sa_solver_pece",
    "res_multistep", "res_multistep_a", "gradient_estimation", "er_sde", "seeds_2", "seeds_3", "exp_heun_2_x0",
    "exp_heun_2_x0_sde", "euler_cfg_pp", "euler_a_cfg_pp", "ddim_cfg_pp", "dpmpp_2s_a_cfg_pp", "dpmpp_2m_cfg_pp",
    "res_multistep_cfg_pp", "res_multistep_a_cfg_pp", "gradient_estimation_cfg_pp",
)  # fmt: skip
SCHEDULES = (
    "uniform", "normal", "sgm_uniform", "simple", "ddim", "ddim_uniform", "leading", "trailing", "linspace", "turbo",
    "sd_turbo", "lcm", "karras", "exponential", "polyexponential", "kl_optimal", "kl_optimal_comfy",
    "linear_quadratic", "beta", "beta_comfy", "align_your_steps", "ays", "align_your_steps_32",
    "align_your_steps_gits",
)  # fmt: skip
FAMILIES = (
    "sd1", "sd1-v", "sd1-inpaint", "sd1-edit", "sd2", "sd2-base", "sd2-inpaint", "sd2-depth", "sd2-upscaler", "xl",
    "xl-v", "xl-inpaint", "xl-refiner", "box",
)  # fmt: skip
SOURCES = ("cpu", "device", "philox")
WEIGHTINGS = ("original", "no norm", "comfy", "ignore", "none")
UPSCALERS = ("nearest", "bilinear", "bicubic", "lanczos")
LATENT_UPSCALERS = ("latent", "latent bilinear", "latent bicubic", "latent nearest")
FITS = ("keep", "stretch", "crop", "fill", "latent")
FILLS = ("original", "fill", "noise", "nothing")
FORMATS = (".gif", ".webp")
PREVIEWS = ("linear", "tiny", "full")
PICTURES = ("image", "mask", "depth")
ANNOTATORS = (
    "tile", "blur", "invert", "threshold", "grey", "colour", "canny", "lines", "scribble", "hed", "scribble-hed",
    "depth",
)  # fmt: skip
ANNOTATOR_OPTIONS: Mapping[str, str] = {
    "factor": "tile: how many times smaller it becomes in between (4.0)",
    "sigma": "blur: deviation of the Gaussian in pixels (9.0)",
    "level": "threshold: luminance above which a pixel is white (127); "
    "scribble-hed: grey level that a thinned soft edge must have (127)",
    "block": "colour: side of a block in pixels (64)",
    "low": "canny: gradient from which a pixel goes on with an edge (100)",
    "high": "canny: gradient from which an edge begins (200)",
    "length": "lines: pixels below which a segment is left out (20.0)",
    "width": "lines: pixels that a line is drawn wide (2)",
    "threshold": "scribble: how dark a line must be against what is around it (32.0)",
}
FEATURES = ("inception", "clip", "openclip", "efficientnet-lite0", "mobilenet-v2")
RESIZERS = ("clean", "legacy-torch", "legacy-tf")
PRECISIONS = ("fp32", "fp16", "bf16")
COMPUTED = ("autocast", "full", "fp32", "fp16", "bf16")
COMPUTED_HELP = (
    "what networks compute in: full is fp32; autocast is fp16 on a GPU and fp32 on a CPU; bf16 is quicker on a CPU "
    "that has instructions for it (default: %(default)s)"
)
LAYOUTS = ("kohya", "diffusers", "peft")
HASHES = ("dhash", "phash")
MOST_BITS = 8
PER_SHARD = 10_000
PRESETS: Mapping[str, str] = {
    "laion2b-en": "laion2B-en at 256: the first stage of v1-1",
    "high-resolution": "laion-high-resolution: the second stage of v1-1",
    "improved-aesthetics": "laion-improved-aesthetics: v1-2 and v1-3",
    "aesthetics-v1": "laion-improved-aesthetics: v1-2 and v1-3",
    "aesthetics-v2-5": "laion-aesthetics v2 5+: v1-4 and v1-5",
    "aesthetics-v2-6": "laion-aesthetics v2 6+",
    "aesthetics-v2-6.5": "laion-aesthetics v2 6.5+",
}
ADAPTERS = ("lora", "locon", "loha", "lokr", "dora")
TARGETS = ("attention", "linear", "conv")
TEMPLATES = ("subject", "style")
ACTIVATIONS = (
    "linear", "swish", "relu", "leakyrelu", "elu", "tanh", "sigmoid", "celu", "gelu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "logsigmoid", "mish", "prelu", "relu6", "rrelu", "selu", "silu", "softplus", "softshrink",
    "softsign", "tanhshrink",
)  # fmt: skip
WEIGHT_INITS = ("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")
CROPS = ("centre", "random")
HINT_CAPTION_DROP = 0.5
LCM_RANK, LCM_SOLVER_STEPS = 64, 50

_RANGES = {
    "0 to 1": "eta variation_strength guidance_start guidance_end rescale threshold strength colour_variation",
    "0 to 0.75": "tome",
    "0 to 4": "falloff",
    "0 to 10": "aesthetic negative_aesthetic noise_multiplier",
    "0 to 256": "mask_blur_x mask_blur_y",
    "0 to 1000": "guidance mimic pag sag image_guidance",
    "0 to 8192": "crop_left crop_top padding left right up down",
    "0 to 10000": "guidance_low guidance_high guidance_thin",
    "1 to 16": "upscale",
    "1 to 64": "clip_skip",
    "1 to 8192": "noise_width noise_height original_width original_height tile overlap",
    "1 to 10000": "count",
}
RANGES: Mapping[str, str] = {name: text for text, names in _RANGES.items() for name in names.split()}
