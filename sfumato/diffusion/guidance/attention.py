"""Guidance by the network's own self-attention: perturbed-attention guidance and self-attention guidance.

Both add a step away from what the network says when its attention, or its input, is made worse. They need no text.
Letters: B pictures, C latent channels, n heads, L cells of an attention map, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.diffusion.guidance.classifier_free import Positive, parts_of, told_at
from sfumato.diffusion.guidance.protocol import Ask, Guidance, Moment, Reply, after, changed, skip
from sfumato.types import Answer, Cond

MIDDLE = "middle_block"
BLUR_SIGMA, BLUR_RADIUS = 1.0, 4  # cells; Hong et al. 2023 for Stable Diffusion: a kernel of 9 x 9
SALIENT = 1.0  # a cell is blurred that gets more attention than the mean cell; Hong et al. 2023


@dataclass(frozen=True)
class Perturbed:
    """Ahn et al. 2024 (PAG): what `inner` says + scale sum_i w_i (p_i - p_i with identity attention).

    `positive` is that of `inner`, whose rows begin with it; `blocks` are those of the U-Net whose self-attention is
    the identity in the extra row that each part needs.
    """

    inner: Guidance
    positive: Positive
    scale: float = 3.0
    blocks: tuple[str, ...] = (MIDDLE,)

    def rows(self, at: Moment) -> Sequence[Cond]:
        own = [changed(told_at(part.told, at), perturbed=self.blocks) for part in parts_of(self.positive)]
        return [*self.inner.rows(at), *own]

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        parts = parts_of(self.positive)
        asked, own = replies[: -len(parts)], replies[-len(parts) :]
        away = [p.weight * (plain.x0 - worse.x0) for p, plain, worse in zip(parts, asked, own, strict=False)]
        shift = self.scale * reduce(torch.add, away)
        return after(self.inner.combine(at, asked), lambda answer: replace(answer, x0=answer.x0 + shift))


@dataclass(frozen=True)
class SelfAttention:
    """Hong et al. 2023 (SAG), equation 16: what `inner` says + scale (its last row's prediction - that of a blurred x).

    The last row is the negative, or where that is not computed the positive. Its x0 is blurred where the map of
    `block` is salient, brought back to the level with its own noise, and denoised in a second question.
    """

    inner: Guidance
    scale: float = 0.75
    prediction: str = "eps"
    block: str = MIDDLE

    def rows(self, at: Moment) -> Sequence[Cond]:
        return [changed(cond, probe=self.block) for cond in self.inner.rows(at)]  # all, so that they share a call

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        base, told = replies[-1], self.inner.rows(at)[-1]
        if base.attention is None:
            raise ValueError(f"block={self.block!r}: the engine brought no attention map back")
        blurred = blur_salient(base.x0, base.attention)
        x = blurred + (at.x - base.x0)
        keep = skip(self.prediction, at.sigma)

        def finish(answer: Answer, worse: Tensor) -> Answer:
            # predictions are c_skip x - x0 each, times one factor that they share with the x0 which is sought
            shift = (keep * at.x - base.x0) - (keep * x - worse)
            return replace(answer, x0=answer.x0 - self.scale * shift)

        def ask(answer: Answer) -> Ask:
            return Ask(x, [told], lambda second: finish(answer, second[0].x0))

        return after(self.inner.combine(at, replies), ask)


def blur_salient(x0: Tensor, attention: Tensor) -> Tensor:
    """x0 (B, C, h, w), blurred where the attention map (B, n, L, L) is salient, as Hong et al. 2023 have it.

    The map's L cells are those of x0 at a coarser size; a cell's attention is what all cells give to it.
    """
    height, width = x0.shape[-2:]
    factor = math.isqrt(height * width // attention.shape[-1])
    salient = attention.mean(dim=1).sum(dim=1) > SALIENT
    mask = salient.view(-1, 1, height // factor, width // factor).to(x0)
    mask = F.interpolate(mask, size=(height, width), mode="nearest")
    return mask * gaussian_blur(x0) + (1 - mask) * x0


def gaussian_blur(x: Tensor, sigma: float = BLUR_SIGMA, radius: int = BLUR_RADIUS) -> Tensor:
    """x (B, C, h, w) blurred, reflected at its edges; sigma and radius in cells, the radius less where x is small."""
    for dim in (2, 3):
        reach = min(radius, x.shape[dim] - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
        kernel = torch.exp(-0.5 * (offsets / sigma).square())
        kernel = (kernel / kernel.sum()).view(1, 1, *((-1, 1) if dim == 2 else (1, -1))).expand(x.shape[1], -1, -1, -1)
        padded = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="reflect")
        x = F.conv2d(padded, kernel, groups=x.shape[1])
    return x
