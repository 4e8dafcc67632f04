"""3 x 3 convolutions on a CPU as matrix products, in PyTorch's operations: Winograd's minimal filtering, and columns.

Winograd 1980 and Lavin & Gray 2016: F(m x m, 3 x 3) takes (m + 2)^2 products for m^2 results of nine each. All of it
is float32 on maps that lie channels last, with weights that do. Knows nothing of modules.
Letters: B batch, C channels in, O channels out, T tiles of m x m results, n = (m + 2)^2, R rows of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.models.costs import cheapest
from sfumato.models.room import Room

# Lavin & Gray 2016, section 4: of tiles (B^T), of filters (G), of results (A^T).
_TILES = {
    2: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    4: (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
}
_FILTERS = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}
_RESULTS = {
    2: ((1, 1, 1, 0), (0, 1, -1, -1)),
    4: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}

BAND = 16 * 2**20  # bytes of a piece: the C library keeps blocks below 32 MiB, larger ones are new pages every time


@cache
def _matrices(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions at once, as Kronecker products: of tiles (n, n), filters (n, 9), results (m^2, n)."""
    tables = (torch.tensor(table[m], dtype=torch.float64) for table in (_TILES, _FILTERS, _RESULTS))
    with torch.inference_mode(False):
        tiles, filters, results = (torch.kron(table, table).float() for table in tables)
    return tiles, filters, results


def fastest(shape: tuple[int, ...], out_channels: int, stride: int, compiled: bool = False) -> str:
    """Which way is likely the fastest for a 3 x 3 convolution of a map of `shape` (B, C, h, w), padded by a cell.

    "direct" (PyTorch's own), "columns", "winograd2" or "winograd4", the last two by kernels where they are `compiled`;
    of a forward and a backward pass together.
    """
    return cheapest("training", compiled, shape, out_channels, stride)


def _each(matrix: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """matrix (a, b) times each of x (N, b, C): (N, a, C)."""
    return torch.bmm(matrix.expand(x.shape[0], *matrix.shape), x, out=out)


def _windows(x: Tensor, size: int, stride: int) -> Tensor:
    """The windows of x (B, h, w, C), channels nearest: a view (B, rows, columns, size, size, C)."""
    return x.unfold(1, size, stride).unfold(2, size, stride).permute(0, 1, 2, 4, 5, 3)


def _into_zeros(out: Tensor, x: Tensor) -> Tensor:
    """x (B, C, h, w) into out (B, H, W, C) from its second row and column on; 0 is what lies around it."""
    down, across = slice(1, 1 + x.shape[2]), slice(1, 1 + x.shape[3])
    for rest in (out[:, :1], out[:, down.stop :], out[:, down, :1], out[:, down, across.stop :]):
        rest.zero_()
    out[:, down, across] = x.permute(0, 2, 3, 1)
    return out


def _flat(weight: Tensor) -> Tensor:
    """weight (O, C, 3, 3) as (O, 9, C); a view where it lies channels last."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], 9, weight.shape[1])


@dataclass(frozen=True)
class _Grid:
    """How a map (B, C, h, w) is cut into tiles, and into bands of tiles that are in work at a time."""

    batch: int
    channels: int
    height: int
    width: int
    m: int
    room: Room

    @property
    def rows(self) -> int:
        return -(-self.height // self.m)

    @property
    def columns(self) -> int:
        return -(-self.width // self.m)

    @property
    def n(self) -> int:
        return (self.m + 2) ** 2

    def padded(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) with a cell of zeros around it and what the last tiles lack: (B, R m + 2, . m + 2, C)."""
        out = self.room.take("padded", self.batch, self.rows * self.m + 2, self.columns * self.m + 2, self.channels)
        return _into_zeros(out, x)

    def bands(self, channels: int) -> Iterator[tuple[slice, slice]]:
        """Pictures and rows of tiles whose n numbers a channel are about BAND bytes."""
        row = self.columns * self.n * channels * 4
        rows = max(1, min(self.rows, BAND // row))
        pictures = max(1, BAND // (row * self.rows)) if rows == self.rows else 1
        for picture in range(0, self.batch, pictures):
            for first in range(0, self.rows, rows):
                yield slice(picture, min(picture + pictures, self.batch)), slice(first, min(first + rows, self.rows))

    def tiles(self, padded: Tensor, pictures: slice, rows: slice) -> Tensor:
        """The band's transformed tiles, (T, n, C)."""
        windows = _windows(padded[pictures, rows.start * self.m : rows.stop * self.m + 2], self.m + 2, self.m)
        gathered = self.room.take("gathered", *windows.shape).copy_(windows).view(-1, self.n, self.channels)
        return _each(_matrices(self.m)[0], gathered, self.room.take("tiles", *gathered.shape))

    def transformed(self, weight: Tensor) -> Tensor:
        """Some of the weight (O, C, 3, 3) as products want it: (O, n, C)."""
        room = self.room.take("weight", weight.shape[0], self.n, self.channels)
        return _each(_matrices(self.m)[1], _flat(weight), room)

    def ordered(self, padded: Tensor, pictures: slice, rows: slice, out: Tensor | None = None) -> Tensor:
        """The band's transformed tiles, (n, T, C): `tiles` in the order in which products take them."""
        windows = _windows(padded[pictures, rows.start * self.m : rows.stop * self.m + 2], self.m + 2, self.m)
        windows = windows.permute(3, 4, 0, 1, 2, 5)
        gathered = self.room.take("gathered", *windows.shape).copy_(windows).view(self.n, -1)
        tiles = self.room.take("tiles", *gathered.shape) if out is None else out.view(gathered.shape)
        return torch.mm(_matrices(self.m)[0], gathered, out=tiles).view(self.n, -1, self.channels)

    def fill(self, out: Tensor, tiles: Tensor, transformed: Tensor, bias: Tensor | None) -> None:
        """Into out (B, R, m, columns, m, O) the results of tiles (n, T, C) and transformed weights (n, C, O)."""
        batch, rows, m, columns, _, channels = out.shape
        products = self.room.take("products", self.n, tiles.shape[1], channels)
        torch.bmm(tiles, transformed, out=products)
        results = self.room.take("results", m * m, tiles.shape[1] * channels)
        torch.mm(_matrices(m)[2], products.view(self.n, -1), out=results)
        by_tile = results.view(m, m, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        if bias is None:
            out.copy_(by_tile)
        else:
            torch.add(by_tile, bias, out=out) if out.is_contiguous() else out.copy_(by_tile).add_(bias)

    def of_products(self, grad: Tensor) -> Tensor:
        """The gradient (n, T, O) of products from a band of the results' (B, R, m, columns, m, O)."""
        by_tile = grad.permute(0, 1, 3, 2, 4, 5)
        results = self.room.take("results", *by_tile.shape).copy_(by_tile).view(-1, self.m**2, grad.shape[-1])
        products = self.room.take("products", results.shape[0], self.n, grad.shape[-1])
        return _each(_matrices(self.m)[2].t(), results, products).transpose(0, 1)

    def of_tiles(self, products: Tensor, weight: Tensor) -> Tensor:
        """The gradient (T, n, C) of what tiles hold from that of the products (n, T, O)."""
        tiles = self.room.take("tiles", self.n, products.shape[1], self.channels)
        for part in _parts(weight, self.n):
            transformed = self.transformed(weight[part]).transpose(0, 1)
            if part.start == 0:
                torch.bmm(products[..., part], transformed, out=tiles)
            else:
                tiles.baddbmm_(products[..., part], transformed)
        gathered = self.room.take("gathered", products.shape[1], self.n, self.channels)
        return _each(_matrices(self.m)[0].t(), tiles.transpose(0, 1), gathered)

    def map_of(self, out: Tensor) -> Tensor:
        """Results by their tiles, (B, R, m, columns, m, O), as a map (B, O, h, w)."""
        whole = out.view(self.batch, self.rows * self.m, self.columns * self.m, out.shape[-1])
        return whole[:, : self.height, : self.width].permute(0, 3, 1, 2)


def _grid(x: Tensor, m: int, room: Room) -> _Grid:
    batch, channels, height, width = x.shape
    return _Grid(batch, channels, height, width, m, room)


def _parts(weight: Tensor, n: int) -> Iterator[slice]:
    """Output channels whose transformed weights are about BAND bytes."""
    channels, inside = weight.shape[:2]
    step = max(16, BAND // (4 * n * inside))
    for first in range(0, channels, step):
        yield slice(first, min(first + step, channels))


def transform(weight: Tensor, m: int) -> Tensor:
    """weight (O, C, 3, 3) as the products of F(m x m) want it, (n, C, O): n / 9 times its memory, to be kept."""
    return _each(_matrices(m)[1], _flat(weight)).permute(1, 2, 0).contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    m: int,
    room: Room,
    transformed: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """F(m x m, 3 x 3) of x (B, C, h, w), a cell of zeros around it: (B, O, h, w), without gradients.

    With what `transform` gives of the weight that work is spared. Into `kept` (n, T, C), where all of it is one band,
    go the transformed tiles.
    """
    grid = _grid(x, m, room)
    parts = list(_parts(weight, grid.n)) if transformed is None else [slice(0, weight.shape[0])]
    if transformed is None and len(parts) == 1:
        transformed = grid.transformed(weight).permute(1, 2, 0)
    out = x.new_empty(grid.batch, grid.rows, m, grid.columns, m, weight.shape[0])
    padded = grid.padded(x)
    for pictures, rows in grid.bands(max(weight.shape[:2])):
        tiles = grid.ordered(padded, pictures, rows, kept)
        for part in parts:
            of_part = None if bias is None else bias[part]
            ready = grid.transformed(weight[part]).permute(1, 2, 0) if transformed is None else transformed
            grid.fill(out[pictures, rows][..., part], tiles, ready, of_part)
    return grid.map_of(out)


def columns(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, room: Room) -> Tensor:
    """The convolution of x (B, C, h, w), a cell of zeros around it, as one matrix product, without gradients."""
    cells, flat = _cells(x, stride, room), _flat(weight).flatten(1)
    out = F.linear(cells.view(-1, flat.shape[1]), flat, bias)
    return out.view(*cells.shape[:3], weight.shape[0]).permute(0, 3, 1, 2)


class Winograd(torch.autograd.Function):
    """F(m x m, 3 x 3) with its gradients. Keeps the weight and, of maps whose tiles are one band, those; else x.

    What else was transformed, is transformed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, m: int, room: Room) -> Tensor:
        ctx.grid = grid = _grid(x, m, room)
        whole = ctx.needs_input_grad[1] and len(list(grid.bands(max(weight.shape[:2])))) == 1
        tiles = room.lend(grid.n, grid.batch * grid.rows * grid.columns, grid.channels) if whole else None
        ctx.save_for_backward(weight, tiles if whole else x)
        ctx.whole = whole
        return convolve(x, weight, bias, m, room, kept=tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (weight, kept), grid = ctx.saved_tensors, ctx.grid
        wants_x, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        m = grid.m
        grad = grad.permute(0, 2, 3, 1)
        short = (0, 0, 0, grid.columns * m - grid.width, 0, grid.rows * m - grid.height)
        whole = F.pad(grad, short) if any(short) else grad
        by_tile = whole.unflatten(1, (grid.rows, m)).unflatten(3, (grid.columns, m))
        padded = grid.padded(kept) if wants_weight and not ctx.whole else None
        back = None
        if wants_x:
            back = grid.room.take("back", grid.batch, grid.rows + 1, m, grid.columns + 1, m, grid.channels)
        of_weight: Tensor | None = None
        for pictures, rows in grid.bands(max(weight.shape[:2])):
            products = grid.of_products(by_tile[pictures, rows])
            if back is not None:
                tiles = grid.of_tiles(products, weight)
                _spread(back[pictures, rows.start : rows.stop + 1], tiles, m, first=rows.start == 0)
            if wants_weight:
                tiles = kept if padded is None else grid.tiles(padded, pictures, rows).transpose(0, 1)
                of_weight = _of_weight(grid, products, tiles, weight, of_weight)
        of_x = None
        if back is not None:
            flat = back.view(grid.batch, (grid.rows + 1) * m, (grid.columns + 1) * m, grid.channels)
            inner = flat[:, 1 : 1 + grid.height, 1 : 1 + grid.width]
            of_x = inner.clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
        if of_weight is not None:
            of_weight = of_weight.unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        return of_x, of_weight, grad.sum((0, 1, 2)) if wants_bias else None, None, None


def _of_weight(grid: _Grid, products: Tensor, tiles: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
    """The gradient (O, 9, C) of the weight, added to that `before`: products' gradient (n, T, O), tiles (n, T, C)."""
    out = grid.room.lend(weight.shape[0], 9, grid.channels) if before is None else before
    for part in _parts(weight, grid.n):
        of_part = grid.room.take("weight", grid.n, part.stop - part.start, grid.channels)
        torch.bmm(products[..., part].transpose(1, 2), tiles, out=of_part)
        if before is None:
            _each(_matrices(grid.m)[1].t(), of_part.transpose(0, 1), out[part])
        else:
            out[part] += _each(_matrices(grid.m)[1].t(), of_part.transpose(0, 1))
    return out


def _spread(back: Tensor, tiles: Tensor, m: int, first: bool) -> None:
    """Tiles (T, n, C), which overlap by two cells, into the rows of a map, back (B, R + 1, m, columns + 1, m, C).

    In the first of those rows the tiles above have left two cells each, unless they are the `first`; what else was
    there is written over.
    """
    batch, rows, _, columns, _, channels = back.shape
    tiles = tiles.view(batch, rows - 1, columns - 1, m + 2, m + 2, channels).permute(0, 1, 3, 2, 4, 5)
    begin = 0 if first else 1
    back[:, begin:-1, :, -1:].zero_()
    back[:, -1:].zero_()
    back[:, begin:-1, :, :-1] = tiles[:, begin:, :m, :, :m]
    back[:, :begin, :, :-1] += tiles[:, :begin, :m, :, :m]
    back[:, 1:, :2, :-1] += tiles[:, :, m:, :, :m]
    back[:, :-1, :, 1:, :2] += tiles[:, :, :m, :, m:]
    back[:, 1:, :2, 1:, :2] += tiles[:, :, m:, :, m:]


def _cells(x: Tensor, stride: int, room: Room) -> Tensor:
    """The nine cells that each result of x (B, C, h, w) is made of: (B, rows, columns, 3, 3, C)."""
    padded = room.take("padded", x.shape[0], x.shape[2] + 2, x.shape[3] + 2, x.shape[1])
    windows = _windows(_into_zeros(padded, x), 3, stride)
    return room.take("gathered", *windows.shape).copy_(windows)


class Columns(torch.autograd.Function):
    """The convolution as one matrix product over nine cells at a time; faster where the weight is the larger part.

    A cell of zeros lies around x. Keeps x and the weight; the columns are gathered again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, room: Room) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.room = stride, room
        return columns(x, weight, bias, stride, room)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x, weight), stride, room = ctx.saved_tensors, ctx.stride, ctx.room
        wants_x, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        batch, channels, height, width = x.shape
        rows, columns = grad.shape[2:]
        flat_grad = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
        of_x = of_weight = None
        if wants_weight:
            cells = _cells(x, stride, room).view(-1, 9 * channels)
            flat = torch.mm(flat_grad.t(), cells, out=room.lend(weight.shape[0], 9 * channels))
            of_weight = flat.view(-1, 3, 3, channels).permute(0, 3, 1, 2)
        if wants_x:
            of_cells = room.take("gathered", batch, rows, columns, 3, 3, channels)
            torch.mm(flat_grad, _flat(weight).flatten(1), out=of_cells.view(-1, 9 * channels))
            back = room.take("back", batch, height + 2, width + 2, channels).zero_()
            for down in range(3):
                for across in range(3):
                    reached = back[:, down : down + stride * rows : stride, across : across + stride * columns : stride]
                    reached += of_cells[:, :, :, down, across]
            of_x = back[:, 1:-1, 1:-1].clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
        return of_x, of_weight, flat_grad.sum(0) if wants_bias else None, None, None
