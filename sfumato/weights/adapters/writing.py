"""An adapter's changes -> a .safetensors file in kohya's, diffusers' or PEFT's names, whole or not at all.

Kohya's holds every kind; the other two hold LoRA and DoRA, the scale alpha / r folded into `up`, so that no reader has
to find it elsewhere. Knows how changes are named in files, not how they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sfumato.families import Family
from sfumato.models.deltas import BOFT, IA3, OFT, Change, Difference, DoRA, GLoRA, LoHa, LoKr, LoRA
from sfumato.weights.adapters.adapter import Adapter, Changes
from sfumato.weights.adapters.names import diffusers_modules, kohya_modules
from sfumato.weights.files import save_safetensors
from sfumato.weights.parts import shapes_of

Layout: TypeAlias = Literal["kohya", "diffusers", "peft"]
LAYOUTS = get_args(Layout)


def save_adapter(
    path: str | Path,
    adapter: Adapter | Changes,
    family: Family,
    layout: Layout = "kohya",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter, or changes by (part, parameter), in a layout; `dtype` None keeps each tensor's precision.

    Kohya's `ss_` and `sshs_` entries are added to the metadata where that has them not. "peft" holds one network and
    has its adapter_config.json written beside. ValueError: a name that is not .safetensors, a kind or parameter that
    the layout cannot hold, nothing to write.
    """
    path = Path(path)
    changes = adapter.changes if isinstance(adapter, Adapter) else adapter
    if path.suffix != ".safetensors":
        raise ValueError(f"out={str(path)!r}: .safetensors is written, no other format")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: one of {', '.join(LAYOUTS)}")
    if not changes:
        raise ValueError(f"out={str(path)!r}: the adapter changes nothing")
    tensors = tensors_in_layout(changes, family, layout)
    if dtype is not None:
        tensors = {name: t if t.ndim == 0 else t.to(dtype) for name, t in tensors.items()}
    told = dict(adapter.metadata) if isinstance(adapter, Adapter) else {}
    told.pop("lora_adapter_metadata", None)  # scales are in the tensors now
    told |= metadata or {}
    if layout == "kohya":
        told = {**_kohya_metadata(changes, family), **told, "sshs_model_hash": model_hash(tensors)}
    save_safetensors(path, tensors, {"format": "pt", **told})
    if layout == "peft":
        _write_config(path, tensors)


def tensors_in_layout(changes: Changes, family: Family, layout: Layout = "kohya") -> dict[str, Tensor]:
    """The tensors of changes by a layout's names, on the CPU; ValueError as in `save_adapter`."""
    if layout == "peft" and len({part for part, _ in changes}) > 1:
        raise ValueError("layout='peft': it holds one network; 'kohya' and 'diffusers' hold all")
    modules = kohya_modules(family) if layout == "kohya" else diffusers_modules(family)
    tensors: dict[str, Tensor] = {}
    for (part, parameter), made in changes.items():
        module, _, end = parameter.rpartition(".")
        if (part, module) not in modules:
            raise ValueError(f"{part}: {family.name} has no module {module}")
        stem = modules[part, module]
        if layout == "peft":
            stem = "base_model.model." + stem.partition(".")[2]
        for change in made:
            norm = "norm" in module.rpartition(".")[2] or module.endswith(("in_layers.0", "out_layers.0", "out.0"))
            ndim = len(shapes_of(family)[part][f"{module}.weight"])
            new = _kohya(change, end, norm, ndim) if layout == "kohya" else _dotted(change, end, layout)
            for name, tensor in new.items():
                if f"{stem}.{name}" in tensors:
                    raise ValueError(f"{part} {parameter}: the layout holds one change of a kind")
                tensors[f"{stem}.{name}"] = tensor.detach().cpu().contiguous()
    return tensors


def _kohya(change: Change, end: str, norm: bool, ndim: int) -> dict[str, Tensor]:
    """The tensors of a change of a weight of `ndim` sizes by the ends of their names in kohya's and LyCORIS' files."""
    if isinstance(change, Difference):
        names = {"weight": "w_norm", "bias": "b_norm"} if norm else {"weight": "diff", "bias": "diff_b"}
        return {names[end]: change.value}
    if end != "weight":
        raise ValueError(f"layout='kohya': it holds no {type(change).__name__} of a {end}")
    if isinstance(change, DoRA):
        magnitude = _along(change.magnitude, 0 if change.on_output else 1, ndim)
        return {**_kohya(change.inner, end, norm, ndim), "dora_scale": magnitude}
    if isinstance(change, LoRA):
        up = change.up.reshape(*change.up.shape[:2], *[1] * (change.down.ndim - 2))
        return _named(change, {"lora_up.weight": up, "lora_down.weight": change.down, "lora_mid.weight": change.mid})
    if isinstance(change, LoHa | LoKr):
        prefix = "hada_" if isinstance(change, LoHa) else "lokr_"
        held = {prefix + field.name: getattr(change, field.name) for field in fields(change) if field.name != "alpha"}
        return _named(change, held)
    if isinstance(change, GLoRA):
        return _named(change, {f"{name}.weight": getattr(change, name) for name in ("a1", "a2", "b1", "b2")})
    if isinstance(change, IA3):
        scale = change.scale.flatten() if ndim == 2 else _along(change.scale, 1, ndim)
        return {"weight": scale, "on_input": torch.tensor(int(change.on_input))}
    if isinstance(change, OFT | BOFT):
        made = {"oft_blocks": change.blocks, "alpha": torch.tensor(change.constraint or 0.0)}
        return made if change.rescale is None else {**made, "rescale": _along(change.rescale, 0, ndim)}
    raise ValueError(f"layout='kohya': it holds no {type(change).__name__}")


def _along(numbers: Tensor, axis: int, ndim: int) -> Tensor:
    """Numbers along one axis of `ndim`."""
    sizes = [1] * ndim
    sizes[axis] = -1
    return numbers.reshape(sizes)


def _named(change: LoRA | LoHa | LoKr | GLoRA, held: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What is there of it, with its alpha; r where it has none, as some readers ask for one."""
    alpha = change.alpha if change.alpha is not None else float(change.rank or 1)
    return {**{name: tensor for name, tensor in held.items() if tensor is not None}, "alpha": torch.tensor(alpha)}


def _dotted(change: Change, end: str, layout: str) -> dict[str, Tensor]:
    """LoRA and DoRA by PEFT's ends, alpha folded into the second factor."""
    inner = change.inner if isinstance(change, DoRA) else change
    if not isinstance(inner, LoRA) or inner.mid is not None or end != "weight":
        kind = "LoRA with a core" if isinstance(inner, LoRA) else f"{type(inner).__name__} of a {end}"
        raise ValueError(f"layout={layout!r}: it holds LoRA and DoRA, no {kind}; 'kohya' holds every kind")
    factor = 1.0 if inner.alpha is None else inner.alpha / inner.rank
    up = inner.up if factor == 1 else (inner.up.float() * factor).to(inner.up.dtype)
    up = up.reshape(*up.shape[:2], *[1] * (inner.down.ndim - 2))
    out = {"lora_A.weight": inner.down, "lora_B.weight": up}
    if isinstance(change, DoRA):
        if not change.on_output:
            raise ValueError(f"layout={layout!r}: its DoRA is along outputs; 'kohya' holds this one")
        magnitude = change.magnitude.flatten()
        out["lora_magnitude_vector"] = magnitude if inner.down.ndim == 2 else _along(magnitude, 1, inner.down.ndim)
    return out


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """kohya's sshs_model_hash: SHA-256 of the tensors' bytes alone, so that metadata may change.

    In the order in which a .safetensors file has them: by size of items, falling, then by name.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors, key=lambda each: (-tensors[each].element_size(), each)):
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _kohya_metadata(changes: Changes, family: Family) -> dict[str, str]:
    """What other programs look for: rank, alpha, module and base model."""
    made = [change for each in changes.values() for change in each]
    loras: list[LoRA] = [
        inner for change in made if isinstance(inner := change.inner if isinstance(change, DoRA) else change, LoRA)
    ]
    ranks = {lora.rank for lora in loras}
    alphas = {lora.rank if lora.alpha is None else lora.alpha for lora in loras}
    plain = len(loras) == len(made) and not any(isinstance(change, DoRA) for change in made)
    version = "sdxl_base_v1-0" if family.unet.vector_dim else "sd_v2" if family.texts[0].openclip else "sd_v1"
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(alphas.pop())) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "sfumato.family": family.name,
    }


def _write_config(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """PEFT's description of the file: every module by its name, scales of 1."""
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    most = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "target_modules": sorted(ranks),
        "use_dora": any("lora_magnitude_vector" in name for name in tensors),
        "bias": "none",
        "inference_mode": True,
    }
    beside = path.with_name("adapter_config.json")
    part = beside.with_name(f".{beside.name}.part")
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(beside)
