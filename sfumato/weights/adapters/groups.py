"""The tensors of one module in an adapter file -> its changes. Knows the ends of stored names, no module, no file.

Ends are kohya's, LyCORIS', diffusers' and PEFT's. PEFT keeps its scales beside the tensors: see `Scale`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sfumato.models.deltas import BOFT, IA3, OFT, Change, Difference, DoRA, GLoRA, LoHa, LoKr, LoRA

ADAPTER = r"(?:\.[\w-]+)?"  # PEFT's name of an adapter, left out in its files
ENDS = tuple(
    (re.compile(pattern + "$"), field)
    for pattern, field in (
        (rf"\.lora_(?:down|A){ADAPTER}\.weight", "down"),
        (rf"\.lora_(?:up|B){ADAPTER}\.weight", "up"),
        (rf"\.lora_(?:up|B){ADAPTER}\.bias", "up_bias"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight", "down"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)?\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (rf"\.lora_magnitude_vector{ADAPTER}(?:\.weight)?", "magnitude"),
        *((rf"\.hada_{name}{ADAPTER}", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *((rf"\.lokr_{name}{ADAPTER}", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *((rf"\.{name}\.weight", name) for name in ("a1", "a2", "b1", "b2")),
        (r"\.oft_(?:blocks|diag)", "oft_blocks"),
        (rf"\.ia3_l{ADAPTER}", "ia3_l"),
        *((rf"\.{name}", name) for name in ("rescale", "on_input", "diff", "diff_b", "w_norm", "b_norm")),
        (r"\.weight", "weight"),  # IA3's, beside on_input
    )
)
FLAT = {"dora_scale", "magnitude", "rescale", "weight", "ia3_l", "diff", "diff_b", "up_bias", "w_norm", "b_norm"}
OF_NORMS = {"diff", "diff_b", "w_norm", "b_norm"}  # what a norm's weight, a vector, may have
LONE = {"alpha", "rescale", "on_input", "weight", "dora_scale", "magnitude", "mid"}  # no adapter by themselves

Made = list[tuple[str, Change]]  # ("weight" or "bias", change)


@dataclass(frozen=True)
class Scale:
    """What PEFT's config says of a module: alpha and r, and whether alpha is over the root of r (rsLoRA)."""

    alpha: float
    rank: int
    rooted: bool = False

    @property
    def factor(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rooted else self.rank)


def split(name: str) -> tuple[str, str] | None:
    """A stored tensor's name -> (its module's stored name, the field it is), or None where its end is unknown."""
    for pattern, field in ENDS:
        if found := pattern.search(name):
            return name[: found.start()], field
    return None


def grouped(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Stored names -> (module -> field -> name, names of no known end). A lone weight, alpha or so is no adapter."""
    groups: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for name in names:
        found = split(name)
        if found is None or found[1] in groups.get(found[0], {}):
            unknown.append(name)
        else:
            groups.setdefault(found[0], {})[found[1]] = name
    for stem, fields in list(groups.items()):
        if set(fields) <= LONE and not {"weight", "on_input"} <= set(fields):
            unknown += fields.values()
            del groups[stem]
        elif "weight" in fields and "on_input" not in fields:
            unknown.append(fields.pop("weight"))
    return groups, unknown


def changes_of(
    fields: Mapping[str, Tensor], shape: tuple[int, ...], has_bias: bool, scale: Callable[[], Scale | None]
) -> Made:
    """The changes that one module's tensors make to its weight of `shape`, and to its bias where there is one.

    ValueError says which tensor is missing or left over, or that there is no bias.
    """
    _check(fields, shape)
    left = dict(fields)
    alpha = float(left.pop("alpha").float().reshape(-1)[0]) if "alpha" in left else None
    config = None if alpha is not None else scale()
    made: Made = []
    if change := _weight_change(left, shape, alpha, config):
        made.append(("weight", change))
    if "ia3_l" in left:
        made += _peft_ia3(left.pop("ia3_l"), shape, has_bias)
    if "up_bias" in left:
        rank = fields["down"].shape[0] if "down" in fields else 1
        factor = config.factor if config else 1.0 if alpha is None else alpha / rank
        made.append(("bias", Difference(left.pop("up_bias") * factor)))
    for field, end in (("diff", "weight"), ("w_norm", "weight"), ("diff_b", "bias"), ("b_norm", "bias")):
        if field in left:
            made.append((end, Difference(left.pop(field))))
    if left or not made:
        raise ValueError(f"{' and '.join(sorted(left)) or 'alpha'}: a part is missing beside it")
    if not has_bias and any(end == "bias" for end, _ in made):
        raise ValueError("a change of its bias, which it has not")
    return made


def _check(fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """ValueError names a tensor that is none of its field in any layer."""
    for field, tensor in fields.items():
        if field in ("alpha", "on_input"):
            if tensor.numel() != 1:
                raise ValueError(f"{field}: shape {tuple(tensor.shape)}; one number is needed")
        elif tensor.numel() == 0 or tensor.ndim < (1 if field in FLAT else 2):
            raise ValueError(f"{field}: shape {tuple(tensor.shape)} is of no such tensor")
        if len(shape) < 2 and field not in OF_NORMS:
            raise ValueError(f"{field}: the module's weight has shape {shape}; a matrix or convolution is needed")


def _weight_change(
    left: dict[str, Tensor], shape: tuple[int, ...], alpha: float | None, config: Scale | None
) -> Change | None:
    """Takes out of `left` what makes one change of the weight."""
    inner: LoRA | LoHa | LoKr | None = None
    if {"up", "down"} <= left.keys():
        down = left.pop("down")
        inner = LoRA(left.pop("up"), down, _alpha(alpha, config, down.shape[0]), left.pop("mid", None))
    elif {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= left.keys():
        taken = _take(left, "hada_")
        inner = LoHa(**taken, alpha=_alpha(alpha, config, taken["w1_b"].shape[0]))
    elif any(name.startswith("lokr_") for name in left):
        inner = _lokr(_take(left, "lokr_"), alpha, config)
    elif {"a1", "a2", "b1", "b2"} <= left.keys():
        return _glora({name: left.pop(name) for name in ("a1", "a2", "b1", "b2")}, shape[1], alpha)
    elif "oft_blocks" in left:
        blocks, rescale = left.pop("oft_blocks"), left.pop("rescale", None)
        return BOFT(blocks, alpha, rescale) if blocks.ndim == 4 else OFT(blocks, alpha, rescale)
    elif {"weight", "on_input"} <= left.keys():
        return IA3(left.pop("weight").flatten(), bool(left.pop("on_input").float().reshape(-1)[0]))
    if inner is not None and "magnitude" in left:
        return DoRA(inner, left.pop("magnitude").flatten())
    if inner is not None and "dora_scale" in left:
        magnitude = left.pop("dora_scale")
        return DoRA(inner, magnitude.flatten(), magnitude.ndim < 2 or magnitude.shape[0] == shape[0])
    return inner


def _take(left: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}


def _alpha(alpha: float | None, config: Scale | None, rank: int) -> float | None:
    """Ours, whose factor is alpha over the stored rank."""
    return alpha if config is None else config.factor * rank


def _lokr(taken: dict[str, Any], alpha: float | None, config: Scale | None) -> LoKr:
    change = LoKr(**taken)
    if change.rank is not None:
        return replace(change, alpha=_alpha(alpha, config, change.rank))
    if config is not None and change.w1 is not None:  # PEFT scales two whole factors too, LyCORIS does not
        return replace(change, w1=change.w1 * config.factor)
    return change


def _glora(taken: dict[str, Any], inputs: int, alpha: float | None) -> GLoRA:
    """Older files have the two of each pair the other way round: a1 is (r, I) there."""
    a1, a2, b1, b2 = (taken[name] for name in ("a1", "a2", "b1", "b2"))
    old = a1.shape[0] != inputs or (a1.flatten(1).shape[1] == inputs and a1.shape[0] == b1.shape[0] != b2.shape[0])
    return GLoRA(a2, a1, b2, b1, alpha) if old else GLoRA(a1, a2, b1, b2, alpha)


def _peft_ia3(factor: Tensor, shape: tuple[int, ...], has_bias: bool) -> Made:
    """PEFT stores factors: (1, I) on inputs, (O, 1) or, for convolutions, (1, O, 1, 1) on outputs and their bias."""
    on_input = factor.ndim == 2 and factor.shape[0] == 1 and factor.shape[1] == shape[1]
    if factor.ndim == 4:
        on_input = factor.shape[1] != shape[0]
    scale = factor.flatten() - 1
    made: Made = [("weight", IA3(scale, on_input))]
    if has_bias and not on_input:
        made.append(("bias", IA3(scale)))
    return made
