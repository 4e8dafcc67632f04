"""FreeU: other weights for the two halves that meet in a U-Net's decoder, the backbone and the skip connections.

Si et al. 2024. Letters: B batch, C channels, h w size of a feature map, b and s the factors of backbone and skips.
"""

from __future__ import annotations

import torch
from torch import Tensor


def free_u(x: Tensor, skip: Tensor, b: float, s: float) -> tuple[Tensor, Tensor]:
    """Backbone x (B, C, h, w) and skip (B, C', h, w) of one decoder block, weighed; same shapes and dtypes.

    The form of the authors' first code, which diffusers has too: the first half of the backbone's channels times b,
    the skip's lowest frequencies, -1 and 0 each way, times s.
    """
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * b, x[:, half:]], dim=1), _scale_low(skip, s)


def _scale_low(x: Tensor, factor: float) -> Tensor:
    """x (B, C, h, w) with the frequencies -1 and 0 of both axes times factor. Fourier transforms want float32."""
    spectrum = torch.fft.fft2(x.float())
    gain = torch.ones(x.shape[-2:], device=x.device)
    for row in (0, -1):
        for column in (0, -1):
            gain[row, column] = factor
    return torch.fft.ifft2(spectrum * gain).real.to(x.dtype)
