"""Single-file checkpoints in the original layout <-> the modules of a Model. Strict: nothing is dropped unsaid.

Knows prefixes and the few buffers that old files carry; foreign layouts have their own key tables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.families import Family, Model, detect
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.weights.files import file_hash, load_safetensors, save_safetensors

log = logging.getLogger(__name__)

PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
# Known and rightly unused: schedules (recomputed), position ids, training weights of the autoencoder's loss, EMA twins.
IGNORED_NAMES = {
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "logvar", "model_ema.decay",
    "model_ema.num_updates", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "posterior_variance", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "cond_stage_model.transformer.text_model.embeddings.position_ids",
}  # fmt: skip
IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.")


def build(family: Family) -> dict[str, nn.Module]:
    """A family's three networks, randomly initialised, by the names of PREFIXES."""
    return {"unet": UNet(family.unet), "autoencoder": Autoencoder(family.autoencoder), "text": CLIPText(family.text)}


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network, its convolutions' weights in channels-last order, which is faster on CPUs and tensor cores."""
    return module.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _rightly_unused(name: str) -> bool:
    return name in IGNORED_NAMES or name.startswith(IGNORED_PREFIXES)


def split(tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by network. ValueError names the first missing, misshapen or unknown tensor."""
    used: dict[str, dict[str, Tensor]] = {}
    rest = {name for name in tensors if not _rightly_unused(name)}
    for part, module in parts.items():
        used[part] = {}
        for name, expected in module.state_dict().items():
            full = PREFIXES[part] + name
            if full not in tensors:
                raise ValueError(f"the tensor {full} is missing")
            shape = tuple(tensors[full].shape)
            if shape != tuple(expected.shape):
                raise ValueError(f"the tensor {full} has shape {shape}, expected {tuple(expected.shape)}")
            if not tensors[full].is_floating_point():
                raise ValueError(f"the tensor {full} is {tensors[full].dtype}: floating point is needed")
            used[part][name] = tensors[full]
            rest.discard(full)
    if rest:
        raise ValueError(f"{len(rest)} tensors belong to no network of the family, first {min(rest)}")
    return used


def load_model(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a checkpoint; every ValueError begins with the file's name."""
    path, device = Path(path), torch.device(device)
    tensors, header = load_safetensors(path)
    try:
        family = detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)
        with torch.device("meta"):
            parts = build(family)
        for part, state in split(tensors, parts).items():
            parts[part].load_state_dict(state, strict=True, assign=True)
        tokenizer = ClipTokenizer(family.text.vocab_size)
    except ValueError as error:
        raise ValueError(f"ckpt={str(path)!r}: {error}") from error
    ignored = sum(map(_rightly_unused, tensors))
    log.info("%s: family %s, %d tensors read, %d known ones unused", path.name, family.name, len(tensors), ignored)
    for module in parts.values():
        place(module, device, dtype).eval().requires_grad_(False)
    return Model(
        family=family,
        text=parts["text"],  # type: ignore[arg-type]
        unet=parts["unet"],  # type: ignore[arg-type]
        autoencoder=parts["autoencoder"],  # type: ignore[arg-type]
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        name=path.stem,
        hash=file_hash(path),
    )


def save_checkpoint(
    path: str | Path, family: Family, parts: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype = torch.float16
) -> None:
    """Write networks' state dicts ("unet", "autoencoder", "text") as one file, the family in its header."""
    tensors = {
        PREFIXES[part] + name: tensor.detach().to(dtype)
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    with torch.device("meta"):
        split(tensors, build(family))
    save_safetensors(path, tensors, {"format": "pt", "sfumato.family": family.to_json()})
