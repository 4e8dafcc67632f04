"""The original single-file layout: where our tensors lie in it, other spellings in the wild, EMA twins, known rest.

U-Net and autoencoder modules are named as there, so their tables are prefixes; text encoders are CLIP's as published
by OpenAI (same names) or OpenCLIP's (own names, q, k and v stacked). Knows no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sfumato.families import Family, TextTower
from sfumato.weights.layouts.tables import Change, Place

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
EMA = "model_ema."

OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": Place("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
    "text_model.final_layer_norm.weight": Place("ln_final.weight"),
    "text_model.final_layer_norm.bias": Place("ln_final.bias"),
    "text_projection.weight": Place("text_projection", Change.TRANSPOSED),
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
STACKED = {"q_proj": Change.QUERY, "k_proj": Change.KEY, "v_proj": Change.VALUE}
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")

# Known and rightly unused: schedules (recomputed), marks of the prediction, position ids, EMA twins and counters,
# training weights of the autoencoder's loss, CLIP's temperature and masks, depth and noise models beside the U-Net.
UNUSED = re.compile(
    r"(alphas_cumprod|betas|log_one_minus_alphas|logvar|posterior_|sqrt_|denoiser\.|v_pred$|ztsnr$)"
    r"|(scale_factor$|scale_shift$|low_scale_model\.|depth_model\.|embedding_manager\.|model_ema\.|loss\.)"
    r"|first_stage_model\.(loss\.|model_ema\.|colorize$)"
    r"|(cond_stage_model|conditioner)\.(.*\.)?(position_ids|logit_scale|attn_mask|text_projection(\.weight)?)$"
)
# Other spellings: SD 1.x merges that lost "text_model.", and SD 2.x in XL's naming.
BARE_CLIP = re.compile(r"cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\.")

NEW_ATTENTION = re.compile(r"(first_stage_model\..*\.attn_1)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")


def text_table(tower: TextTower, names: Iterable[str]) -> dict[str, Place]:
    """Ours -> theirs for a text encoder whose tensors have the given names of ours."""
    if not tower.openclip:
        return {name: Place(tower.prefix + name) for name in names}
    table = {}
    for name in names:
        place = OPENCLIP_ENDS.get(name) or _openclip_layer(name)
        table[name] = Place(tower.prefix + place.name, place.change)
    return table


def _openclip_layer(name: str) -> Place:
    found = LAYER.fullmatch(name)
    if not found:
        raise ValueError(f"the tensor {name} has no place in OpenCLIP's layout")
    number, inner, end = found.groups()
    block = f"transformer.resblocks.{number}."
    projection = inner.rpartition(".")[2]
    if projection in STACKED:
        return Place(f"{block}attn.in_proj_{end}", STACKED[projection])
    return Place(f"{block}{OPENCLIP_LAYER[inner]}.{end}")


def part_table(family: Family, part: str, names: Iterable[str]) -> dict[str, Place]:
    """Ours -> theirs for one of `family.parts`, whose tensors have the given names of ours."""
    if part in family.text_parts:
        return text_table(family.texts[family.text_parts.index(part)], names)
    prefix = UNET if part == "unet" else AUTOENCODER
    return {name: Place(prefix + name) for name in names}


def canonical(name: str, family: Family) -> str:
    """A stored name in the original's own spelling."""
    if found := NEW_ATTENTION.fullmatch(name):
        return f"{found[1]}.{'proj_out' if found[2] == 'to_out.0' else found[2][-1]}.{found[3]}"
    if BARE_CLIP.match(name):
        return name.replace("cond_stage_model.transformer.", "cond_stage_model.transformer.text_model.", 1)
    if family.texts[0].prefix == "cond_stage_model.model." and name.startswith("conditioner.embedders.0.model."):
        return name.replace("conditioner.embedders.0.model.", "cond_stage_model.model.", 1)
    return name


def is_ours(name: str, family: Family) -> bool:
    """Whether a name lies where the family's networks are; what lies elsewhere is carried along, not refused."""
    return name.startswith((UNET, AUTOENCODER, *(tower.prefix for tower in family.texts)))


def ema_name(name: str) -> str:
    """The averaged twin of a U-Net tensor "model.diffusion_model...": its dots are gone, as in the original's EMA."""
    return EMA + name.removeprefix("model.").replace(".", "")


def rightly_unused(name: str, family: Family) -> bool:
    """Whether a tensor that is in no network is known, and rightly so."""
    if UNUSED.match(name):
        return True
    # Layers behind the last that is read (SD 2.x stores 24 layers and reads 23).
    for tower in family.texts:
        found = re.fullmatch(
            re.escape(tower.prefix) + r"(?:transformer\.resblocks|text_model\.encoder\.layers)\.(\d+)\..+", name
        )
        if found and int(found[1]) >= tower.config.num_layers:
            return True
    return False
