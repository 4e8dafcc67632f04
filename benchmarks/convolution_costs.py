"""What each way of a 3 x 3 convolution costs on this processor, by shape; the tables of sfumato/models/costs.py.

    python -m benchmarks.convolution_costs [--purposes training drawing] [--turns 5] [--family box sd]

Measures the convolutions of the box's U-Net (drawing 2, 8, 32 and 64 rows; training 32) and of SD 1.5's (drawing a pair
at 512 px; training as benchmarks/train_step.py does): each way's least time of the processor, one thread. Then it fits
the costs that costs.py adds up, so that relative errors are small, prints them as that file has them, and tells how
much longer than the best way for each layer the choice takes, of all layers as often as they occur: with the fitted
table and with that of the file. The result goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from benchmarks.harness import RESULTS, machine, once
from sfumato.families import BOX, SD1
from sfumato.kernels import winograd as kernels
from sfumato.kernels.build import library
from sfumato.models import costs
from sfumato.models.inference import convolve_ordered, ordered
from sfumato.models.layers import Conv2d
from sfumato.models.room import Room
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.winograd import Columns, Winograd, columns, convolve, transform

Layer = tuple[tuple[int, ...], int, int]  # shape of the map, output channels, stride
Case = tuple[UNetConfig, int, int]  # config, rows, side of the latents

HALF = replace(UNetConfig(), channels=160)
CASES: dict[str, dict[str, list[Case]]] = {
    "training": {"box": [(BOX.unet, 32, 16)], "sd": [(HALF, 2, 32)]},
    "drawing": {"box": [(BOX.unet, rows, 16) for rows in (2, 8, 32, 64)], "sd": [(SD1.unet, 2, 64)]},
}
ORDERED = 1_500_000  # numbers of a weight; what lies beyond, PyTorch's convolution brings into its order more slowly
LIMIT = 1.0  # seconds: what takes longer is measured once


def layers(config: UNetConfig, rows: int, side: int) -> Counter[Layer]:
    """The 3 x 3 convolutions of a call, and how often each occurs."""
    found: Counter[Layer] = Counter()

    def note(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Conv2d)
        if module.kernel_size == (3, 3):
            found[tuple(given[0].shape), module.out_channels, module.stride[0]] += 1

    with torch.device("meta"):
        network = UNet(config)
        for module in network.modules():
            if isinstance(module, Conv2d):
                module.register_forward_pre_hook(note)
        network(
            torch.empty(rows, config.in_channels, side, side),
            torch.empty(rows),
            torch.empty(rows, 77, config.context_dim),
        )
    return found


def tensors(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """A map, a weight and a bias, as networks have them: channels last."""
    shape, outs, _ = layer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outs, shape[1], 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(outs, generator=generator)


def trainings(layer: Layer, room: Room) -> dict[str, Callable[[], object]]:
    """A forward and a backward pass, by way; those by compiled kernels as "compiled ..."."""
    x, weight, bias = (each.requires_grad_() for each in tensors(layer))
    stride = layer[2]
    grad = torch.randn_like(F.conv2d(x, weight, bias, stride, 1)).contiguous(memory_format=torch.channels_last)

    def both(forward: Callable[..., Tensor], *rest: Any) -> object:
        return torch.autograd.grad(forward(x, weight, bias, *rest), (x, weight, bias), grad)

    found: dict[str, Callable[[], object]] = {
        "direct": partial(both, F.conv2d, stride, 1),
        "columns": partial(both, Columns.apply, stride, room),
    }
    if stride == 1:
        for m in (2, 4):
            found[f"winograd{m}"] = partial(both, Winograd.apply, m, room)
            if library():
                found[f"compiled winograd{m}"] = partial(both, kernels.Winograd.apply, m, room)
    return found


def drawings(layer: Layer, room: Room) -> dict[str, Callable[[], object]]:
    """A forward pass, by way; with a weight that is not kept as "... fresh"."""
    (x, weight, bias), (shape, _, stride) = tensors(layer), layer
    found: dict[str, Callable[[], object]] = {
        "direct": partial(F.conv2d, x, weight, bias, stride, 1),
        "ordered": partial(convolve_ordered, x, ordered(weight, stride, shape), bias, stride),
        "columns": partial(columns, x, weight, bias, stride, room),
    }
    if stride == 1:
        for m in (2, 4):
            plain, quick = (
                partial(convolve, x, weight, bias, m, room),
                partial(kernels.convolve, x, weight, bias, m, room),
            )
            found[f"winograd{m} fresh"], found[f"winograd{m}"] = plain, partial(plain, transform(weight, m))
            if library():
                found[f"compiled winograd{m} fresh"] = quick
                found[f"compiled winograd{m}"] = partial(quick, kernels.pack(weight, m))
    return found


def measured(layer: Layer, purpose: str, turns: int) -> dict[str, float]:
    """Milliseconds of the processor by way: the least of some turns, all ways in turn."""
    room = Room()
    ways = (trainings if purpose == "training" else drawings)(layer, room)
    with torch.inference_mode(purpose == "drawing"):
        best = {}
        for way, call in ways.items():
            call()
            best[way] = once(call).processor
        for _ in range(turns - 1 if sum(best.values()) < LIMIT * len(best) else 0):
            for way, call in ways.items():
                best[way] = min(best[way], once(call).processor)
    return {way: 1e3 * seconds for way, seconds in best.items()}


def fitted(found: dict[Layer, dict[str, float]], purpose: str, compiled: bool) -> costs.Table:
    """The table whose sums are nearest to what was measured, by relative error."""
    ways, transforms, ordering = {}, {}, 0.0
    for way in ("direct", "ordered", "columns", "winograd2", "winograd4"):
        name = f"compiled {way}" if compiled and way.startswith("winograd") else way
        rows, times = [], []
        for layer, taken in found.items():
            for kind, fresh in ((name, 0), (f"{name} fresh", 1)):
                if kind in taken:
                    products, numbers, maps = costs.sizes(*layer)[way]
                    rows.append([products / 1e9, numbers / 1e6, maps / 1e6, 1.0, fresh * numbers / 1e6])
                    rows[-1].append(max(0, numbers - ORDERED) / 1e6 if way == "direct" else 0.0)
                    times.append(taken[kind])
        if rows:
            weighed = np.asarray(rows) / np.asarray(times)[:, None]
            solved = nnls(weighed, np.ones(len(times)))[0]
            a, b, c, least, fresh_cost, beyond = (round(float(each), 3) for each in solved)
            ways[way], ordering = (a, b, c, least), max(ordering, beyond)
            if purpose == "drawing" and way.startswith("winograd"):
                transforms[way] = fresh_cost
    return costs.Table(ways, transforms, ordering, ORDERED)


def longer(
    found: dict[Layer, dict[str, float]], often: Counter[Layer], table: costs.Table, compiled: bool, kept: bool
) -> tuple[float, float, float]:
    """Milliseconds of all layers: by the way that the table chooses, by the best, and by PyTorch's own."""
    total = [0.0, 0.0, 0.0]
    for layer, count in often.items():
        taken = {}
        for way, spent in found[layer].items():
            bare = way.removeprefix("compiled ").removesuffix(" fresh")
            by_kernels, is_fresh = way.startswith("compiled"), way.endswith(" fresh")
            if bare.startswith("winograd") and by_kernels != compiled:
                continue
            if (
                any(each.endswith("fresh") for each in found[layer])
                and bare.startswith("winograd")
                and is_fresh == kept
            ):
                continue
            if bare == "ordered" and not kept:
                continue
            taken[bare] = spent
        sums = costs.costs(table, *layer, kept=costs.KEPT if kept else ())
        total[0] += count * taken[min((way for way in sums if way in taken), key=lambda way: sums[way])]
        total[1] += count * min(taken.values())
        total[2] += count * taken["direct"]
    return total[0], total[1], total[2]


def report(purpose: str, cases: dict[str, Counter[Layer]], found: dict[Layer, dict[str, float]]) -> dict[str, Any]:
    """The fitted tables in words, and how far from the best their choices are."""
    kept: dict[str, Any] = {}
    for compiled in (False, True) if library() else (False,):
        key = (purpose, compiled, costs.capability())
        tables = {"fitted": fitted(found, purpose, compiled)}
        print(f"    {key}: {tables['fitted']},")
        if key in costs.TABLES:
            tables["of the file"] = costs.TABLES[key]
        for case, often in cases.items():
            for keeping in (True, False) if purpose == "drawing" else (False,):
                for name, table in tables.items():
                    chosen, best, direct = longer(found, often, table, compiled, keeping)
                    words = "weights kept, " if keeping else ""
                    print(
                        f"  {case}, {words}{name}: {chosen:.1f} ms, best {best:.1f}, PyTorch's own {direct:.1f}",
                        flush=True,
                    )
                    kept[f"{purpose}, kernels {compiled}, {case}, {words}{name}"] = [chosen, best, direct]
    return kept


def main() -> None:
    """Measure, fit, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purposes", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--families", nargs="+", choices=("box", "sd"), default=["box", "sd"])
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for purpose in args.purposes:
        cases = {
            f"{family}, {rows} rows": layers(config, rows, side)
            for family in args.families
            for config, rows, side in CASES[purpose][family]
        }
        found: dict[Layer, dict[str, float]] = {}
        for often in cases.values():
            for layer in often:
                if layer not in found:
                    found[layer] = measured(layer, purpose, args.turns)
                    told = ", ".join(f"{way} {spent:.2f}" for way, spent in found[layer].items())
                    print(f"{layer}: {told}", flush=True)
        kept = {
            "machine": {**machine(), "capability": costs.capability()},
            "layers": {str(layer): taken for layer, taken in found.items()},
            "sums": report(purpose, cases, found),
        }
        path = RESULTS / f"convolution_costs-{costs.capability()}-{purpose}-{date.today().isoformat()}.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
