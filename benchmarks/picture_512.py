"""One picture of Stable Diffusion's size by each program, from the start of its process to the saved file.

    python -m benchmarks.picture_512 [--family sd1] [--size 512] [--steps 20] [--turns 1] [--threads 1]
        [--programs plain fast vram diffusers compiled] [--vram GIB] [--dir KEPT]

Random float32 weights are written once (SD 1.5: 4.3 GB) and read once, so that all find them in the system's cache. The
programs take turns; all begin from the same noise, and their pictures are compared. Seconds before loading, of loading,
of the U-Net's calls, of decoding, of all; the most resident memory (Linux) as a share of the weights' bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a program's own imports are a part of what is timed
    from sfumato.families import Family

PROMPT, NEGATIVE = "a photo of an astronaut riding a horse on mars", "blurry, watermark"
SEED, GUIDANCE, BLOCK = 7, 5.0, 2**24
FLAGS: dict[str, tuple[str, ...]] = {"plain": (), "fast": ("--fast",), "vram": ("--vram",)}  # of our command line
PROGRAMS = (*FLAGS, "diffusers", "compiled")


class Watch:
    """Seconds and calls by stage in this process, and the most resident memory until a stage's last end."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.wall = {"before": 0.0, "load": 0.0, "unet": 0.0, "decode": 0.0}
        self.processor = dict(self.wall)
        self.calls = dict.fromkeys(self.wall, 0)
        self.peaks: dict[str, int] = {}

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls counted to a stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began, used = time.perf_counter(), time.process_time()
            if stage == "load":
                self.wall["before"], self.processor["before"] = began - self.began, used
            result = function(*args, **kwargs)
            self.wall[stage] += time.perf_counter() - began
            self.processor[stage] += time.process_time() - used
            self.calls[stage] += 1
            self.peaks[stage] = resident()["VmHWM"]
            return result

        return call

    def figures(self) -> dict[str, Any]:
        """All that is known at the process's end."""
        return {
            "wall": self.wall,
            "processor": self.processor | {"whole": time.process_time()},
            "calls": self.calls["unet"],
            "peak": resident()["VmHWM"],
            "peaks": self.peaks,
            "at the end": resident(),
        }


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: the most until now, and now, of files and else."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("VmHWM", "RssFile", "RssAnon")}


def ours(folder: Path, out: Path, side: int, steps: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """The command `sfumato txt2img` in this process, its picture saved as `out`."""
    watch = Watch()
    from sfumato.cli.main import main as command
    from sfumato.models.autoencoder import Autoencoder
    from sfumato.models.unet import UNet
    from sfumato.pipeline import Pipeline

    Pipeline.from_pretrained = watch.timed("load", Pipeline.from_pretrained)  # type: ignore[method-assign]
    UNet.forward = watch.timed("unet", UNet.forward)  # type: ignore[method-assign]
    Autoencoder.decode = watch.timed("decode", Autoencoder.decode)  # type: ignore[method-assign]
    outdir = out.with_suffix("")
    # `timed` gives functions: those of classes become methods again, and from_pretrained is bound already
    code = command(
        ["txt2img", "--ckpt", str(folder), "--prompt", PROMPT, "--negative", NEGATIVE, "--sampler", "ddim", "--steps",
         str(steps), "--scale", str(GUIDANCE), "--seed", str(SEED), "--H", str(side), "--W", str(side), "--like",
         "diffusers", "--skip_grid", "--outdir", str(outdir), "--precision", "full", "--device", "cpu", *flags]
    )  # fmt: skip
    if code:
        raise RuntimeError(f"sfumato txt2img ended with code {code}")
    next(outdir.rglob("*.png")).rename(out)
    return watch.figures()


def theirs(folder: Path, out: Path, side: int, steps: int, compiled: bool) -> dict[str, Any]:
    """diffusers' pipeline in this process, without the safety checker."""
    watch = Watch()
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    load = watch.timed("load", DiffusionPipeline.from_pretrained)
    pipe = load(folder, torch_dtype=torch.float32, **({} if is_xl(folder) else {"safety_checker": None}))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading", clip_sample=False
    )
    forward = torch.compile(pipe.unet.forward) if compiled else pipe.unet.forward
    pipe.unet.forward = watch.timed("unet", forward)
    pipe.vae.decode = watch.timed("decode", pipe.vae.decode)
    drawn = pipe(
        PROMPT, negative_prompt=NEGATIVE, height=side, width=side, num_inference_steps=steps,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    drawn.images[0].save(out)
    return watch.figures()


def is_xl(folder: Path) -> bool:
    """Whether a diffusers folder is for its XL pipeline, which knows no safety checker."""
    return "XL" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]


def family_of(name: str) -> Family:
    """A known family, or "small": SD 1.5 with a tenth of its channels, to try this program out."""
    from dataclasses import replace

    from sfumato.families import SD1, find_family

    if name != "small":
        return find_family(name)
    tower = SD1.texts[0]
    text = replace(tower, config=replace(tower.config, width=32, num_layers=2, num_heads=2))
    unet = replace(SD1.unet, channels=32, num_res_blocks=1, context_dim=32)
    return replace(SD1, texts=(text,), unet=unet, autoencoder=replace(SD1.autoencoder, channels=32))


def warm(folder: Path) -> None:
    """Read every file once."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(BLOCK):
                    pass


def run(program: str, folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One program in a process of its own; RuntimeError with its last words where it fails."""
    command = [sys.executable, "-m", "benchmarks.picture_512", "--one", program, str(folder), str(out)]
    command += ["--size", str(args.size), "--steps", str(args.steps), "--vram", str(args.vram)]
    threads = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{program}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    figures["wall"]["whole"] = wall
    return figures


def measured(args: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Every program's runs in turn, their ratios to diffusers', peaks over the weights, and how far pictures are."""
    import torch

    from benchmarks.harness import Taken, ratio
    from benchmarks.random_weights import write_random
    from sfumato.memory.estimate import network_numbers

    family = family_of(args.family)
    folder = base / args.family
    write_random(folder, family, torch.float32)
    warm(folder)
    weights = 4 * sum(network_numbers(family).values())
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in args.programs}
    for _ in range(args.turns):
        for program in args.programs:
            runs[program].append(run(program, folder, base / f"{program}.png", args))
            tell(program, runs[program][-1], weights)
    found: dict[str, Any] = {"family": family.name, "size": args.size, "steps": args.steps, "threads": args.threads}
    found |= {"vram": args.vram, "weights": weights, "runs": runs, "ratio": {}}
    found["peak of weights"] = {name: max(one["peak"] for one in some) / weights for name, some in runs.items()}
    if "diffusers" in runs:
        taken = {
            n: [Taken(one["wall"]["whole"], one["processor"]["whole"]) for one in some] for n, some in runs.items()
        }
        for name in (name for name in runs if name != "diffusers"):
            found["ratio"][name] = {k: ratio(taken[name], taken["diffusers"], k) for k in ("wall", "processor")}
        found["apart"] = apart({name: base / f"{name}.png" for name in runs})
    return found


def apart(pictures: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """How far each is from diffusers' picture, in steps of 255: worst and mean. Its own spread beside it."""
    import numpy as np
    from PIL import Image

    shown = {name: np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) for name, path in pictures.items()}
    peer = shown.pop("diffusers")
    far = {name: np.abs(picture - peer) for name, picture in shown.items()}
    found = {name: {"worst": float(each.max()), "mean": float(each.mean())} for name, each in far.items()}
    return found | {"diffusers": {"std": float(peer.std())}}


def tell(program: str, figures: Mapping[str, Any], weights: int) -> None:
    """A run in one line."""
    processor = figures["processor"]
    seconds = "  ".join(f"{stage} {taken:.1f} ({processor[stage]:.1f})" for stage, taken in figures["wall"].items())
    peaks = "  ".join(f"{stage} {bytes_ / weights:.2f}" for stage, bytes_ in figures["peaks"].items())
    print(f"{program:10} seconds (of the processor): {seconds}; {figures['calls']} calls")
    print(f"{'':10} peak {figures['peak'] / 1e9:.2f} GB; until a stage's end, of the weights: {peaks}", flush=True)


def main() -> int:
    """Measure, print, keep; with --one be one of the programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sd1", help='a family\'s name, or "small" to try it out')
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=["plain", "fast", "diffusers"])
    parser.add_argument("--vram", type=float, default=4.7, help="GiB that the program vram is given")
    parser.add_argument("--dir", type=Path, help="keep weights and pictures here (default: a temporary folder)")
    parser.add_argument("--one", nargs=3, metavar=("PROGRAM", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        program, folder, out = args.one[0], Path(args.one[1]), Path(args.one[2])
        if program in FLAGS:
            flags = (*FLAGS[program], *([str(args.vram)] if program == "vram" else []))
            figures = ours(folder, out, args.size, args.steps, flags)
        else:
            figures = theirs(folder, out, args.size, args.steps, program == "compiled")
        print(json.dumps(figures))
        return 0
    from benchmarks.harness import keep

    with TemporaryDirectory() as temporary:
        found = measured(args, args.dir or Path(temporary))
    for name, share in found["peak of weights"].items():
        line = f"{name:10} peak {share:.2f} of the weights"
        if name in found["ratio"]:
            both = found["ratio"][name]
            line += f"; of diffusers' wall time {both['wall']}, of its processor time {both['processor']}"
            line += f"; picture apart at most {found['apart'][name]['worst']:.0f} of 255"
        print(line)
    if args.family != "small":
        print(keep(f"picture-{args.family}-{args.size}", found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
