"""Is the memory plan's estimate an upper bound, and a close one? Peak memory of single calls on this CPU, and tiles.

`python benchmarks/memory_plan.py` prints and keeps JSON in benchmarks/results/; given such a file it estimates anew and
measures nothing that is in there. Each case is a process: networks of random weights, one small call, then the peak of
resident memory in the case's call above what was resident before it (VmHWM: ru_maxrss without what is inherited from
the parent). Fits the CPU's constants in sfumato/memory/estimate.py. Linux only.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.families import BOX, SD1, Family
from sfumato.memory.estimate import Kernels, decoder_bytes, unet_bytes
from sfumato.models import tiling
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.unet import UNet

RUNS = 2  # the larger counts: the C library's heap is filled a little differently each time
RESULTS = Path(__file__).parent / "results"
MIB = 2**20
HALF = replace(
    SD1, name="sd1 of half the width", unet=replace(SD1.unet, channels=160),
    autoencoder=replace(SD1.autoencoder, channels=64),
)  # fmt: skip
FAMILIES = {"box": BOX, "half": HALF, "sd1": SD1}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One call: `what` is unet, decode or encode; `number` rows or pictures of size x size px."""

    family: str
    what: str
    size: int
    number: int = 1
    dtype: str = "float32"
    tile: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


CASES = (
    *(Case("box", "unet", size, number) for size, number in ((64, 2), (64, 32), (128, 8), (256, 8), (512, 8))),
    *(Case("box", "decode", size, number) for size, number in ((64, 1), (64, 4), (256, 4), (512, 4), (1024, 4))),
    *(Case("half", "unet", size, number) for size, number in ((256, 1), (256, 8), (512, 1), (512, 2), (768, 2))),
    *(Case("half", "decode", size, number) for size, number in ((256, 1), (256, 4), (512, 1), (768, 1))),
    Case("half", "encode", 512),
    Case("half", "unet", 256, 2, "bfloat16"),
    Case("box", "decode", 256, 4, "bfloat16"),
    Case("sd1", "unet", 512, 2),
    Case("sd1", "decode", 512),
    *(Case("half", "decode", size, tile=256) for size in (256, 512, 1024)),
    *(Case("box", "decode", size, tile=512) for size in (512, 1024, 2048)),
)


def filled(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network from "meta", with small random weights, nothing in memory twice."""
    network = network.to(dtype).to_empty(device="cpu").to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.uniform_(-0.02, 0.02)
    return network


def call_of(case: Case, family: Family) -> Callable[[int, int], Tensor]:
    """The call to measure, by picture size and number."""
    dtype, factor, channels = case.torch_dtype, family.autoencoder.factor, family.unet.in_channels

    def noise(number: int, channels: int, side: int) -> Tensor:
        return torch.randn(number, channels, side, side).to(dtype, memory_format=torch.channels_last)

    with torch.device("meta"):
        built = UNet(family.unet) if case.what == "unet" else Autoencoder(family.autoencoder)
    network = filled(built, dtype)
    if isinstance(network, UNet):
        vector_dim = family.unet.vector_dim

        def unet(size: int, number: int) -> Tensor:
            context = torch.randn(number, 77, family.unet.context_dim).to(dtype)
            vector = None if vector_dim is None else torch.randn(number, vector_dim).to(dtype)
            return network(noise(number, channels, size // factor), torch.full((number,), 500.0), context, vector)

        return unet
    assert isinstance(network, Autoencoder)

    def autoencoder(size: int, number: int) -> Tensor:
        if case.what == "encode":
            return network.encode(noise(number, 3, size)).mean
        z = noise(number, family.autoencoder.latent_channels, size // factor)
        return network.decode(z) if case.tile is None else tiling.decode(network, z, case.tile)

    return autoencoder


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


@torch.inference_mode()
def measure(case: Case) -> int:
    """Bytes that the call takes at its peak, in this process."""
    torch.set_num_threads(1)
    family = FAMILIES[case.family]
    call = call_of(case, family)
    call(2 * family.size_step, 1)  # what the first call alone takes
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts from here
    call(case.size, case.number)
    return status("VmHWM") - before


def estimate(case: Case) -> int:
    """What the plan thinks that the call takes; an encode is thought to take no more than a decode."""
    family = FAMILIES[case.family]
    factor, dtype = family.autoencoder.factor, case.torch_dtype
    h = min(case.size, case.tile or case.size) // factor
    kernels = Kernels(CPU)
    if case.what == "unet":
        return unet_bytes(family.unet, h, h, case.number, dtype, kernels) + kernels.workspace
    taken = decoder_bytes(family.autoencoder, h, h, case.number, dtype, kernels)
    return taken + 4 * 3 * case.size**2 * case.number + kernels.workspace


def peak(case: Case) -> int:
    """Bytes of a case, the largest of RUNS processes of its own."""
    command = [sys.executable, __file__, json.dumps(asdict(case))]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(RUNS)]
    return max(int(run.stdout) for run in runs)


def main(measured: dict[Case, int]) -> list[dict[str, object]]:
    """Print every case's line, measuring those that are not in `measured`."""
    rows = []
    print("family  call       px number dtype      tile  measured  estimate  ratio   (MiB)")
    for case in CASES:
        taken, thought = measured.get(case) or peak(case), estimate(case)
        rows.append(asdict(case) | {"measured": taken, "estimate": thought, "ratio": round(thought / taken, 2)})
        print(
            f"{case.family:7} {case.what:7} {case.size:5} {case.number:6} {case.dtype:9} {case.tile or '':>5}"
            f" {taken / MIB:9.1f} {thought / MIB:9.1f} {thought / taken:6.2f}",
            flush=True,
        )
    return rows


def read(path: Path) -> dict[Case, int]:
    """What a file of results measured."""
    rows = json.loads(path.read_text(encoding="utf-8"))["bytes"]
    return {Case(**{field.name: row[field.name] for field in fields(Case)}): row["measured"] for row in rows}


def write(rows: list[dict[str, object]]) -> Path:
    """Keep the rows of all cases under today's date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"memory_plan-{date.today().isoformat()}.json"
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    path.write_text(json.dumps({"machine": machine, "bytes": rows}, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        print(measure(Case(**json.loads(sys.argv[1]))))
    else:
        print(write(main(read(Path(sys.argv[1])) if sys.argv[1:] else {})))
