"""Sfumato: a complete Stable Diffusion. Importing it is light: what is named below is loaded when it is first used."""

from importlib import import_module as _import_module

__version__ = "0.1.0"
__all__ = ["Job", "Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "__version__"]

_HOMES = {
    "Job": "sfumato.types",
    "Pipeline": "sfumato.pipeline",
    "StableDiffusionPipeline": "sfumato.diffusers_style",
    "StableDiffusionXLPipeline": "sfumato.diffusers_style",
}  # type checkers read __init__.pyi


def __getattr__(name: str) -> object:
    """What `_HOMES` names, from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
