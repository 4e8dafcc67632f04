"""Where words look: the attentions of the positive prompt, gathered while a picture is drawn, as maps of heat.

"What the DAAM" (Tang et al. 2022). Whoever looks changes nothing in the answer; sums are kept, never single maps.
Letters: B pictures, L tokens, h w latent size, h_i w_i the size of the feature map that an attention works on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.diffusion.guidance.protocol import Ask, Guidance, Moment, Reply, changed
from sfumato.types import Answer, Cond

See = Callable[[Moment, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class Looking:
    """What `inner` says; `see` is given the attentions of its row `row`, (B, L, h_i, w_i) each, at every moment.

    Row 0 is the (first part of the) positive. The row goes into a network call of its own: alone it is answered as
    without looking, to the bit; where it shared a call the batch is another, and rounding may differ (about 1e-6).
    """

    inner: Guidance
    see: See
    row: int = 0

    def rows(self, at: Moment) -> Sequence[Cond]:
        rows = list(self.inner.rows(at))
        rows[self.row] = changed(rows[self.row], cross=True)
        return rows

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        maps = replies[self.row].cross
        if not maps:
            raise ValueError(f"row={self.row}: no maps came back, the network has no attention to a text")
        self.see(at, maps)
        return self.inner.combine(at, replies)


def heat(maps: Sequence[Tensor], places: Sequence[int], size: tuple[int, int]) -> Tensor:
    """How much a word's tokens at `places` in [0, L) are looked at: maps (B, L, h_i, w_i) -> (B, h, w) in [0, 1].

    Tang et al. 2022, section 2.2: all maps at one size, the mean over them of the sum over the tokens, of maximum 1 in
    each picture. ValueError where there is no map or no place, or a place is beyond the tokens.
    """
    if not maps:
        raise ValueError("maps=(): one map or more are needed")
    length = maps[0].shape[1]
    if not places or not all(0 <= place < length for place in places):
        raise ValueError(f"places={list(places)}: one or more from 0 to {length - 1} are needed")
    found = torch.stack([_resized(look[:, list(places)].sum(dim=1, keepdim=True), size) for look in maps]).mean(dim=0)
    return (found / found.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny))[:, 0]


def _resized(look: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, L, h_i, w_i) -> (B, L, h, w)."""
    return F.interpolate(look.float(), size=size, mode="bilinear", align_corners=False)


class Looker:
    """The sum of all attentions seen, over layers and steps, at latent size: what `Looking` calls.

    `size` (h, w) is the whole picture's; what tiles see goes where they lie. A picture of 64 x 64 cells and 77 tokens
    takes 1.3 MB.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._sum: Tensor | None = None
        self._seen = torch.zeros(size)  # how often each cell

    def __call__(self, at: Moment, maps: tuple[Tensor, ...]) -> None:
        """Add the mean over layers of maps (B, L, h_i, w_i). A longer prompt later on has further tokens."""
        top, left, height, width = at.window or (0, 0, *self.size)
        batch, length = maps[0].shape[:2]
        mean = torch.zeros(batch, length, height, width, device=maps[0].device)
        for look in maps:
            mean += _resized(look, (height, width)) / len(maps)
        held = mean.new_zeros(batch, length, *self.size) if self._sum is None else self._sum
        self._sum = F.pad(held, (0, 0, 0, 0, 0, max(0, length - held.shape[1])))
        rows = torch.arange(top, top + height) % self.size[0]
        columns = torch.arange(left, left + width) % self.size[1]
        self._sum[:, :length, rows[:, None], columns] += mean
        self._seen[rows[:, None], columns] += 1

    def heat(self, places: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """The function `heat` of all that was seen; (B, h, w) at the latent size, or another `size`.

        ValueError where nothing was seen yet, and as in `heat`.
        """
        if self._sum is None:
            raise ValueError("looker: nothing was seen yet, no picture has been drawn")
        mean = self._sum / self._seen.clamp(min=1).to(self._sum.device)
        return heat([mean], places, size or self.size)
