"""Peers that need care to load: k-diffusion's samplers without the training libraries that its package pulls in."""

import importlib.util
import sys
from types import ModuleType


def _bare(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def load_k_diffusion() -> tuple[ModuleType, ModuleType]:
    """k-diffusion's own `sampling` and `external`, from an empty package in place of its heavy `__init__`.

    Its `utils` wants torchvision's picture conversions, which no sampler uses: where torchvision is absent an empty
    module stands in while the import runs, and is taken away again so that nothing else finds it.
    """
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None:
            raise ModuleNotFoundError("k_diffusion: the tests need it, see the Makefile")
        sys.modules["k_diffusion"] = _bare("k_diffusion", __path__=list(spec.submodule_search_locations or ()))
    stand_ins = {}
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        functional = _bare("torchvision.transforms.functional")
        transforms = _bare("torchvision.transforms", functional=functional)
        stand_ins = {
            "torchvision": _bare("torchvision", transforms=transforms),
            "torchvision.transforms": transforms,
            "torchvision.transforms.functional": functional,
        }
    sys.modules.update(stand_ins)
    try:
        sampling = importlib.import_module("k_diffusion.sampling")
        external = importlib.import_module("k_diffusion.external")
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return sampling, external
