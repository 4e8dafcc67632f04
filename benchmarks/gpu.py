"""How fast a GPU draws: our U-Net eager, compiled, as CUDA graphs, against diffusers' eager and compiled, in one run.

    python -m benchmarks.gpu [--sizes sd15 xl] [--precision fp16] [--weights full] [--turns 3] [--no-peers]
    python -m benchmarks.gpu --device cpu --tiny

"sd15" is SD 1.5 at 512 px with 50 steps, one picture, told in U-Net steps a second (a step: two rows, guided); "xl" is
SD XL at 1024 px with 30 steps, told in seconds of the U-Net's part of a picture. All hold the same random weights and
see the same inputs; answers are compared before anything is timed, and all are timed in turn. The first call of each,
with what is compiled or recorded there, is told by itself. --tiny takes networks of the same kind, thousands of times
smaller, on any device. The result goes to benchmarks/results/ unless the networks are tiny.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import keep
from benchmarks.unet_call import ours, theirs, weights
from sfumato.families import SD1, XL, Family
from sfumato.families.conditioning import size_vector
from sfumato.models.compiling import Compiled, why_not
from sfumato.models.graphs import Graphs
from sfumato.models.quantised import WEIGHTS, quantise
from sfumato.models.unet import UNet

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """What is drawn: a family's U-Net, the side in pixels, steps, and the families' names in the table."""

    family: Family
    px: int
    steps: int


SIZES = {"sd15": Size(SD1, 512, 50), "xl": Size(XL, 1024, 30)}


def tiny(size: Size) -> Size:
    """The same kind of U-Net, thousands of times smaller, at 64 px, with two steps."""
    config = size.family.unet
    small = replace(
        config,
        channels=32,
        num_res_blocks=1,
        transformer_depth=tuple(min(depth, 1) for depth in config.transformer_depth),
        middle_depth=min(config.middle_depth, 1),
        num_heads=config.num_heads if config.head_channels else 4,
        head_channels=config.head_channels and 16,
        norm_groups=8,
    )
    return Size(replace(size.family, unet=small), 64, 2)


def inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, t, context and, where the family has one, the vector of a guided picture: two rows."""
    config, side = size.family.unet, size.px // size.family.autoencoder.factor
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    given = {
        "x": noise(2, config.in_channels, side, side).contiguous(memory_format=torch.channels_last),
        "t": torch.full((2,), 500.0, device=device),
        "context": noise(2, 77, config.context_dim),
    }
    if config.vector_dim is None:
        return given
    told = dict.fromkeys(("original", "target"), (size.px, size.px)) | {"crop": (0, 0)}
    numbers = size_vector(size.family.size_cond, told, size.family.size_dim).to(device, dtype).expand(2, -1)
    return given | {"vector": torch.cat([noise(2, config.vector_dim - numbers.shape[1]), numbers], dim=1)}


def added(size: Size, vector: Tensor) -> dict[str, Tensor]:
    """XL's vector as diffusers wants it: the pooled text, and the six numbers, of which it makes sinusoids itself."""
    pooled = vector.shape[1] - 6 * size.family.size_dim
    numbers = torch.tensor([[size.px, size.px, 0, 0, size.px, size.px]] * 2, device=vector.device, dtype=torch.float32)
    return {"text_embeds": vector[:, :pooled], "time_ids": numbers}


def peers_call(network: Callable[..., Any], size: Size, given: dict[str, Tensor]) -> Call:
    """A call of diffusers' network."""
    told = {"added_cond_kwargs": added(size, given["vector"])} if "vector" in given else {}

    def call() -> Tensor:
        answer: Tensor = network(given["x"], given["t"], given["context"], return_dict=False, **told)[0]
        return answer

    return call


@contextmanager
def ways_of(
    network: UNet, peer: nn.Module | None, size: Size, given: dict[str, Tensor], backend: str | None
) -> Iterator[dict[str, Call]]:
    """Every way by its name, each with a copy of the modules over the same weights; `backend` None compiles nothing."""
    device = given["x"].device
    calls: dict[str, Call] = {"eager": lambda: network(**given)}
    copies = {name: shared(network) for name in ("compiled", "graphs", "compiled, graphs")}
    removed: list[Compiled | Graphs] = []
    for name, other in copies.items():
        if ("compiled" in name and backend is None) or ("graphs" in name and device.type != "cuda"):
            continue
        if backend is not None and "compiled" in name:
            removed.append(Compiled(other, backend=backend))
        removed += [Graphs(other)] if "graphs" in name else []
        calls[name] = lambda other=other: other(**given)  # type: ignore[misc]
    if peer is not None:
        calls["diffusers"] = peers_call(peer, size, given)
        if backend is not None:
            calls["diffusers, compiled"] = peers_call(torch.compile(shared(peer), backend=backend), size, given)
    yield calls
    for each in removed:
        each.remove()


def shared(network: nn.Module) -> Any:
    """A copy of a network's modules whose weights are the network's own."""
    own = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, dict(own))


def seconds(call: Call, steps: int, device: torch.device) -> float:
    """Wall seconds of so many calls, one behind the other, to the end of the device's work."""
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        call()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measured(size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way's steps and of its first call, and how far its answer is from our eager one."""
    device, dtype = torch.device(args.device), PRECISIONS[args.precision]
    with torch.inference_mode(False), torch.no_grad():
        state = {name: tensor.to(device, dtype) for name, tensor in weights(size.family).items()}
        network, peer = ours(size.family, state), theirs(size.family, state) if args.peers else None
        if args.weights != "full":
            network = ours(size.family, {name: tensor.clone() for name, tensor in state.items()})
            quantise(network, args.weights)
    given = inputs(size, device, dtype)
    reason = why_not(device)
    found: dict[str, Any] = {"first": {}, "apart": {}, "seconds": {}, "compile": reason or "yes"}
    with ways_of(network, peer, size, given, None if reason else args.backend) as calls:
        exact = calls["eager"]().float()
        for name, call in calls.items():
            found["first"][name] = seconds(call, 1, device)
            seconds(call, 3, device)
            found["apart"][name] = ((call().float() - exact).abs().max() / exact.abs().max()).item()
            found["seconds"][name] = []
        for _ in range(args.turns):
            for name, call in calls.items():
                found["seconds"][name].append(seconds(call, size.steps, device))
    found["peak bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return found


def tell(name: str, size: Size, found: dict[str, Any]) -> None:
    """The table of one size."""
    if found["compile"] != "yes":
        print(f"{name}: nothing is compiled, because {found['compile']}")
    print(f"{name}, {size.px} px, {size.steps} steps of two rows:")
    for who, taken in found["seconds"].items():
        best = sorted(taken)[len(taken) // 2]
        print(
            f"  {who:20} {size.steps / best:8.2f} steps a second, {best:8.3f} s a picture; first call "
            f"{found['first'][who]:6.1f} s; apart {found['apart'][who]:.1e}"
        )


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="(default: fp16, on a CPU fp32)")
    parser.add_argument("--weights", choices=WEIGHTS, default="full")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without diffusers")
    parser.add_argument("--tiny", action="store_true")
    return parser


def main(words: list[str] | None = None) -> int:
    """Measure, print, keep."""
    args = flags().parse_args(words)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("gpu: there is no CUDA card here; --device cpu --tiny runs all of it at tiny size")
        return 1
    if args.precision is None:
        args.precision = "fp32" if args.device == "cpu" else "fp16"
    figures = {}
    for name in args.sizes:
        size = tiny(SIZES[name]) if args.tiny else SIZES[name]
        figures[name] = measured(size, args)
        tell(name, size, figures[name])
    if not args.tiny:
        card = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
        told = {"card": card, "precision": args.precision, "weights": args.weights}
        print(keep("gpu", {**told, "sizes": figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
