"""Formulas that several samplers share: ancestral steps, churn, exponential integrators, interpolating weights.

Letters: x = x0 + sigma noise; lambda = -log sigma, half the log signal-to-noise ratio; h a step in lambda; d = (x - x0)
/ sigma, the slope dx/dsigma and the predicted noise (Karras et al. 2022, eq. 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from sfumato.diffusion.noise import Noise


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step to noise `down`, then add noise of level `up`, and x has level sigma_next.

    With eta = 1 the posterior of the forward process (Ho et al. 2020), eta = 0 adds nothing; between, the interpolation
    of Song et al. 2021 (DDIM), equation 16, written in sigmas.
    """
    if sigma_next == 0:
        return 0.0, 0.0
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def churn(
    x: Tensor, sigma: float, gamma: float, noise: Noise, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Tensor, float]:
    """Karras et al. 2022, algorithm 2, lines 4 to 6: raise sigma to (1 + gamma) sigma by fresh noise.

    Nothing is done outside s_tmin <= sigma <= s_tmax; the noise is drawn all the same, as k-diffusion does, so that
    the range does not shift the later draws of a seed.
    """
    if gamma == 0:
        return x, sigma
    fresh = noise()
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    raised = sigma * (1 + gamma)
    return x + s_noise * math.sqrt(raised**2 - sigma**2) * fresh, raised


def churn_gamma(s_churn: float, num_steps: int) -> float:
    """Karras et al. 2022, algorithm 2, line 3: gamma = min(S_churn / n, sqrt 2 - 1)."""
    return min(s_churn / num_steps, math.sqrt(2) - 1)


def lowest(sigmas: Sequence[float]) -> float:
    """The smallest level above 0."""
    return min(sigma for sigma in sigmas if sigma > 0)


def phi(k: int, z: float) -> float:
    """phi_1(z) = (e^z - 1) / z and phi_(k+1)(z) = (phi_k(z) - 1 / k!) / z (Hochbruck & Ostermann 2010, eq. 2.10)."""
    if abs(z) < 1e-3:  # the recurrence loses all its digits there; the series needs few terms
        return sum(z**j / math.factorial(j + k) for j in range(6))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(48)


def lagrange_integrals(
    knots: Sequence[float], start: float, end: float, density: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[float]:
    """For each knot j, the integral from start to end of density(u) L_j(u), L_j Lagrange's polynomial of the knots.

    These are the weights of every Adams method: the slope is interpolated through its past values and integrated.
    """
    roots, masses = _gauss_legendre()
    u = (start + end) / 2 + (end - start) / 2 * roots
    masses = masses * (end - start) / 2 * (1.0 if density is None else density(u))
    weights = []
    for j, knot in enumerate(knots):
        basis = np.ones_like(u)
        for k, other in enumerate(knots):
            if k != j:
                basis = basis * (u - other) / (knot - other)
        weights.append(float((masses * basis).sum()))
    return weights


def weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of weights[i] tensors[i]; one or more are needed."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total
