"""Final latents -> pictures: unscaled, a few at a time, in tiles where asked; what overflows is decoded again.

Half precision may overflow in a decoder: then that one picture is decoded in a wider number format, so that nobody gets
a black picture. Weights are widened for that decode alone. On a CPU the other networks' pages make way for a large
decode. Letters: B batch, H W pixels, h w latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.images import to_uint8
from sfumato.memory.estimate import LARGE, Kernels, decoder_bytes
from sfumato.memory.pages import hand_back
from sfumato.models import tiling
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.inference import Store

log = logging.getLogger(__name__)


@torch.inference_mode()
def decode(latents: Tensor, last_sigma: float, model: Model, max_pictures: int = 4, tile: int | None = None) -> Tensor:
    """Final x (B, C, h, w) at `last_sigma` -> images (B, 3, H, W) float32 about [-1, 1], `max_pictures` at a time.

    A schedule that ends above 0 ends in variance-preserving scale, as the original DDIM does. `tile` is in pixels,
    None decodes whole. ValueError where latents are not finite, or a picture is not in float32 either.
    """
    _check_finite(latents, model.dtype)
    z = latents.float() * (1 + last_sigma**2) ** -0.5 / model.family.latent_scale
    factor = model.autoencoder.config.factor
    images = z.new_empty(len(z), model.autoencoder.config.image_channels, z.shape[2] * factor, z.shape[3] * factor)
    with _room_for(z[:max_pictures], model, tile):
        for start in range(0, len(z), max_pictures):
            part = z[start : start + max_pictures]
            decoded = _decode(model.autoencoder, part, model.dtype, tile)
            for index in (~finite(decoded)).nonzero().flatten().tolist():
                decoded[index] = _decode_wider(model, part[index : index + 1], start + index, tile)[0]
            images[start : start + max_pictures] = decoded
    return images


@torch.inference_mode()
def decode_pixels(
    latents: Tensor, last_sigma: float, model: Model, max_pictures: int = 4, tile: int | None = None
) -> np.ndarray:
    """What `decode` gives as pictures (B, H, W, 3) uint8; in tiles, never a whole one of them in floats."""
    if tile is None:
        return to_uint8(decode(latents, last_sigma, model, max_pictures))
    _check_finite(latents, model.dtype)
    z = latents.float() * (1 + last_sigma**2) ** -0.5 / model.family.latent_scale
    factor = model.autoencoder.config.factor
    pictures = np.empty((len(z), z.shape[2] * factor, z.shape[3] * factor, 3), dtype=np.uint8)
    with _room_for(z[:1], model, tile):
        for index in range(len(z)):
            part, top = z[index : index + 1].to(model.dtype, memory_format=torch.channels_last), 0
            for band in tiling.decode_bands(model.autoencoder, part, tile):
                if not band.isfinite().all():  # in a wider format all of it, so that it is of one make
                    pictures[index] = to_uint8(_decode_wider(model, z[index : index + 1], index, tile))[0]
                    break
                pictures[index, top : top + band.shape[2]] = to_uint8(band)[0]
                top += band.shape[2]
    return pictures


@contextmanager
def _room_for(z: Tensor, model: Model, tile: int | None) -> Iterator[None]:
    """Inside, what other networks have in memory and can have again is gone, where z (B, C, h, w) takes much of it.

    Weights that are as in their file, and what hastened layers work with; after it the decoder's working memory goes
    too. On a CPU alone, where all networks share one memory.
    """
    config = model.autoencoder.config
    cells = [side if tile is None else min(side, tile // config.factor) for side in z.shape[2:]]
    kernels = Kernels(model.device)
    cpu = model.device.type == "cpu"
    if not cpu or decoder_bytes(config, cells[0], cells[1], len(z), model.dtype, kernels) < LARGE:
        yield
        return
    others = [network for network in model.networks.values() if network is not model.autoencoder]
    hand_back(others)
    for store in _stores(*others):
        store.empty()
    try:
        yield
    finally:
        for store in _stores(model.autoencoder):
            store.empty()


def _stores(*networks: nn.Module) -> set[Store]:
    """What hastened layers of the networks work in."""
    rooms = (getattr(module, "room", None) for network in networks for module in network.modules())
    return {room for room in rooms if isinstance(room, Store)}


def finite(x: Tensor) -> Tensor:
    """Which pictures of x (B, ...) hold only finite numbers: (B,) bool."""
    return x.isfinite().flatten(1).all(dim=1)


def _check_finite(latents: Tensor, dtype: torch.dtype) -> None:
    bad = (~finite(latents)).nonzero().flatten().tolist()
    if bad:
        places = ", ".join(str(index + 1) for index in bad)
        advice = "" if dtype == torch.float32 else f" in {_name(dtype)}; precision 'full' may mend it"
        raise ValueError(
            f"latents: picture {places} of {len(latents)} is not finite before decoding: the U-Net overflowed{advice}"
        )


def _decode(autoencoder: Autoencoder, z: Tensor, dtype: torch.dtype, tile: int | None) -> Tensor:
    z = z.to(dtype, memory_format=torch.channels_last)
    return (autoencoder.decode(z) if tile is None else tiling.decode(autoencoder, z, tile)).float()


def _decode_wider(model: Model, z: Tensor, index: int, tile: int | None) -> Tensor:
    """One picture, z (1, C, h, w), in the first wider format whose range holds it."""
    own, tried = model.dtype, [_name(model.dtype)]
    for dtype in wider(own, z.device):
        with weights_in(dtype, model.autoencoder.post_quant_conv, model.autoencoder.decoder):
            images = _decode(model.autoencoder, z, dtype, tile)
        tried.append(_name(dtype))
        if images.isfinite().all():
            log.info("picture %d overflowed when decoded in %s; decoded again in %s", index + 1, tried[0], tried[-1])
            return images
    advice = "" if own == torch.float32 else "; precision 'full' may mend it"
    raise ValueError(
        f"autoencoder: picture {index + 1}, decoded in {', '.join(tried)}, is not finite though its latents are{advice}"
    )


def wider(dtype: torch.dtype, device: torch.device) -> list[torch.dtype]:
    """Formats of a wider range than `dtype`, or of a finer grid, to try in order on `device`."""
    steps = {torch.float16: [torch.bfloat16, torch.float32], torch.bfloat16: [torch.float32]}.get(dtype, [])
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [step for step in steps if step != torch.bfloat16]
    return steps


@contextmanager
def weights_in(dtype: torch.dtype, *networks: nn.Module) -> Iterator[None]:
    """Inside, the networks' weights are copies in `dtype`; after, they are what they were, to the last bit."""
    every = [parameter for network in networks for parameter in network.parameters()]
    kept = [(parameter, parameter.data) for parameter in every if parameter.dtype != dtype]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for parameter, before in kept:
                parameter.data = before.to(dtype)
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for parameter, before in kept:
                parameter.data = before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
