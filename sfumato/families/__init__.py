"""The families that are known, and how a checkpoint's family is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfumato.families.box import BOX
from sfumato.families.family import Defaults, Family
from sfumato.families.model import Model
from sfumato.families.sd1 import SD1

__all__ = ["BOX", "FAMILIES", "SD1", "Defaults", "Family", "Model", "detect"]

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, BOX)}
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"
ANY_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def detect(shapes: Mapping[str, Sequence[int]], header: Mapping[str, str]) -> Family:
    """The family of a single-file checkpoint: its header's description, else what its shapes say.

    ValueError where neither fits; `shapes` are those of the tensors by their original names.
    """
    if "sfumato.family" in header:
        return Family.from_json(header["sfumato.family"])
    for name, rank in ((FIRST_CONV, 4), (ANY_CONTEXT, 2)):
        if len(shapes.get(name, ())) != rank:
            known = ", ".join(FAMILIES)
            raise ValueError(f"it has no {name}: not a Stable Diffusion checkpoint of a known family ({known})")
    found = (shapes[FIRST_CONV][0], shapes[FIRST_CONV][1], shapes[ANY_CONTEXT][1])
    if found == (SD1.unet.channels, SD1.unet.in_channels, SD1.unet.context_dim):
        return SD1
    raise ValueError(
        f"U-Net of width {found[0]}, {found[1]} input channels, context {found[2]}: no known family "
        f"({', '.join(FAMILIES)})"
    )
