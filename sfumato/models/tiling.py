"""Decoding and encoding a large picture in overlapping tiles, blended, so that memory does not grow with the picture.

Tiles of one size are spread evenly; where they overlap each fades out as its neighbour fades in. A tile has group norm
statistics and an attention of its own, so its colours may differ a little from those of the whole picture's decode.
Where the network is `wrapped`, tiles overlap across the meeting edges too. Knows nothing of files or devices.
Letters: B batch, H W pixels, h w latent size, f = H/h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sfumato.models.autoencoder import Autoencoder, Posterior
from sfumato.models.layers import pad, wrapped


def decode(autoencoder: Autoencoder, z: Tensor, tile: int, overlap: int | None = None) -> Tensor:
    """What `autoencoder.decode(z)` gives, in tiles of `tile` pixels; z (B, z, h, w) -> images (B, 3, h f, w f).

    `overlap` pixels at least (None: about a quarter of the tile) are shared by neighbours. ValueError where a number
    is no multiple of the factor or out of range. A picture no larger than a tile is decoded whole, bit for bit.
    """
    factor = autoencoder.config.factor
    cells, shared = _in_cells(tile, overlap, factor)
    if max(z.shape[-2:]) <= cells:
        return autoencoder.decode(z)
    return _blend_wrapped(autoencoder, autoencoder.decode, z, cells, shared, factor, 1)


def decode_bands(autoencoder: Autoencoder, z: Tensor, tile: int, overlap: int | None = None) -> Iterator[Tensor]:
    """What `decode` gives, from top to bottom in bands of rows, so that the whole is never there in floats.

    Where the network is wrapped, or the picture is no larger than a tile, it is one band.
    """
    factor = autoencoder.config.factor
    cells, shared = _in_cells(tile, overlap, factor)
    if max(z.shape[-2:]) <= cells or any(autoencoder.quant_conv.wrap):
        yield decode(autoencoder, z, tile, overlap)
        return
    yield from _bands(autoencoder.decode, z, cells, shared, factor, 1)


def encode(
    autoencoder: Autoencoder,
    images: Tensor,
    tile: int,
    overlap: int | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda part: part,
) -> Posterior:
    """What `autoencoder.encode(prepare(images))` gives, in tiles of `tile` pixels; arguments and errors as in `decode`.

    `prepare` is done to each tile, so that images may stay in another number format.
    """
    factor = autoencoder.config.factor
    cells, shared = _in_cells(tile, overlap, factor)
    if max(images.shape[-2:]) <= tile:
        return autoencoder.encode(prepare(images))

    def moments(part: Tensor) -> Tensor:
        posterior = autoencoder.encode(prepare(part))
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    mean, logvar = _blend_wrapped(autoencoder, moments, images, cells, shared, 1, factor).chunk(2, dim=1)
    return Posterior(mean, logvar)


def _in_cells(tile: int, overlap: int | None, factor: int) -> tuple[int, int]:
    """Tile and overlap in latent cells."""
    if tile < 2 * factor or tile % factor:
        raise ValueError(f"tile={tile}: a multiple of {factor} from {2 * factor} on is needed")
    if overlap is None:
        return tile // factor, max(1, tile // factor // 4)
    if overlap % factor or not factor <= overlap <= tile // 2:
        raise ValueError(f"overlap={overlap}: a multiple of {factor} from {factor} to {tile // 2} is needed")
    return tile // factor, overlap // factor


def _blend_wrapped(
    autoencoder: Autoencoder,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    cells: int,
    overlap: int,
    grow: int,
    shrink: int,
) -> Tensor:
    """`_blend`, and across the edges that meet where the network is wrapped; a tile itself never wraps there.

    In such a direction x gets its last cells once more in front, and the result's two versions of them are blended.
    """
    wrap = autoencoder.quant_conv.wrap
    across, down = (on and x.shape[-dim] // shrink > cells for on, dim in zip(wrap, (1, 2), strict=True))
    if not (across or down):
        return _blend(function, x, cells, overlap, grow, shrink)
    x = pad(x, (across * overlap * shrink, 0, down * overlap * shrink, 0), (across, down))
    with wrapped(autoencoder, (wrap[0] and not across, wrap[1] and not down)):
        result = _blend(function, x, cells, overlap, grow, shrink)
    for dim in [3] * across + [2] * down:
        result = _closed(result, dim, overlap * grow)
    return result


def _closed(x: Tensor, dim: int, length: int) -> Tensor:
    """x whose first and last `length` places along `dim` are the same ones: without the first, faded into the last."""
    size = x.shape[dim]
    head, tail = x.narrow(dim, 0, length), x.narrow(dim, size - length, length)
    rise = _fade((torch.arange(length, device=x.device) + 0.5) / length).to(x.dtype)
    shape = [-1 if axis == dim else 1 for axis in range(x.ndim)]
    middle = x.narrow(dim, length, size - 2 * length)
    return torch.cat([middle, torch.lerp(tail, head, rise.view(shape))], dim=dim)


def _blend(function: Callable[[Tensor], Tensor], x: Tensor, cells: int, overlap: int, grow: int, shrink: int) -> Tensor:
    """`function` of each tile of x, blended. One latent cell is `shrink` positions of x and `grow` of the result."""
    result: Tensor | None = None
    top = 0
    for band in _bands(function, x, cells, overlap, grow, shrink):
        if result is None:
            result = band.new_empty(*band.shape[:2], x.shape[-2] // shrink * grow, band.shape[3])
        result[..., top : top + band.shape[2], :] = band
        top += band.shape[2]
    assert result is not None, "there is one band at least"
    return result


def _bands(
    function: Callable[[Tensor], Tensor], x: Tensor, cells: int, overlap: int, grow: int, shrink: int
) -> Iterator[Tensor]:
    """What `_blend` gives, from top to bottom in bands (B, C, rows, W): one row of tiles is in memory at a time."""
    height, width = x.shape[-2] // shrink, x.shape[-1] // shrink
    rows, columns = starts(height, cells, overlap), starts(width, cells, overlap)
    down = ramps(rows, min(cells, height), grow, x.device)
    across = ramps(columns, min(cells, width), grow, x.device)
    begun: Tensor | None = None  # what the last row of tiles gave beyond the band that it finished
    for index, (row, weight_down) in enumerate(zip(rows, down, strict=True)):
        band: Tensor | None = None
        for column, weight_across in zip(columns, across, strict=True):
            part = x[..., row * shrink : (row + cells) * shrink, column * shrink : (column + cells) * shrink]
            out = function(part)
            if band is None:
                band = out.new_zeros(*out.shape[:3], width * grow, dtype=torch.float32)
                if begun is not None:
                    band[..., : begun.shape[2], :] = begun
            band[..., column * grow : (column + cells) * grow] += out * (weight_down[:, None] * weight_across)
        assert band is not None, "there is one tile at least"
        done = band.shape[2] if index == len(rows) - 1 else (rows[index + 1] - row) * grow
        begun = band[..., done:, :].clone()
        yield band[..., :done, :].to(out.dtype)


def starts(size: int, cells: int, overlap: int) -> list[int]:
    """First cells of the fewest tiles, evenly spread, that cover `size` cells and overlap by `overlap` or more."""
    if size <= cells:
        return [0]
    last = math.ceil((size - overlap) / (cells - overlap)) - 1
    return [round(index * (size - cells) / last) for index in range(last + 1)]


def ramps(places: list[int], cells: int, grow: int, device: torch.device) -> list[Tensor]:
    """Weights (cells * grow,) of each tile along one axis; over all tiles they sum to 1 at every place."""
    length, total = cells * grow, torch.zeros((places[-1] + cells) * grow, dtype=torch.float64)
    inside = torch.arange(length, dtype=torch.float64) + 0.5
    weights = []
    for index, start in enumerate(places):
        weight = torch.ones(length, dtype=torch.float64)
        if index > 0:
            weight *= _fade(inside / ((places[index - 1] + cells - start) * grow))
        if index < len(places) - 1:
            weight *= _fade((length - inside) / ((start + cells - places[index + 1]) * grow))
        total[start * grow : start * grow + length] += weight
        weights.append(weight)
    return [
        (weight / total[start * grow : start * grow + length]).to(device, torch.float32)
        for start, weight in zip(places, weights, strict=True)
    ]


def _fade(x: Tensor) -> Tensor:
    """From 0 at x <= 0 to 1 at x >= 1, level at both ends: 3 x^2 - 2 x^3."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)
