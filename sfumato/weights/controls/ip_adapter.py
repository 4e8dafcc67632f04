"""IP-Adapters as files: the published names, .safetensors or nested in a .bin. Strict."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato.families import Model
from sfumato.families.detect import other_kind
from sfumato.models.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from sfumato.weights.controls.files import Pool, blamed, check_target, fill_from, opened
from sfumato.weights.controls.names import kin_of, layout_of
from sfumato.weights.files import save_safetensors

HEAD = 64  # channels of a head of every published resampler


def load_ip_adapter(path: str | Path, model: Model) -> IPAdapter:
    """The adapter of a file, ready to use beside the model, on its device and in its precision.

    The plain kind and "plus", by content. ValueError of one line: what it is instead, or what does not fit the model.
    """
    path = Path(path).expanduser()
    with blamed("ip_adapter", path):
        pool, values, _ = opened(path)
        if values:
            raise ValueError("a file is needed: diffusers has no folder of its own for IP-Adapters")
        if not any(name.startswith("image_proj.") for name in pool):
            what = "a ControlNet" if layout_of(pool) else kin_of(pool) or other_kind(list(pool))
            raise ValueError(f"it is {what}, no IP-Adapter")
        config = _config(pool)
        own = model.family.unet.context_dim
        if config.context_dim != own:
            raise ValueError(f"it is for a context of {config.context_dim}; {model.family.name} has {own}")
        dims = [attention.to_q.out_features for attention in cross_attentions(model.unet)]
        with torch.device("meta"):
            network = IPAdapter(config, dims)
        fill_from(network, pool, path, model, f"an IP-Adapter of {model.family.name}")
    return network


def save_ip_adapter(path: str | Path, network: IPAdapter, dtype: torch.dtype | None = None) -> None:
    """Write a .safetensors file in the published names."""
    path = Path(path).expanduser()
    if check_target(path):
        raise ValueError(f"out={str(path)!r}: a .safetensors file is needed")
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in network.state_dict().items()}
    save_safetensors(path, state, {"format": "pt"})


def _config(pool: Pool) -> IPAdapterConfig:
    """The config of a file's shapes; ValueError where it is of a kind not known here."""

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in pool:
            raise ValueError(f"the tensor {name} is missing: plain and plus IP-Adapters are known")
        file, stored = pool[name]
        if len(found := file.shape(stored)) != dimensions or 0 in found:
            raise ValueError(f"the tensor {name} has shape {found}, {dimensions} dimensions are needed")
        return found

    if "image_proj.latents" not in pool:
        wide, image = shape("image_proj.proj.weight")
        [context] = shape("image_proj.norm.weight", 1)
        return IPAdapterConfig(image, context, max(1, wide // context))
    _, tokens, width = shape("image_proj.latents", 3)
    context = shape("image_proj.proj_out.weight")[0]
    depth = len({name.split(".")[2] for name in pool if name.startswith("image_proj.layers.")})
    inner = shape("image_proj.layers.0.0.to_q.weight")[0]
    if inner % HEAD:
        raise ValueError(f"its resampler is {inner} wide: heads of {HEAD} channels are needed")
    image = shape("image_proj.proj_in.weight")[1]
    return IPAdapterConfig(image, context, tokens, depth, width, HEAD, inner // HEAD)
