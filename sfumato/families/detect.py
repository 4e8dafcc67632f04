"""Which family a single-file checkpoint is of, and why: from names, shapes and metadata, without building a network.

Where two families have tensors of the same shapes (noise or v prediction), the file's own words decide, then the marks
that fine-tunes carry, then the file's name, then one small tensor of SD 2.x, and at last the commoner of the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.families import FAMILIES
from sfumato.families.family import Family

ASKED = "as asked"  # the ground where a person named the family
UNET = "model.diffusion_model."
FIRST_CONV = f"{UNET}input_blocks.0.0.weight"
V_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_BIAS_DEVIATION = 0.09  # above it in the published SD 2.x v models, below it in the base ones: as ComfyUI tells them

# What else a file of tensors may be: the first of these that fits is named in the refusal.
OTHERS = (
    ("a Stable Diffusion U-Net", r"model\.diffusion_model\.input_blocks\."),
    ("a LoRA or one of its kin", r"lora_(unet|te\d?)_|.*\.lora_(up|down|A|B)\.|.*(hada_w1|lokr_w1|oft_blocks)"),
    ("a ControlNet", r"control_model\.|controlnet_|zero_convs\.|input_hint_block\."),
    ("an autoencoder alone", r"(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|mid_block|down_blocks)"),
    ("a U-Net alone, in the diffusers layout", r"(down_blocks|conv_in|time_embedding)\."),
    ("a text encoder alone", r"text_model\.|transformer\.resblocks\."),
    ("a textual inversion embedding", r"string_to_param|emb_params$|clip_[lg]$"),
    ("a model of another kind (Flux)", r"(model\.diffusion_model\.)?double_blocks\."),
    ("a model of another kind (SD 3)", r"(model\.diffusion_model\.)?joint_blocks\."),
    ("an upscaler (RRDBNet)", r"(conv_first|RRDB_trunk|body\.0\.rdb1|model\.1\.sub)"),
    ("a Playground 2.5 model, whose noise this does not know", r"edm_(mean|std)$"),
)  # fmt: skip


@dataclass(frozen=True)
class Detection:
    """The family, and the grounds for it in words; `sure` is False where only custom decided."""

    family: Family
    why: str
    sure: bool = True


@dataclass(frozen=True)
class Clues:
    """What a file says of itself beside its tensors' shapes: its header, its name, the prediction in a YAML beside."""

    metadata: Mapping[str, str]
    name: str = ""
    yaml_prediction: str | None = None
    read: Callable[[str], Tensor] | None = None


def signature_of(family: Family) -> tuple[int | None, ...]:
    """What tells a family's U-Net from another's: width, channels in, context, vector, classes, transformer blocks."""
    unet = family.unet
    down = unet.num_res_blocks * sum(unet.transformer_depth)
    up = (unet.num_res_blocks + 1) * sum(unet.transformer_depth)
    blocks = down + up + unet.middle_depth
    return (unet.channels, unet.in_channels, unet.context_dim, unet.vector_dim, unet.num_classes, blocks)


def signature(shapes: Mapping[str, Sequence[int]]) -> tuple[int | None, ...]:
    """The same, from a checkpoint's shapes by their original names; ValueError where it holds no such U-Net."""
    for what, pattern in OTHERS[-1:]:
        if any(re.match(pattern, name) for name in shapes):
            raise ValueError(f"it is {what}")
    first = shapes.get(FIRST_CONV, ())
    keys = [name for name in shapes if name.startswith(UNET) and name.endswith(".attn2.to_k.weight")]
    if len(first) != 4 or not keys or any(len(shapes[name]) != 2 for name in keys):
        raise ValueError(f"it is {other_kind(shapes)}; a checkpoint has {FIRST_CONV} and cross-attention")
    vector = shapes.get(f"{UNET}label_emb.0.0.weight")
    classes = shapes.get(f"{UNET}label_emb.weight")
    return (
        first[0],
        first[1],
        shapes[keys[0]][1],
        vector[1] if vector and len(vector) == 2 else None,
        classes[0] if classes else None,
        len(keys),
    )


def other_kind(names: Mapping[str, object] | Sequence[str]) -> str:
    """In words what a file is that is no checkpoint."""
    for what, pattern in OTHERS:
        if any(re.match(pattern, name) for name in names):
            return what
    return "no Stable Diffusion checkpoint"


def detect(shapes: Mapping[str, Sequence[int]], clues: Clues) -> Detection:
    """The family of a single-file checkpoint; ValueError, in words, where none fits."""
    if "sfumato.family" in clues.metadata:
        return Detection(Family.from_json(clues.metadata["sfumato.family"]), "the file's header describes it")
    found = signature(shapes)
    alike = [family for family in FAMILIES.values() if signature_of(family) == found]
    if not alike:
        width, channels, context, vector, _, blocks = found
        raise ValueError(
            f"a U-Net of width {width}, {channels} input channels, context {context}, vector {vector} and {blocks} "
            f"transformer blocks is of no known family ({', '.join(FAMILIES)})"
        )
    family, why, sure = alike[0], f"{found[0]} wide, {found[1]} channels in, context {found[2]}", True
    if len(alike) > 1:
        prediction, ground = prediction_of(shapes, clues)
        sure = prediction is not None or not _is_sd2(shapes)  # of 1.x and XL, v models are rare and marked
        if prediction is not None:
            family = next((one for one in alike if one.prediction == prediction), family)
        why += f"; {family.prediction} prediction: {ground or 'the commoner, the file does not say'}"
    if "ztsnr" in shapes:
        family = replace(family, schedule=replace(family.schedule, zero_terminal_snr=True))
        why += "; zero terminal SNR: the mark ztsnr"
    return Detection(family, why, sure)


def prediction_of(shapes: Mapping[str, Sequence[int]], clues: Clues) -> tuple[str | None, str]:
    """("eps", "v" or None, the ground for it in words)."""
    said = clues.metadata.get("modelspec.prediction_type") or clues.metadata.get("modelspec.predict_key") or ""
    if said:
        return ("v" if said.lower().startswith("v") else "eps"), f"the header says {said}"
    if "768-v" in clues.metadata.get("modelspec.architecture", ""):
        return "v", "the header's architecture"
    if "v_pred" in shapes:
        return "v", "the mark v_pred"
    if clues.yaml_prediction:
        return ("v" if clues.yaml_prediction == "v" else "eps"), "the YAML beside the file"
    name = clues.name.lower()
    if found := re.search(r"(?<![a-z])(v|eps)[-_ ]?pred(iction)?(?![a-z])", name):
        return ("v" if found[1] == "v" else "eps"), f"{found[0]} in the file's name"
    if _is_sd2(shapes) and (found := re.search(r"768[-_]?v|v2-1_768|v2-1_512|512-base|base-ema", name)):
        return ("v" if "768" in found[0] else "eps"), f"{found[0]} in the file's name"
    shape = tuple(shapes.get(V_BIAS, ()))
    if clues.read is not None and len(shape) == 1 and tuple(shapes[FIRST_CONV])[:2] == (320, 4) and _is_sd2(shapes):
        deviation = float(torch.std(clues.read(V_BIAS).float(), unbiased=False))
        wide = deviation > V_BIAS_DEVIATION
        return (
            "v" if wide else "eps"
        ), f"the deviation {deviation:.3f} of a bias ({'v' if wide else 'base'} models have so)"
    return None, ""


def _is_sd2(shapes: Mapping[str, Sequence[int]]) -> bool:
    return signature(shapes)[2] == FAMILIES["sd2"].unet.context_dim
