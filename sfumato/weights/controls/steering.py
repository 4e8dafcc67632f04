"""Whatever steers a U-Net by a picture, found out from the file: a ControlNet, a T2I-Adapter or an IP-Adapter."""

from __future__ import annotations

from pathlib import Path

from sfumato.families import Model
from sfumato.models.controlnet import ControlNet
from sfumato.models.ip_adapter import IPAdapter
from sfumato.models.t2i_adapter import T2IAdapter
from sfumato.weights.controls.controlnet import load_control
from sfumato.weights.controls.files import blamed, opened
from sfumato.weights.controls.ip_adapter import load_ip_adapter
from sfumato.weights.controls.names import kin_of
from sfumato.weights.controls.t2i_adapter import load_t2i_adapter


def load_steering(path: str | Path, model: Model) -> ControlNet | T2IAdapter | IPAdapter:
    """The network of a file or folder, ready beside the model. ValueError of one line as load_control says."""
    path = Path(path).expanduser()
    with blamed("control", path):
        pool, values, _ = opened(path)
    if values.get("_class_name") == "T2IAdapter" or (not values and kin_of(pool) == "a T2I-Adapter"):
        return load_t2i_adapter(path, model)
    if not values and kin_of(pool) == "an IP-Adapter":
        return load_ip_adapter(path, model)
    return load_control(path, model)
