"""Seconds of one call of the U-Net, ours (plain, and hastened with kept weights) against diffusers', in turn.

    python -m benchmarks.unet_call [--sizes box 256 512] [--turns 5] [--rows 2] [--threads 1]
        [--compile] [--openvino] [--layers]

All hold the same random weights in the same memory, in channels-last order, and see the same input; their answers are
compared before anything is timed. A size in pixels is SD 1.5's U-Net, "box" that of the box's recipe at 128 px.
--compile adds diffusers' network under torch.compile, --openvino the same traced and run by OpenVINO in float32 (pip
install openvino), --layers a table of where the time goes. The result goes to benchmarks/results/. SD 1.5 needs 4 GB,
as much more as it says for kept weights, and 6 GB for OpenVINO.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import apart, keep, median, paired, ratio, roofline
from benchmarks.random_weights import random_tensor
from sfumato.families import BOX, SD1, Family
from sfumato.models.costs import capability
from sfumato.models.layers import Conv2d, hasten
from sfumato.models.unet import UNet
from sfumato.weights.layouts.diffusers_configs import folder_files
from sfumato.weights.layouts.diffusers_names import to_diffusers, unet_keys

PLENTY = 2**40
KINDS = {  # modules of ours and of diffusers' that are timed whole, by class
    "Conv2d": "convolution",
    "CrossAttention": "attention",
    "Attention": "attention",
    "FeedForward": "feed-forward",
    "GroupNorm": "group norm",
    "SiLU": "SiLU",
    "LayerNorm": "layer norm",
    "Linear": "linear",
}


def weights(family: Family) -> dict[str, Tensor]:
    """Random ones by our names; convolutions lie channels last."""
    with torch.device("meta"):
        state = UNet(family.unet).state_dict()
    found = {name: random_tensor(f"unet.{name}", tuple(t.shape), torch.float32).read() for name, t in state.items()}
    return {name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for name, t in found.items()}


def ours(family: Family, state: dict[str, Tensor]) -> UNet:
    """Our network with these tensors, not copies."""
    with torch.device("meta"):
        network = UNet(family.unet)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def theirs(family: Family, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' network with these tensors, not copies."""
    from diffusers import UNet2DConditionModel

    config = json.loads(folder_files(family)["unet/config.json"])
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)
    network.load_state_dict(to_diffusers(state, unet_keys(family.unet)), assign=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def inputs(family: Family, side: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and the context of a call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, family.unet.in_channels, side, side, generator=generator)
    context = torch.randn(rows, 77, family.unet.context_dim, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), torch.full((rows,), 500.0), context


class _Answer(nn.Module):
    """diffusers' network with its answer as a tensor, as tracing wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.network(x, t, encoder_hidden_states=context, return_dict=False)[0]


def by_openvino(network: nn.Module, given: tuple[Tensor, Tensor, Tensor], threads: int) -> Callable[[], Tensor]:
    """A call of diffusers' network traced, converted and compiled for this CPU by OpenVINO, float32 throughout."""
    openvino = importlib.import_module("openvino")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that tracing takes for constants, which they are here
        traced = torch.jit.trace(_Answer(network).eval(), given, check_trace=False)
        converted = openvino.convert_model(traced, example_input=given, input=[tuple(each.shape) for each in given])
    del traced
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    arrays = [each.contiguous().numpy() for each in given]

    def call() -> Tensor:
        return torch.from_numpy(request.infer(arrays, share_inputs=True)[0])

    return call


def drawing(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call in inference mode, as when pictures are drawn; what was made outside it stays what it is."""

    def drawn() -> Tensor:
        with torch.inference_mode():
            return call()

    return drawn


def by_kind(network: nn.Module, call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the processor in one call by kind of layer and cells of its map; the rest is what is left."""
    spent: dict[str, float] = defaultdict(float)
    began: list[float] = []

    def begin(_: nn.Module, __: Any) -> None:
        began.append(time.process_time())

    def end(module: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        seconds = time.process_time() - began.pop()
        if not began:  # the outermost
            x = given[0]
            cells = x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1] if x.ndim == 3 else 1
            kernel = f" {module.kernel_size[0]} x {module.kernel_size[1]}" if isinstance(module, nn.Conv2d) else ""
            spent[f"{KINDS[_class_of(module)]}{kernel} of {cells} cells"] += 1e3 * seconds

    handles = []
    for module in _timed(network):
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    started = time.process_time()
    call()
    total = 1e3 * (time.process_time() - started)
    for handle in handles:
        handle.remove()
    return {**dict(sorted(spent.items(), key=lambda row: -row[1])), "the rest": total - sum(spent.values())}


def _class_of(module: nn.Module) -> str:
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in KINDS), "")


def _timed(module: nn.Module) -> list[nn.Module]:
    """The outermost modules of the kinds: a hook inside another would take it from its quick way."""
    if _class_of(module):
        return [module]
    return [found for child in module.children() for found in _timed(child)]


def measured(family: Family, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one size."""
    state, given = weights(family), inputs(family, side, args.rows)
    plain, peer = ours(family, state), theirs(family, state)
    quick = ours(family, state)
    hasten(quick, keep=PLENTY)
    networks: dict[str, nn.Module] = {"diffusers": peer, "plain": plain, "fast": quick}
    calls: dict[str, Callable[[], Tensor]] = {
        "diffusers": drawing(lambda: peer(*given).sample),
        "plain": drawing(lambda: plain(*given)),
        "fast": drawing(lambda: quick(*given)),
    }
    if args.compile:
        compiled = torch.compile(copy.copy(peer))
        calls["compiled"] = drawing(lambda: compiled(*given).sample)
    if args.openvino:
        calls["openvino"] = by_openvino(peer, given, args.threads)
    answers = {name: call() for name, call in calls.items()}
    apart_by = {name: apart(answer, answers["diffusers"]) for name, answer in answers.items()}
    before = roofline()
    taken = paired(calls, args.turns)
    store = next(m.room for m in quick.modules() if isinstance(m, Conv2d) and m.room is not None)
    found: dict[str, Any] = {
        "rows": args.rows,
        "side": side,
        "largest number": answers["diffusers"].abs().max().item(),
        "apart": apart_by,
        "kept bytes": store.num_bytes,
        "roofline": [before, roofline()],
        "seconds": taken,
        "ratio": {
            name: {clock: ratio(taken[name], taken["diffusers"], clock) for clock in ("wall", "processor")}
            for name in calls
            if name != "diffusers"
        },
    }
    if args.layers:
        found["layers"] = {name: by_kind(network, calls[name]) for name, network in networks.items()}
    return found


def tell(name: str, found: dict[str, Any]) -> None:
    """The figures of one size in words."""
    rates = " and ".join(f"{one['sgemm']:.0f} Gflop/s, {one['copy']:.1f} GB/s" for one in found["roofline"])
    print(f"{name}: {found['rows']} rows of {found['side']} x {found['side']}; before and after: {rates}")
    for who, taken in found["seconds"].items():
        line = f"  {who:10} {median(taken):8.3f} s of the processor, {median(taken, 'wall'):8.3f} s"
        if who in found["ratio"]:
            line += f"; of diffusers' {found['ratio'][who]['processor']}, apart {found['apart'][who]:.1e}"
        print(line)
    print(f"  kept weights {found['kept bytes'] / 2**20:.0f} MiB; numbers up to {found['largest number']:.2f}")
    for who, rows in found.get("layers", {}).items():
        print(f"  {who}: {sum(rows.values()):.0f} ms")
        for kind, spent in rows.items():
            print(f"    {spent:9.1f} ms  {kind}")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["box", "256"], help='"box", or SD 1.5 at so many px')
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--layers", action="store_true")
    args = parser.parse_args()
    if args.openvino and importlib.util.find_spec("openvino") is None:
        parser.error("--openvino: the package openvino is not installed here (pip install openvino)")
    torch.set_num_threads(args.threads)
    figures = {}
    for size in args.sizes:
        family, px = (BOX, BOX.size) if size == "box" else (SD1, int(size))
        figures[size] = measured(family, px // family.autoencoder.factor, args)
        tell(size, figures[size])
    print(keep(f"unet_call-{capability()}", {"sizes": figures}))


if __name__ == "__main__":
    main()
