"""The original Stable Diffusion code (`ldm`) and OpenCLIP's towers, without the libraries that their packages pull in.

Both are installed without their dependencies, see the Makefile. What is absent and not used by a network (the
training loop's base class, a torchvision layer) is stood in for while an import runs, and taken away again.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def _bare(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


@contextmanager
def stand_in(name: str, **attributes: object) -> Iterator[None]:
    """A module of these attributes, and empty parents, for as long as this lasts; nothing where it is installed."""
    parts = name.split(".")
    if importlib.util.find_spec(parts[0]) is not None:
        yield
        return
    names = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    for parent in names[:-1]:
        sys.modules[parent] = _bare(parent, __path__=[])
    sys.modules[name] = _bare(name, **attributes)
    try:
        yield
    finally:
        for added in names:
            del sys.modules[added]


def _spec(name: str) -> ModuleSpec:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"{name}: the tests need it, see the Makefile")
    return spec


def load_open_clip() -> ModuleType:
    """OpenCLIP's `model`, in a package whose `__init__` has not run: that one wants torchvision's transforms.

    The adapters to other libraries' towers are left out: no Stable Diffusion has one.
    """
    if "open_clip" not in sys.modules:
        sys.modules["open_clip"] = importlib.util.module_from_spec(_spec("open_clip"))
        sys.modules["open_clip.hf_model"] = _bare("open_clip.hf_model", HFTextEncoder=None)
        sys.modules["open_clip.timm_model"] = _bare("open_clip.timm_model", TimmModel=None)
    with stand_in("torchvision.ops.misc", FrozenBatchNorm2d=nn.Identity):
        return importlib.import_module("open_clip.model")


def open_clip_config(name: str) -> dict[str, Any]:
    """The published shape of an OpenCLIP model, such as ViT-H-14."""
    folder = Path(next(iter(_spec("open_clip").submodule_search_locations or ())))
    return json.loads((folder / "model_configs" / f"{name}.json").read_text(encoding="utf-8"))


def load_ldm(name: str) -> ModuleType:
    """A module of the original code: `modules.diffusionmodules.openaimodel`, `models.autoencoder`, ..."""
    _spec("ldm")
    load_open_clip()
    with stand_in("pytorch_lightning", LightningModule=nn.Module):
        return importlib.import_module(f"ldm.{name}")


def original_unet(**arguments: object) -> nn.Module:
    """The original UNetModel with cross-attention; its constructor imports a class of omegaconf."""
    module = load_ldm("modules.diffusionmodules.openaimodel")
    with stand_in("omegaconf.listconfig", ListConfig=list):
        return module.UNetModel(image_size=8, use_spatial_transformer=True, legacy=False, **arguments)
