"""Pictures -> latents in diffusion's scale, in tiles where asked; what overflows is encoded again in a wider format.

The counterpart of decoding.py. Letters: B batch, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.models import tiling
from sfumato.models.autoencoder import Posterior
from sfumato.tasks.decoding import weights_in, wider


@torch.inference_mode()
def encode(
    images: Tensor, model: Model, tile: int | None = None, draw: Callable[[tuple[int, ...]], Tensor] | None = None
) -> Tensor:
    """images (B, 3, H, W), uint8 or in [-1, 1] -> latents (B, C, h, w) float32, one picture at a time.

    The posterior's mean, or a sample of it with the noise that `draw((C, h, w))` gives. ValueError where a picture's
    latents are not finite in any number format.
    """
    rows = []
    for image in images:
        posterior = _posterior(image[None], model, tile)
        mean = posterior.mean.float()
        z = mean if draw is None else mean + posterior.std.float() * draw(tuple(mean.shape[1:])).to(mean)
        rows.append(z * model.family.latent_scale)
    return torch.cat(rows)


def _posterior(image: Tensor, model: Model, tile: int | None) -> Posterior:
    """One picture (1, 3, H, W) in the model's format, or in the first wider one whose range holds it."""
    autoencoder = model.autoencoder
    for dtype in (model.dtype, *wider(model.dtype, model.device)):

        def prepared(part: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            part = part.to(model.device)
            part = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part
            return part.to(dtype, memory_format=torch.channels_last)

        with weights_in(dtype, autoencoder.encoder, autoencoder.quant_conv):
            if tile is None:
                found = autoencoder.encode(prepared(image))
            else:
                found = tiling.encode(autoencoder, image, tile, prepare=prepared)
        if found.mean.isfinite().all() and found.logvar.isfinite().all():
            return found
    raise ValueError(f"autoencoder: the picture's latents are not finite in {model.precision}, nor in wider formats")
