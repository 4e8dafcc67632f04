"""The contract between mathematics and networks: a denoiser maps (x, sigma, cond) to x0.

It wraps any network `(x_in, t, cond) -> prediction` with the parameterisation that the network was trained in, and
owns the training target of that same parameterisation, so that training and sampling cannot drift apart.
Letters: x = x0 + sigma noise; Karras et al. 2022 equation 7 gives c_in, c_skip and c_out their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sfumato.diffusion.schedule import NoiseSchedule

PREDICTIONS = ("eps", "v", "sample")  # the noise, v, x0 itself; "sample" is diffusers' word
C = TypeVar("C")


def _column(values: list[float] | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=like.device)[:, None, None, None]


class Denoiser(Generic[C]):
    """`network(x_in (B, C, h, w), t (B,), cond) -> (B, C, h, w)`, a prediction of the noise, of v or of x0."""

    def __init__(
        self, network: Callable[[Tensor, Tensor, C], Tensor], schedule: NoiseSchedule, prediction: str
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction={prediction!r}: one of {', '.join(PREDICTIONS)}")
        self.network = network
        self.schedule = schedule
        self.prediction = prediction

    def __call__(self, x: Tensor, sigma: list[float], cond: C) -> Tensor:
        """x (B, C, h, w) float32 with noise of sigma[i] > 0 in row i -> its expected x0, same shape, float32."""
        t = torch.tensor([self.schedule.timestep(s) for s in sigma], dtype=torch.float32, device=x.device)
        column = _column(sigma, x)
        c_in = (1 + column.square()).rsqrt()  # x in variance-preserving scale, what the networks are trained on
        return self._x0(x, column, self.network(x * c_in, t, cond).float())

    def _x0(self, x: Tensor, sigma: Tensor, out: Tensor) -> Tensor:
        if self.prediction == "sample":
            return out
        if self.prediction == "eps":
            return x - sigma * out
        # Salimans & Ho 2022, appendix D: x0 = alpha z - sigma_vp v with alpha = c_in and z = c_in x.
        return (x / (1 + sigma.square())) - out * sigma * (1 + sigma.square()).rsqrt()

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer for x = x0 + sigma noise; sigma (B,)."""
        if self.prediction == "sample":
            return x0
        if self.prediction == "eps":
            return noise
        column = _column(sigma, x0)
        return (noise - column * x0) * (1 + column.square()).rsqrt()  # v = alpha noise - sigma_vp x0

    def loss(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        cond: C,
        min_snr_gamma: float | None = None,
        shown_noise: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the prediction, each picture's mean (B,), at integer timesteps t (B,).

        `min_snr_gamma` weighs timesteps as Hang et al. 2023, equation 6 and its forms for v and x0; None leaves them
        equal. The network is shown `shown_noise` where given, and still asked for `noise` (Ning et al. 2023).
        """
        x, sigma = self.schedule.add_noise(x0, noise if shown_noise is None else shown_noise, t)
        out = self.network(x * (1 + _column(sigma, x).square()).rsqrt(), t, cond).float()
        error = (out - self.target(x0, noise, sigma)).square().mean(dim=(1, 2, 3))
        if min_snr_gamma is None:
            return error
        snr = sigma.pow(-2)
        own = {"eps": snr, "v": snr + 1, "sample": torch.ones_like(snr)}[self.prediction]  # error = own * that of x0
        return error * snr.clamp(max=min_snr_gamma) / own
