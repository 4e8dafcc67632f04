"""Networks that steer a U-Net, as files: ControlNets, T2I-Adapters, IP-Adapters, and what finds edges for them."""

from sfumato.weights.controls.controlnet import load_control, save_control
from sfumato.weights.controls.ip_adapter import load_ip_adapter, save_ip_adapter
from sfumato.weights.controls.t2i_adapter import load_t2i_adapter, save_t2i_adapter

__all__ = [
    "load_control",
    "load_ip_adapter",
    "load_t2i_adapter",
    "save_control",
    "save_ip_adapter",
    "save_t2i_adapter",
]
