"""Which checker looks at pictures: the one that is named, else the model's own, else the small one of a package."""

from __future__ import annotations

from pathlib import Path

from sfumato.safety import opennsfw
from sfumato.safety.checking import Checker
from sfumato.safety.concepts import holds_concepts, open_concepts


def is_at_hand(ckpt: str | None) -> bool:
    """Whether a checker is there without being named: in a checkpoint's file or folder, or installed."""
    return opennsfw.at_hand() or (ckpt is not None and Path(ckpt).exists() and holds_concepts(ckpt))


def open_checker(name: str | None, ckpt: str | None = None) -> Checker:
    """`opennsfw`, or the file or folder of the published checker's weights; None: the `ckpt`'s own, else opennsfw.

    ValueError, in one line, where there is none, or the weights are not a checker's.
    """
    if name == opennsfw.OpenNsfw.name:
        return opennsfw.OpenNsfw()
    if name is not None:
        return open_concepts(name)
    if ckpt is not None and Path(ckpt).exists() and holds_concepts(ckpt):
        return open_concepts(ckpt)
    if opennsfw.at_hand():
        return opennsfw.OpenNsfw()
    raise ValueError("safety_checker: none is at hand; name its weights, or install sfumato[safety]")
