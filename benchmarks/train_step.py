"""Seconds of one training step of the U-Net, ours against diffusers', in one loop, in turn.

    python benchmarks/train_step.py [--shapes box sd] [--turns 7] [--threads 2]

Both networks hold the same weights and see the same batches; a step is forward, mean squared error, backward, clipped
gradients, AdamW and the running average, all of it the same code for both. First the losses of three steps are
compared: nobody is fast by being wrong. Then single steps in turn (A B A B ...), as wall seconds and as seconds of the
processor, which other work on the machine disturbs less. The result goes to benchmarks/results/, in a file for
each kind of processor; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 is one without
AVX-512, SFUMATO_KERNELS=0 one without a compiler.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.random_weights import write_random
from sfumato.families import BOX, SD1, Family
from sfumato.kernels.build import library
from sfumato.models import costs
from sfumato.models.layers import hasten
from sfumato.models.unet import UNetConfig
from sfumato.train.optimizers import AdamW
from sfumato.weights.checkpoint import load_model
from sfumato.weights.placing import place

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A U-Net and its batch."""

    family: Family
    batch: int
    side: int  # of the latents


SHAPES = {
    "box": Shape(BOX, 32, BOX.size // BOX.autoencoder.factor),
    # SD 1.5 with half of its channels, a quarter of the area: what fits here
    "sd": Shape(replace(SD1, unet=replace(UNetConfig(), channels=160)), 2, 32),
}


def networks(shape: Shape) -> dict[str, nn.Module]:
    """Ours and diffusers' with the same random weights, in training mode; each as its own trainers hold it."""
    from diffusers import UNet2DConditionModel

    with TemporaryDirectory() as folder:
        write_random(Path(folder) / "model", shape.family, torch.float32)
        ours = load_model(Path(folder) / "model").unet
        theirs = UNet2DConditionModel.from_pretrained(Path(folder) / "model" / "unet", low_cpu_mem_usage=False)
    hasten(ours)
    place(ours, torch.device("cpu"), torch.float32)
    return {"sfumato": ours.requires_grad_(True).train(), "diffusers": theirs.requires_grad_(True).train()}


def stepper(name: str, network: nn.Module, shape: Shape, precision: str) -> Callable[[int], float]:
    """A function that takes training step number n and returns its loss."""
    optimizer = AdamW(network.parameters(), lr=1e-5, betas=(0.9, 0.999))
    average = copy.deepcopy([p.detach() for p in network.parameters()])
    unet = shape.family.unet

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if name == "diffusers":
            return network(x, t, context).sample
        return network(x.contiguous(memory_format=torch.channels_last), t, context)

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(shape.batch, unet.in_channels, shape.side, shape.side, generator=generator)
        t = torch.randint(1000, (shape.batch,), generator=generator)
        context = torch.randn(shape.batch, 77, unet.context_dim, generator=generator)
        target = torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            answer = predict(x, t, context)
        loss = (answer.float() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 0.001)
        return loss.item()

    return step


def measured(shape: Shape, turns: int, precision: str) -> dict[str, object]:
    """Losses of three steps, then seconds of `turns` steps of each in turn."""
    steps = {name: stepper(name, network, shape, precision) for name, network in networks(shape).items()}
    losses = {name: [step(number) for number in range(3)] for name, step in steps.items()}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(3, 3 + turns):
        for name, step in steps.items():
            began, used = time.perf_counter(), time.process_time()
            step(number)
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    ratios = {
        kind: statistics.median(b / a for a, b in zip(taken["sfumato"], taken["diffusers"], strict=True))
        for kind, taken in (("wall", wall), ("processor", processor))
    }
    gap = max(abs(a - b) for a, b in zip(losses["sfumato"], losses["diffusers"], strict=True))
    return {"losses_apart": gap, "wall": wall, "processor": processor, "times_as_fast": ratios}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast, both")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {name: measured(SHAPES[name], args.turns, args.precision) for name in args.shapes}
    for name, row in found.items():
        medians = {who: statistics.median(values) for who, values in row["wall"].items()}  # type: ignore[attr-defined]
        ratios: dict[str, float] = row["times_as_fast"]  # type: ignore[assignment]
        told = ", ".join(f"{who} {seconds:.3f} s" for who, seconds in medians.items())
        print(
            f"{name:4} {told}: {ratios['wall']:.2f} times as fast (processor time {ratios['processor']:.2f}); "
            f"losses apart by {row['losses_apart']:.1e}"
        )
    RESULTS.mkdir(exist_ok=True)
    capability, kernels = costs.capability(), "compiled" if library() else "none"
    parts = "train_step", capability, args.precision, "" if library() else "no-kernels", date.today().isoformat()
    path = RESULTS / f"{'-'.join(part for part in parts if part)}.json"
    machine = {
        "processor": platform.machine(),
        "capability": capability,
        "kernels": kernels,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({"machine": machine, "shapes": found}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
