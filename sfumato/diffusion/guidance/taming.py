"""What tames a large guidance scale: rescaling, dynamic thresholding, and the range of a smaller scale.

Each works on another plan's answer, picture by picture. Letters: B pictures, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.diffusion.guidance.protocol import Ask, Guidance, Moment, Reply, after, skip
from sfumato.types import Answer, Cond


@dataclass(frozen=True)
class Rescaled:
    """Lin et al. 2023, equations 15 and 16: the guided prediction gets phi of the way to the plain one's deviation.

    It is the network's prediction (noise or v) that is rescaled, as in the paper and in diffusers. In sigma space that
    is in proportion to c_skip x - x0, and what it is multiplied by drops out of the ratio of deviations.
    """

    inner: Guidance
    phi: float
    prediction: str

    def rows(self, at: Moment) -> Sequence[Cond]:
        return self.inner.rows(at)

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        def change(answer: Answer) -> Answer:
            if answer.cond is None or answer.cond is answer.x0:  # guidance is off
                return answer
            kept = skip(self.prediction, at.sigma) * at.x
            guided = kept - answer.x0
            ratio = _deviation(kept - answer.cond) / _deviation(guided)
            return replace(answer, x0=kept - (self.phi * ratio + 1 - self.phi) * guided)

        return after(self.inner.combine(at, replies), change)


def _deviation(x: Tensor) -> Tensor:
    """Each picture's own: (B, C, h, w) -> (B, 1, 1, 1)."""
    return x.std(dim=(1, 2, 3), keepdim=True)


@dataclass(frozen=True)
class Thresholded:
    """Dynamic thresholding, Saharia et al. 2022, section 2.3: x0 is clipped to [-s, s] and divided by s.

    s is the percentile of a picture's |x0|, `limit` at least; x0 ends in [-limit, limit]. The paper's limit is 1, for
    pixels; latents reach further, about 4 deviations.
    """

    inner: Guidance
    percentile: float = 0.995
    limit: float = 1.0

    def rows(self, at: Moment) -> Sequence[Cond]:
        return self.inner.rows(at)

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        def change(answer: Answer) -> Answer:
            reach = answer.x0.abs().flatten(1).quantile(self.percentile, dim=1)[:, None, None, None]
            s = reach.clamp(min=self.limit)
            return replace(answer, x0=answer.x0.clamp(-s, s) * (self.limit / s))

        return after(self.inner.combine(at, replies), change)


@dataclass(frozen=True)
class Mimicked:
    """Dynamic thresholding for latents (mcmonkey's sd-dynamic-thresholding at its defaults): the range of a smaller
    scale, `mimic`, for what a larger one says.

    In each channel of each picture deviations from the channel's mean are clipped where the percentile of their sizes
    is, if that is beyond the greatest one at the mimicked scale, and then shrunk to that.
    """

    inner: Guidance
    mimic: float = 7.0
    percentile: float = 1.0

    def rows(self, at: Moment) -> Sequence[Cond]:
        return self.inner.rows(at)

    def combine(self, at: Moment, replies: Sequence[Reply]) -> Answer | Ask:
        def change(answer: Answer) -> Answer:
            if answer.uncond is None or answer.cond is None:
                return answer
            mean, guided = _centred(answer.x0)
            _, meek = _centred(torch.lerp(answer.uncond, answer.cond, self.mimic))
            wanted = meek.abs().amax(dim=(2, 3), keepdim=True)
            reach = guided.abs().flatten(2).quantile(self.percentile, dim=2)[..., None, None]
            bound = torch.maximum(wanted, reach)
            return replace(answer, x0=mean + guided.clamp(-bound, bound) * (wanted / bound))

        return after(self.inner.combine(at, replies), change)


def _centred(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean (B, C, 1, 1), and what is beyond it."""
    mean = x0.mean(dim=(2, 3), keepdim=True)
    return mean, x0 - mean
