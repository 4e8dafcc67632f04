"""One map from every spelling of a module's name in adapter files to (part, our module's name).

Kohya's (flat, of the original's or diffusers' modules), diffusers' and PEFT's (dotted), LyCORIS', ComfyUI's and plain
paths differ in a prefix and in dots or underscores alone, so names are compared flat. Parts are those of
`family.text_parts`, and "unet". Knows no file and no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from sfumato.families import Family
from sfumato.weights.layouts.diffusers_names import unet_keys
from sfumato.weights.layouts.original_names import text_table
from sfumato.weights.layouts.tables import THIRDS
from sfumato.weights.parts import shapes_of

# Around a whole name, taken off one after another: PEFT's and LyCORIS' own.
WRAPPERS = ("base_model_model_", "lycoris_")
# Before a network's module, flat; the number is the text encoder's. ComfyUI writes the last of each kind.
UNET_PREFIXES = ("lora_unet_", "unet_", "model_diffusion_model_", "diffusion_model_")
TEXT_PREFIXES = {
    "lora_te1_": 0, "lora_te2_": 1, "lora_te_": 0, "text_encoder_2_": 1, "text_encoder_": 0,
    "cond_stage_model_transformer_": 0, "cond_stage_model_model_": 0,
    "conditioner_embedders_0_transformer_": 0, "conditioner_embedders_0_model_": 0, "conditioner_embedders_1_model_": 1,
    "text_encoders_clip_l_transformer_": 0, "text_encoders_clip_g_transformer_": 1,
    "clip_l_transformer_": 0, "clip_g_transformer_": 1, "te1_": 0, "te2_": 1, "te_": 0,
}  # fmt: skip
# Diffusers before 0.21 kept LoRAs in attention processors.
PROCESSOR = re.compile(r"_processor_(to_q|to_k|to_v|to_out)$")


@dataclass(frozen=True)
class Target:
    """A module of ours: its part, its name, and which third of a stacked q, k and v it is where the name means all."""

    part: str
    module: str
    third: int | None = None

    def parameter(self, end: str) -> tuple[str, str]:
        """(part, parameter name) of its "weight" or "bias"."""
        return self.part, f"{self.module}.{end}"


Targets = tuple[Target, ...]  # the modules that one name stands for: one, or q, k and v


def find(stem: str, family: Family) -> tuple[Targets, ...]:
    """What a stored module name may mean in the family, likeliest first; empty where it means nothing.

    More than one only where a bare path is in several networks, such as both text encoders of XL.
    """
    flat = PROCESSOR.sub(r"_\1", _flat(stem))
    tables = module_tables(family)
    while wrapper := next((each for each in WRAPPERS if flat.startswith(each)), None):
        flat = flat.removeprefix(wrapper)
    for part, prefix in _prefixes(family):
        if flat.startswith(prefix):
            found = tables[part].get(flat.removeprefix(prefix))
            if found:
                return (found,)
    return tuple(table[flat] for table in tables.values() if flat in table)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _prefixes(family: Family) -> Iterator[tuple[str, str]]:
    """(part, prefix); where there is one text encoder, every number means it, as in XL's refiner."""
    for prefix in UNET_PREFIXES:
        yield "unet", prefix
    for prefix, number in TEXT_PREFIXES.items():
        yield family.text_parts[min(number, len(family.texts) - 1)], prefix


@lru_cache(maxsize=32)
def module_tables(family: Family) -> Mapping[str, Mapping[str, Targets]]:
    """For each part, every flat name of each of its modules."""
    tables: dict[str, Mapping[str, Targets]] = {"unet": MappingProxyType(_unet_names(family))}
    for number, part in enumerate(family.text_parts):
        tables[part] = MappingProxyType(_text_names(family, number, part))
    return MappingProxyType(tables)


def _modules(names: Iterable[str]) -> dict[str, str]:
    """Modules with parameters of their own -> one of their parameters."""
    return {name.rpartition(".")[0]: name for name in names}


def _unet_names(family: Family) -> dict[str, Targets]:
    table: dict[str, Targets] = {}
    theirs = unet_keys(family.unet)
    for module, parameter in _modules(shapes_of(family)["unet"]).items():
        target = (Target("unet", module),)
        for name in (module, theirs[parameter].name.rpartition(".")[0]):
            table[_flat(name)] = target
            if name.endswith(".to_out.0"):
                table[_flat(name.removesuffix(".0"))] = target
    return table


def _text_names(family: Family, number: int, part: str) -> dict[str, Targets]:
    tower = family.texts[number]
    shapes = shapes_of(family)[part]
    table: dict[str, Targets] = {}
    for module in _modules(shapes):
        target = (Target(part, module),)
        table[_flat(module)] = target
        table[_flat(module.removeprefix("text_model."))] = target  # as in transformers 5
    if not tower.openclip:
        return table
    stacked: dict[str, list[Target]] = {}
    for name, place in text_table(tower, shapes).items():
        module = name.rpartition(".")[0]
        theirs = re.sub(r"[._](weight|bias)$", "", place.name.removeprefix(tower.prefix))
        if place.change in THIRDS:
            if name.endswith(".weight"):
                stacked.setdefault(theirs, []).append(Target(part, module, THIRDS.index(place.change)))
        else:
            _add_openclip(table, theirs, (Target(part, module),))
    for theirs, targets in stacked.items():
        _add_openclip(table, theirs, tuple(sorted(targets, key=lambda target: target.third or 0)))
    return table


def _add_openclip(table: dict[str, Targets], name: str, targets: Targets) -> None:
    """With and without the "model." that A1111 has before it."""
    for spelt in (name, f"model.{name}"):
        table.setdefault(_flat(spelt), targets)


@lru_cache(maxsize=32)
def diffusers_modules(family: Family) -> Mapping[tuple[str, str], str]:
    """(part, our module) -> diffusers' dotted path of it, its network's name in a pipeline before it."""
    table = {}
    theirs = unet_keys(family.unet)
    for module, parameter in _modules(shapes_of(family)["unet"]).items():
        table["unet", module] = f"unet.{theirs[parameter].name.rpartition('.')[0]}"
    for number, part in enumerate(family.text_parts):
        prefix = "text_encoder." if number == 0 else f"text_encoder_{number + 1}."
        table |= {(part, module): prefix + module for module in _modules(shapes_of(family)[part])}
    return MappingProxyType(table)


def kohya_modules(family: Family) -> Mapping[tuple[str, str], str]:
    """(part, our module) -> kohya's flat name: diffusers' modules for SD 1 and 2, the original's for XL."""
    table = {}
    xl = family.unet.vector_dim is not None
    for (part, module), path in diffusers_modules(family).items():
        inner = module if part != "unet" or xl else path.removeprefix("unet.")
        number = str(family.text_parts.index(part) + 1) if part != "unet" and xl else ""
        table[part, module] = f"lora_{'unet' if part == 'unet' else f'te{number}'}_{_flat(inner)}"
    return MappingProxyType(table)
