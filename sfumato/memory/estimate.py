"""What networks take: weights counted, activations summed over the architecture at their fullest moment.

Upper bounds, with constants fitted to peaks that benchmarks/memory_plan.py measures on a CPU; a GPU's are assumed to
be no larger. Pure arithmetic on configs. Letters: C channels, n cells of a feature map, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from sfumato.families import Family
from sfumato.memory.bounds import MAX_ROWS
from sfumato.models.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.models.inference import CONTEXTS
from sfumato.models.transformer import CrossAttention
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.winograd import BAND
from sfumato.weights.parts import build

# What kernels and the allocator take beside the tensors themselves: in proportion, and in all. Measured on a CPU, where
# most of it is heap that the C library does not give back (a decoder's large maps are mapped singly, and are given
# back); assumed on other devices.
UNET_SLACK, DECODER_SLACK, OTHER_SLACK = 1.35, 1.2, 1.15
WORKSPACE, OTHER_WORKSPACE = 128 * 2**20, 256 * 2**20
# Bytes of a decode before which other networks give up what they can have again. Such a one takes seconds on a CPU, and
# to map 1 GB of weights again 0.1.
LARGE = 256 * 2**20
PIECES = 6  # that a hastened layer works in beside a map: tiles, products, results, weights, values and gates, work
WAYS = 9 + 16 + 36  # numbers of a 3 x 3 filter, as it is and transformed for tiles of 2 x 2 and of 4 x 4
TOKENS = 77  # of a text; longer ones are kept as well, where there is room
FUSED_HEAD = 256  # the widest head for which CUDA's fused attention is sure to be chosen


@dataclass(frozen=True)
class Kernels:
    """How a device computes: attention takes `query_rows` at once (None: all) where it keeps its scores."""

    device: torch.device
    query_rows: int | None = None

    def scores(self, heads: int, head_channels: int, n: int) -> int:
        """Bytes of scores and their softmax in float32, n cells to n; 0 where one kernel computes all."""
        if self._cpu or (self.device.type == "cuda" and head_channels <= FUSED_HEAD):
            return 0
        return 2 * 4 * heads * n * min(n, self.query_rows or n)

    def conv(self, before: int, after: int, size: int) -> int:
        """Bytes a cell of a convolution's input and result, in numbers of `size` bytes.

        A CPU without instructions for half precision makes float32 copies of both.
        """
        return (before + after) * (size + (4 if self._cpu and size < 4 else 0))

    def res_block(self, before: int, after: int, size: int) -> int:
        """Bytes a cell alive beside the input: a norm with its activation, or either convolution with what it needs.

        A norm on a GPU gives another memory order than a convolution takes: there is a copy more.
        """
        turned = 0 if self._cpu else size
        first = self.conv(before, after, size) + turned * before
        return max(2 * before * size, first, after * size + self.conv(after, after, size) + turned * after)

    def slack(self, of_cpu: float) -> float:
        """The factor for a network whose factor on a CPU is known."""
        return of_cpu if self._cpu else OTHER_SLACK

    @property
    def workspace(self) -> int:
        """Bytes that do not grow with the picture."""
        return WORKSPACE if self._cpu else OTHER_WORKSPACE

    @property
    def _cpu(self) -> bool:
        return self.device.type == "cpu"


@cache
def most_kept(family: Family) -> int:
    """Bytes that a hastened U-Net keeps at most: all its 3 x 3 weights in all ways, and texts of MAX_ROWS rows."""
    with torch.device("meta"):
        network = UNet(family.unet)
    weights = tokens = 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            weights += WAYS * module.in_channels * module.out_channels
        elif isinstance(module, CrossAttention) and module.context_dim == family.unet.context_dim:
            tokens += module.to_k.out_features + module.to_v.out_features
    return 4 * (weights + CONTEXTS * MAX_ROWS * TOKENS * (tokens + family.unet.context_dim))


@cache
def network_numbers(family: Family) -> Mapping[str, int]:
    """How many numbers move on and off as one: each text encoder, unet, encoder and decoder of the autoencoder."""

    def count(*modules: nn.Module) -> int:
        return sum(tensor.numel() for module in modules for tensor in module.state_dict().values())

    with torch.device("meta"):
        networks = build(family)
    numbers: dict[str, int] = {}
    for name, network in networks.items():
        if isinstance(network, Autoencoder):
            numbers["encoder"] = count(network.encoder, network.quant_conv)
            numbers["decoder"] = count(network.decoder, network.post_quant_conv)
        else:
            numbers[name] = count(network)
    return numbers


def unet_bytes(config: UNetConfig, h: int, w: int, rows: int, dtype: torch.dtype, kernels: Kernels) -> int:
    """What one call of `rows` rows takes at its peak."""
    return int(kernels.slack(UNET_SLACK) * unet_tensors(config, h, w, rows, dtype, kernels))


def unet_tensors(config: UNetConfig, h: int, w: int, rows: int, dtype: torch.dtype, kernels: Kernels) -> int:
    """The peak of feature maps in bytes, skips among them."""
    size = dtype.itemsize
    cells = [h * w // 4**index for index in range(len(config.channel_mult))]
    widths = [config.channels * mult for mult in config.channel_mult]

    def inside(before: int, level: int, depth: int) -> int:
        """Bytes of a residual block and the transformer after it, beside the block's input."""
        width, n = widths[level], cells[level]
        res = (kernels.res_block(before, width, size) + width * size) * n  # here the shortcut is there from the start
        if depth == 0:
            return res
        heads = config.heads(width)
        attention = 9 * width * n * size + kernels.scores(heads, width // heads, n)
        # at its end a transformer block holds 4 C, its gated feed-forward layer 16 C; beside them is the block's input
        return max(res, width * n * size + max(attention, 20 * width * n * size))

    return _unet_walk(config, cells, widths, size, inside) * rows


def _unet_walk(
    config: UNetConfig, cells: list[int], widths: list[int], size: int, inside: Callable[[int, int, int], int]
) -> int:
    """The fullest moment of one row's way through the network."""
    last, width = len(cells) - 1, config.channels
    skips = [width * cells[0] * size]
    peaks = [skips[0]]
    for level, n in enumerate(cells):
        for _ in range(config.num_res_blocks):
            peaks.append(sum(skips) + inside(width, level, config.transformer_depth[level]))
            width = widths[level]
            skips.append(width * n * size)
        if level < last:
            skips.append(width * cells[level + 1] * size)
            peaks.append(sum(skips))
    peaks.append(sum(skips) + width * cells[last] * size + inside(width, last, config.middle_depth))
    x = width * cells[last] * size
    for level in reversed(range(last + 1)):
        for _ in range(config.num_res_blocks + 1):
            skip = skips.pop()
            joined = x + skip
            before = joined // (cells[level] * size)
            held = sum(skips) + skip + x + joined
            peaks.append(held + inside(before, level, config.transformer_depth[level]))
            x = widths[level] * cells[level] * size
        if level > 0:  # doubled, then convolved, while the last block's input is still held
            peaks.append(held + 10 * x)
            x *= 4
    return max(peaks)


def unet_room(config: UNetConfig, h: int, w: int, rows: int) -> int:
    """What the layers of a hastened U-Net hold on to, which they need for a moment, at most (models/room.py)."""
    widths = [config.channels * mult for mult in config.channel_mult]
    before, after = [widths[0], *widths[:-1]], [*widths[1:], widths[-1]]
    maps = []
    for level, (width, finer, coarser) in enumerate(zip(widths, before, after, strict=True)):
        joined = max(width, coarser) + max(width, finer)  # what comes up, and a skip connection
        maps.append((-(-h >> level), -(-w >> level), joined, width))
    return _room(maps, rows)


def decoder_room(config: AutoencoderConfig, h: int, w: int, pictures: int) -> int:
    """The same of a hastened decoder, of latents of h x w; an encoder's is no more."""
    widths = [config.channels * mult for mult in config.channel_mult]
    maps = []
    for level, (width, coarser) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
        scale = 2 ** (len(widths) - 1 - level)
        maps.append((h * scale, w * scale, max(width, coarser), width))
    return _room(maps, pictures)


def _room(maps: Sequence[tuple[int, int, int, int]], batch: int) -> int:
    """For 3 x 3 convolutions of maps (height, width, channels in, channels out): a map with zeros around it, the nine
    cells of each result where the weight is the larger part, and pieces of transformed tiles.
    """
    padded = max(batch * (h + 5) * (w + 5) * channels for h, w, channels, _ in maps)
    columns = max(9 * min(batch * h * w, 4 * outs) * channels for h, w, channels, outs in maps)
    row_of_tiles = max(9 * (w + 3) * channels for _, w, channels, _ in maps)
    tiles = max(9 * batch * (h + 3) * (w + 3) * channels for h, w, channels, _ in maps)
    piece = min(max(BAND // 4, row_of_tiles), tiles)
    return 4 * (padded + max(columns, piece) + PIECES * piece)


def decoder_bytes(
    config: AutoencoderConfig, h: int, w: int, pictures: int, dtype: torch.dtype, kernels: Kernels
) -> int:
    """What one decode of `pictures` latents of h x w takes at its peak; an encode takes no more."""
    return int(kernels.slack(DECODER_SLACK) * decoder_tensors(config, h, w, pictures, dtype, kernels))


def decoder_tensors(
    config: AutoencoderConfig, h: int, w: int, pictures: int, dtype: torch.dtype, kernels: Kernels
) -> int:
    """The peak of feature maps in bytes."""
    size, n = dtype.itemsize, h * w
    width = config.channels * config.channel_mult[-1]
    attention = 6 * width * n * size + kernels.scores(1, width, n)
    peaks = [width * n * size + max(kernels.res_block(width, width, size) * n, attention)]
    for level in reversed(range(len(config.channel_mult))):
        entered, after = width * n * size, config.channels * config.channel_mult[level]
        peaks.append(entered + kernels.res_block(width, after, size) * n)
        peaks.append(entered + (after * size + kernels.res_block(after, after, size)) * n)
        width = after
        if level > 0:  # doubled, then convolved
            peaks.append(entered + (width * size + 4 * kernels.conv(width, width, size)) * n)
            n *= 4
    return max(peaks) * pictures
