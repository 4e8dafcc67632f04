"""The memory plan: which precision, batch, slices, tiles and moves make pictures fit into so many bytes.

Also how many bytes there are. Knows what things take from `estimate`. Letters: H W pixels, h w latent size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch

from sfumato.families import Family, Model
from sfumato.memory.bounds import MAX_ROWS
from sfumato.memory.estimate import (
    LARGE,
    Kernels,
    decoder_bytes,
    decoder_room,
    network_numbers,
    unet_bytes,
    unet_room,
)
from sfumato.memory.moving import Offload, offload
from sfumato.models.layers import slice_attention
from sfumato.models.quantised import largest, saved_bytes
from sfumato.models.unet import UNet

GIB = 2**30
PICTURES = (4, 2, 1)  # decoded at once
SLICES = (None, 4096, 1024, 256)  # query rows
TILES = (None, 1024, 768, 512, 384, 256)  # px
CUDA_CONTEXT = GIB // 2  # what a process takes of a card before its first tensor; assumed, not measured
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Plan:
    """How to draw within `budget` bytes. `tile` is in pixels, `attention_slice` in query rows; None is no bound.

    `weights`, `unet` and `decoder` are parts of `estimate`, in bytes: the most weights on the device at once, and the
    activations of a U-Net call and of a decode, which are never there together.
    """

    budget: int
    dtype: torch.dtype
    max_rows: int
    max_pictures: int
    attention_slice: int | None
    tile: int | None
    offload: bool
    weights: int
    unet: int
    decoder: int
    estimate: int

    @property
    def keep(self) -> int:
        """Bytes that networks may keep to be faster (`hasten`), texts' keys and values among them.

        What is left of the budget; 0 in a thrifty plan.
        """
        thrifty = self.offload or self.tile is not None or self.attention_slice is not None
        return 0 if thrifty or self.dtype != torch.float32 else max(0, self.budget - self.estimate)


@dataclass(frozen=True)
class _Setting:
    """One of the ever thriftier settings for a case: what its parts take."""

    family: Family
    width: int
    height: int
    count: int
    device: torch.device
    numbers: Mapping[str, int]
    dtype: torch.dtype
    tile: int | None
    offload: bool
    query_rows: int | None
    kept: str = "full"  # how the U-Net's weights are
    fast: bool = False

    @property
    def kernels(self) -> Kernels:
        return Kernels(self.device, self.query_rows)

    def unet(self, rows: int) -> int:
        h, w = (side // self.family.autoencoder.factor for side in (self.height, self.width))
        number = 0 if self.kept == "full" else coded(self.family)[1] * (4 + self.dtype.itemsize)  # as one layer works
        taken = unet_bytes(self.family.unet, h, w, rows, self.dtype, self.kernels) + number
        if self.hastened:  # beside what small decodes left
            left = (self.decoder_room(n) for n in PICTURES if n <= self.count and self._decode(n) < LARGE)
            taken += unet_room(self.family.unet, h, w, rows) + max(left, default=0)
        return taken

    @property
    def hastened(self) -> bool:
        """Whether layers work in rooms of their own: asked for, and in float32 on a CPU."""
        return self.fast and self.device.type == "cpu" and self.dtype == torch.float32

    @property
    def _decoded(self) -> tuple[int, int]:
        """(h, w) of the latents that are decoded at once."""
        factor = self.family.autoencoder.factor
        return min(self.height, self.tile or self.height) // factor, min(self.width, self.tile or self.width) // factor

    def _decode(self, pictures: int) -> int:
        return decoder_bytes(self.family.autoencoder, *self._decoded, pictures, self.dtype, self.kernels)

    def decoder_room(self, pictures: int) -> int:
        return decoder_room(self.family.autoencoder, *self._decoded, pictures)

    def decoder(self, pictures: int) -> int:
        """With the finished pictures in float32, and those in work twice, as they are blended and converted."""
        config, taken = self.family.autoencoder, self._decode(pictures)
        if self.hastened:
            h, w = (side // config.factor for side in (self.height, self.width))
            left = unet_room(self.family.unet, h, w, min(MAX_ROWS, 2 * self.count)) if taken < LARGE else 0
            taken += self.decoder_room(pictures) + left
        return taken + 4 * config.image_channels * (self.count + 2 * pictures) * self.width * self.height

    def held(self, name: str | None = None) -> int:
        """Bytes of a network's weights; None: of all."""
        numbers = sum(self.numbers.values()) if name is None else self.numbers[name]
        if self.kept == "full" or name not in (None, "unet"):
            return numbers * self.dtype.itemsize
        saved, _ = coded(self.family)
        return numbers * self.dtype.itemsize - saved[self.dtype.itemsize]

    def stage(self, name: str, activations: int) -> int:
        """All that is on the device while the network `name` works."""
        return self.held(name if self.offload else None) + activations + self.kernels.workspace

    def plan(self, budget: int) -> Plan:
        """With the most rows and pictures at once that fit, or one of each."""
        rows_wanted = min(MAX_ROWS, 2 * self.count)
        rows = [rows_wanted >> shift for shift in range(rows_wanted.bit_length())]
        max_rows = _most(rows, lambda number: self.stage("unet", self.unet(number)), budget)
        pictures = [number for number in PICTURES if number <= self.count]
        max_pictures = _most(pictures, lambda number: self.stage("decoder", self.decoder(number)), budget)
        unet, decoder = self.unet(max_rows), self.decoder(max_pictures)
        stages = dict.fromkeys(self.numbers, 0) | {"unet": unet, "decoder": decoder}
        weights = max(self.held(name) for name in self.numbers) if self.offload else self.held()
        return Plan(
            budget=budget,
            dtype=self.dtype,
            max_rows=max_rows,
            max_pictures=max_pictures,
            attention_slice=self.query_rows,
            tile=self.tile,
            offload=self.offload,
            weights=weights,
            unet=unet,
            decoder=decoder,
            estimate=max(self.stage(name, activations) for name, activations in stages.items()),
        )


def _most(numbers: list[int], takes: Callable[[int], int], budget: int) -> int:
    """The first of falling numbers that fits, or the last."""
    return next((number for number in numbers if takes(number) <= budget), numbers[-1])


@cache
def coded(family: Family) -> tuple[Mapping[int, int], int]:
    """What 8 bits a weight save of the U-Net, by the bytes of a number, and the numbers of its largest such weight."""
    with torch.device("meta"):
        network = UNet(family.unet)
    return {dtype.itemsize: saved_bytes(network, dtype) for dtype in SHORT}, largest(network)


def _settings(
    family: Family,
    width: int,
    height: int,
    count: int,
    device: torch.device,
    dtype: torch.dtype | None,
    kept: str,
    fast: bool,
) -> Iterator[_Setting]:
    """From the plainest to the thriftiest; what is named last changes first."""
    cpu, factor = device.type == "cpu", family.autoencoder.factor
    usual = (torch.float32, torch.bfloat16) if cpu else (torch.float16,)
    dtypes = usual if dtype is None else (dtype,)
    side = max(width, height)
    tiles = [tile for tile in TILES if tile is None or (2 * factor <= tile < side and tile % factor == 0)]
    moves = (False,) if cpu else (False, True)
    numbers = network_numbers(family)
    for kind, tile, moved, rows in product(dtypes, tiles, moves, SLICES):
        yield _Setting(family, width, height, count, device, numbers, kind, tile, moved, rows, kept, fast)


def plan(
    family: Family,
    width: int,
    height: int,
    count: int,
    budget: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    kept: str = "full",
    fast: bool = False,
) -> Plan:
    """The least thrifty plan for `count` pictures of width x height px whose estimate is within `budget` bytes.

    First goes what changes nothing but time: fewer rows a call and pictures a decode, slices, moving networks. Then
    tiles; where `dtype` is None, a CPU's last is bfloat16. `kept` is how the U-Net's weights are: full, int8, fp8. With
    `fast` there is room for what layers work in that are hastened.
    ValueError with the least estimate where none fits.
    """
    settings = list(_settings(family, width, height, count, device, dtype, kept, fast))
    for setting in settings:
        found = setting.plan(budget)
        if found.estimate <= budget:
            return found
    least = min((setting.plan(0) for setting in settings), key=lambda plan: plan.estimate)
    lowest = math.ceil(10 * least.estimate / GIB) / 10
    raise ValueError(
        f"vram={budget / GIB:.1f}: {family.name} at {width} x {height} px takes {lowest} GiB at least"
        f" ({', '.join(_words(least))})"
    )


def _words(plan: Plan) -> list[str]:
    """What a plan does, in words."""
    words = [SHORT.get(plan.dtype, str(plan.dtype).removeprefix("torch."))]
    if plan.offload:
        words.append("networks moved on and off")
    if plan.attention_slice is not None:
        words.append(f"attention in slices of {plan.attention_slice} rows")
    if plan.tile is not None:
        words.append(f"decoding in tiles of {plan.tile} px")
    if plan.max_pictures > 1:
        words.append(f"decoding {plan.max_pictures} pictures at once")
    return [*words, f"{plan.max_rows} row{'s' if plan.max_rows > 1 else ''} a call"]


def describe(plan: Plan) -> str:
    """One line for people: what the plan does and what it is thought to take."""
    parts = f"weights {plan.weights / GIB:.1f}, then U-Net {plan.unet / GIB:.1f} or decoder {plan.decoder / GIB:.1f}"
    return (
        f"plan for {plan.budget / GIB:.1f} GiB: {', '.join(_words(plan))}; "
        f"estimate {plan.estimate / GIB:.1f} GiB ({parts})"
    )


def apply(plan: Plan, model: Model) -> Offload | None:
    """Set slices and moves on a loaded model; once, or after `remove()` of what it returned.

    The caller gives `max_rows` to the engine, `max_pictures` and `tile` to the decoding. A model whose networks are to
    move may be loaded on the CPU with `device` replaced.
    """
    for network in (model.unet, model.autoencoder):
        slice_attention(network, plan.attention_slice)
    return offload(model.networks, model.device) if plan.offload else None


def query_rows_of(model: Model) -> int | None:
    """The query rows to which a model's attention is bounded, in all its networks alike."""
    modules = (module for network in (model.unet, model.autoencoder) for module in network.modules())
    return next((module.query_rows for module in modules if hasattr(module, "query_rows")), None)  # type: ignore[return-value]


def budget(vram: float | None, device: torch.device) -> int:
    """The bytes to plan for: what is free on the device, and no more than `vram` GiB where a person says so.

    Of `vram` a CUDA card's context is taken off. ValueError where it is no number above 0.
    """
    if vram is None:
        return free_memory(device)
    if not (math.isfinite(vram) and vram > 0):
        raise ValueError(f"vram={vram}: a number of GiB above 0 is needed")
    asked = max(0, int(vram * GIB) - (CUDA_CONTEXT if device.type == "cuda" else 0))
    try:
        return min(asked, free_memory(device))
    except ValueError:  # the system does not say; the person did
        return asked


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on the device, with what it holds in reserve there.

    ValueError where the system does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type == "cpu":
        return _free_ram()
    raise ValueError(f"device={str(device)!r}: its free memory is not known; say how many GiB with vram")


def _free_ram(meminfo: Path = Path("/proc/meminfo")) -> int:
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    if pages is None:
        raise ValueError("device='cpu': this system does not say its free memory; say how many GiB with vram")
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
