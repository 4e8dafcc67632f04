"""An adapter that is read: which parameters it changes and how, and what is to be said about it. Data, no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from sfumato.models.deltas import Change, Difference, DoRA, LoRA, Rows, tensors_in

Key = tuple[str, str]  # (part, parameter name): the part as in `family.parts`
Changes = Mapping[Key, tuple[Change, ...]]


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one file changes; `changes` of a parameter are to be made in their order.

    A key counted in `matched` and `total` is one module's name with all its tensors. `unmatched` names what is not
    used: modules, and single tensors of no known meaning. `hash` is the file's SHA-256.
    """

    name: str
    hash: str
    changes: Changes
    matched: int
    total: int
    unmatched: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Words for the kinds of its changes, such as ("LoRA", "norm")."""
        found = {_word(key[1], change): None for key, changes in self.changes.items() for change in changes}
        if "LoCon" in found:  # LoRA on large kernels too
            found.pop("LoRA", None)
        return tuple(found)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank in it, rising; empty where its kinds have none."""
        found = {getattr(change, "rank", None) for changes in self.changes.values() for change in changes}
        return tuple(sorted(rank for rank in found if rank is not None))

    @property
    def rank(self) -> int | None:
        """The rank, where there is just one."""
        return self.ranks[0] if len(self.ranks) == 1 else None

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that it changes."""
        return tuple(dict.fromkeys(part for part, _ in self.changes))

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        return sum(t.numel() * t.element_size() for t in tensors_of_changes(self.changes.values()))

    def describe(self) -> str:
        """One line for people: kinds, rank, how many of its keys are used, and which are not."""
        ranks = self.ranks
        rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
        text = f"lora {self.name}: {' and '.join(self.kinds)}{rank}, {self.matched} of {self.total} keys matched"
        if not self.unmatched:
            return text
        shown = ", ".join(self.unmatched[:3])
        more = f" and {len(self.unmatched) - 3} more" if len(self.unmatched) > 3 else ""
        return f"{text}; not used: {shown}{more}"


def tensors_of_changes(changes: Iterable[tuple[Change, ...]]) -> list[Tensor]:
    """Every tensor in them."""
    return [tensor for each in changes for change in each for tensor in tensors_in(change)]


def _word(parameter: str, change: Change) -> str:
    if isinstance(change, DoRA):
        return "DoRA"
    if isinstance(change, Rows):
        return _word(parameter, change.inner)
    if isinstance(change, Difference):
        return "bias" if parameter.endswith(".bias") else "full difference"
    if isinstance(change, LoRA) and (
        change.mid is not None or (change.down[0].ndim > 1 and change.down[0, 0].numel() > 1)
    ):
        return "LoCon"
    return type(change).__name__
