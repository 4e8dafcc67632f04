"""Reuse of what a U-Net's deep part made one call earlier: steps lie near one another, and deep features change little.

Ma et al. 2024 (DeepCache). Knows no steps and no rows: who calls the U-Net says what is kept and what is given.
Letters: n input blocks, and as many output blocks; d the depth: the first d input blocks and the last d output blocks
are the shallow part, all between them the deep part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


def reuse_of(text: str) -> tuple[int, int]:
    """(every, depth) of "N" or "N:DEPTH": the deep part is computed in every N-th call; a depth left out is 1.

    ValueError where it is neither, N is below 2, or the depth below 1.
    """
    every, colon, depth = text.partition(":")
    try:
        found = int(every), int(depth) if colon else 1
    except ValueError:
        found = 0, 0
    if found[0] < 2 or found[1] < 1:
        raise ValueError(f"reuse={text!r}: N or N:DEPTH is needed, N 2 or more and DEPTH 1 or more, such as 3 or 2:2")
    return found


@dataclass
class Deep:
    """What one call does with the deep part. In `kept`, by depth, is then what each depth in `wanted` hands upwards.

    With `given`, what the deep part below depth `depth` handed upwards in an earlier call, (B, C_d, h_d, w_d), it is
    not computed. As it is, nothing is kept or given.
    """

    wanted: frozenset[int] = frozenset()
    depth: int | None = None
    given: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def shallow(self, num_blocks: int) -> int:
        """How many input blocks, and output blocks, are computed; ValueError where a depth leaves no deep part."""
        for depth in (*self.wanted, *(() if self.depth is None else (self.depth,))):
            if not 1 <= depth < num_blocks:
                raise ValueError(f"reuse: a depth of {depth}; this U-Net has depths 1 to {num_blocks - 1}")
        return num_blocks if self.depth is None else self.depth

    def up(self, depth: int, x: Tensor) -> Tensor:
        """x on its way up, before the output block that is `depth`-th from the end: kept, or replaced."""
        if self.given is not None and depth == self.depth:
            return self.given
        if depth in self.wanted:
            self.kept[depth] = x
        return x
