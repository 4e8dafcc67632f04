"""The families that are known. A new one is a constant in a file of its kind, and its name in this list."""

from __future__ import annotations

from sfumato.families.box import BOX
from sfumato.families.family import Defaults, Family, TextTower
from sfumato.families.model import Model
from sfumato.families.sd1 import SD1, SD1_EDIT, SD1_INPAINT, SD1_V
from sfumato.families.sd2 import SD2, SD2_BASE, SD2_DEPTH, SD2_INPAINT, SD2_UPSCALER
from sfumato.families.xl import XL, XL_INPAINT, XL_REFINER, XL_V

__all__ = ["BOX", "FAMILIES", "SD1", "SD2", "SD2_BASE", "XL", "Defaults", "Family", "Model", "TextTower", "find_family"]

# Of families with tensors of the same shapes, the first is what a file is taken for that says nothing else.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        SD1, SD1_V, SD1_INPAINT, SD1_EDIT, SD2, SD2_BASE, SD2_INPAINT, SD2_DEPTH, SD2_UPSCALER,
        XL, XL_V, XL_INPAINT, XL_REFINER, BOX,
    )
}  # fmt: skip


def find_family(name: str) -> Family:
    """The family of a name; ValueError lists the names."""
    if name not in FAMILIES:
        raise ValueError(f"family={name!r}: one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
