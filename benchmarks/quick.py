"""In three minutes: are layers and the box's U-Net as fast, beside diffusers' way, as was recorded?

    python benchmarks/quick.py [--record] [--turns 5]

Ratios of processor time, hastened by PyTorch's own (for the box's U-Net: by diffusers'), each of pairs run in turn in
one process. They are compared with what benchmarks/results/quick.json holds for processors of this kind, with compiled
kernels or without, which --record writes: what takes a fifth more of its pair's time than then, and more than all
pairs' spread says, is named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Ratio, apart, machine, paired, ratio, roofline
from benchmarks.unet_call import drawing, inputs, ours, theirs, weights
from sfumato.families import BOX
from sfumato.kernels.build import library
from sfumato.models.costs import capability
from sfumato.models.layers import Conv2d, hasten
from sfumato.models.transformer import FeedForward
from sfumato.weights.placing import place

RECORDED = RESULTS / "quick.json"
SLOWER = 1.2
PLENTY = 2**40
CONVOLUTIONS = {  # rows, channels in and out, side
    "3 x 3, 320 at 64 x 64": (1, 320, 320, 64),
    "3 x 3, 640 at 32 x 32": (2, 640, 640, 32),
    "3 x 3, 1280 at 16 x 16": (2, 1280, 1280, 16),
    "3 x 3, 1280 at 8 x 8": (2, 1280, 1280, 8),
    "3 x 3, 192 at 4 x 4": (32, 192, 192, 4),
}
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def hastened(plain: nn.Module, x: Tensor) -> Pair:
    """A module's call hastened and as it is."""
    plain.requires_grad_(False)
    quick = copy.deepcopy(plain)
    hasten(quick, keep=PLENTY)
    return drawing(lambda: quick(x)), drawing(lambda: plain(x))


def pairs() -> dict[str, Callable[[], Pair]]:
    """What is compared, made when its turn comes."""
    generator = torch.Generator().manual_seed(0)

    def convolution(rows: int, before: int, after: int, side: int) -> Pair:
        plain = place(Conv2d(before, after, 3, padding=1), torch.device("cpu"), torch.float32)
        x = torch.randn(rows, before, side, side, generator=generator)
        return hastened(plain, x.contiguous(memory_format=torch.channels_last))

    def box(rows: int) -> Pair:
        state, given = weights(BOX), inputs(BOX, 16, rows)
        quick, peer = ours(BOX, state), theirs(BOX, state)
        hasten(quick, keep=PLENTY)
        return drawing(lambda: quick(*given)), drawing(lambda: peer(*given).sample)

    found: dict[str, Callable[[], Pair]] = {name: partial(convolution, *shape) for name, shape in CONVOLUTIONS.items()}
    found["feed-forward, 320 at 64 x 64"] = lambda: hastened(
        FeedForward(320), torch.randn(1, 4096, 320, generator=generator)
    )
    return found | {f"the box's U-Net, {rows} rows": partial(box, rows) for rows in (2, 32)}


def measured(turns: int) -> dict[str, Ratio]:
    """The ratios; ValueError where answers are apart."""
    found = {}
    for name, make in pairs().items():
        mine, other = make()
        one, two = mine(), other()
        if apart(one, two) > 1e-3 * two.abs().max().item():
            raise ValueError(f"{name}: answers are {apart(one, two):.1e} apart")
        taken = paired({"mine": mine, "other": other}, turns)
        found[name] = ratio(taken["mine"], taken["other"])
        print(f"{name:32} {found[name]}", flush=True)
    return found


def kind() -> str:
    """What the ratios depend on most, as "AVX512 with kernels"."""
    return f"{capability()} {'with' if library() is not None else 'without'} kernels"


def slower(now: dict[str, Ratio], then: dict[str, float]) -> list[str]:
    """What takes more of its pair's time than was recorded, in words."""
    return [
        f"slower: {name} takes {now[name].median:.3f} of its pair's time, {before:.3f} was recorded"
        for name, before in then.items()
        if name in now and now[name].median > SLOWER * before and now[name].least > before
    ]


def main() -> int:
    """Measure, compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rates = roofline()
    print(f"{kind()}: here and now {rates['sgemm']:.0f} Gflop/s, {rates['copy']:.1f} GB/s")
    records = json.loads(RECORDED.read_text(encoding="utf-8"))
    now = measured(args.turns)
    if args.record:
        figures = {"machine": machine(), "ratios": {name: round(each.median, 3) for name, each in now.items()}}
        RECORDED.write_text(json.dumps(records | {kind(): figures}, indent=1) + "\n", encoding="utf-8")
        print(RECORDED)
        return 0
    if kind() not in records:
        print(
            f"nothing is recorded for {kind()}; recorded are {', '.join(records)} (--record adds what was measured now)"
        )
        return 0
    found = slower(now, records[kind()]["ratios"])
    print("\n".join(found) or "nothing is slower than recorded")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
