"""What each way to compute less saves, how far its pictures are from the exact ones and from real ones.

    python -m benchmarks.fewer_operations --data data/box2 [--precision bf16] [--quick FILE] [--points reuse tome]

For each setting: 8 prompts from some seeds, drawn exactly and in that way in turn, which gives the speed (seconds of
the processor, so that other programs count little) and the distance; then --samples captions of --data, whose features
are compared with those of the real pictures. A setting is kept as soon as it is done: the same command goes on after
the last one. Prints the table of docs/fewer-operations.md and draws its figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import machine
from sfumato.cli.evaluate import Looked, captions_of
from sfumato.evaluate.features import Network, features_of, open_features
from sfumato.evaluate.measuring import LEAST, measured
from sfumato.evaluate.quality import psnr, ssim
from sfumato.evaluate.sweep import shuffled_numbers, write_json
from sfumato.images.files import written_beside
from sfumato.memory.allocator import keep_freed_memory
from sfumato.pipeline import Pipeline
from sfumato.train.data import open_pictures
from sfumato.types import Job
from sfumato.weights.files import load_safetensors, open_tensors, save_safetensors, sha256

HERE = Path(__file__).parent
PROMPTS = (
    "a red apple on a white background", "3d octopus on a blue background", "a cartoon cat on a yellow background",
    "flat rocket on a black background", "a guitar", "3d hamburger on a pink background", "sticker of a sunflower",
    "a cartoon penguin on a light blue background",
)  # fmt: skip
OTHER_SEEDS = 2**20  # what is added to seeds for other pictures of the same captions
RESIZE = "clean"
TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30)  # of the figure


@dataclass(frozen=True)
class Setting:
    """A method at one strength: the fields of a Job that it changes, or how the model is loaded.

    `loaded` are keywords of Pipeline.from_pretrained; `behind` is put behind every prompt; `quick`: of the model that
    was distilled; `shift` is added to seeds.
    """

    method: str
    strength: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    loaded: Mapping[str, Any] = field(default_factory=dict)
    behind: str = ""
    quick: bool = False
    shift: int = 0

    @property
    def name(self) -> str:
        """What --points and the results call it."""
        return f"{self.method} {self.strength}".strip()

    def jobs(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
        """A job of each prompt and its seed."""
        pairs = zip(prompts, seeds, strict=True)
        return [Job(prompt + self.behind, seed=seed + self.shift, **self.fields) for prompt, seed in pairs]


EXACT = Setting("exact")


def _steps(sampler: str, *steps: int) -> list[Setting]:
    return [Setting(sampler, f"{n} steps", {"sampler": sampler, "steps": n}) for n in steps]


def settings_of(precision: str, quick: Path | None) -> tuple[Setting, ...]:
    """All settings; those of a distilled model where there is one. Against "other seeds" every distance is large."""
    found = [
        EXACT,
        Setting("other seeds", shift=OTHER_SEEDS),
        *_steps("dpmpp_2m", 20, 15, 10, 8, 6, 4),
        *_steps("euler", 30, 20, 10),
        *_steps("ddim", 30, 20, 10),
        *_steps("unipc", 15, 10, 6),
        *(Setting("reuse", text, {"reuse": text}) for text in ("2", "3", "5", "2:3", "3:3", "5:3")),
        *(Setting("reuse 2 with", f"{n} steps", {"reuse": "2", "steps": n}) for n in (20, 15)),
        *(Setting("tome", f"{ratio:g}", {"tome": ratio}) for ratio in (0.25, 0.5, 0.75)),
        *(Setting("guidance ends", f"at {end:g}", {"guidance_end": end}) for end in (0.75, 0.5, 0.25)),
        *(
            Setting("guidance interval", f"{low:g} to {high:g}", {"guidance_low": low, "guidance_high": high})
            for low, high in ((0.3, 20.0), (0.3, 8.0), (1.0, 8.0))
        ),
        *(Setting("guidance thin", f"below {sigma:g}", {"guidance_thin": sigma}) for sigma in (1.0, 5.0)),
        *(Setting("weights", kind, loaded={"weights": kind}) for kind in ("int8", "fp8")),
        *(Setting("precision", name, loaded={"precision": name}) for name in ("fp32", "bf16") if name != precision),
    ]
    if precision == "fp32":
        found.append(Setting("fast", loaded={"fast": True}))
    if quick is not None:
        taught, behind = {"guidance": 1.0}, f" <lora:{quick.stem}:1>" if is_adapter(quick) else ""
        for sampler in ("lcm", "tcd"):
            for n in (1, 2, 4):
                fields = {"sampler": sampler, "steps": n, **taught}
                found.append(Setting(f"distilled {sampler}", f"{n} steps", fields, behind=behind, quick=True))
        found += _steps("ddim", 4, 2)  # its teacher in as few
    return tuple(found)


def chosen(settings: Sequence[Setting], points: Sequence[str] | None) -> list[Setting]:
    """Those whose method or name is among `points`, in their own order; ValueError names one that is none."""
    for point in points or ():
        if not any(point in (each.method, each.name) for each in settings):
            known = ", ".join(dict.fromkeys(each.method for each in settings))
            raise ValueError(f"points={point!r}: one of {known}, or one of them with its strength, such as 'reuse 2'")
    return [each for each in settings if not points or each.method in points or each.name in points]


def is_adapter(path: Path) -> bool:
    """Whether a file holds an adapter, and no whole checkpoint."""
    with open_tensors(path) as file:
        return any(name.endswith(("lora_down.weight", "lora_A.weight")) for name in file.names())


class Pipelines:
    """Pipelines as settings want them loaded: the exact one, and the last other one."""

    def __init__(self, ckpt: Path | None, precision: str, quick: Path | None) -> None:
        self.ckpt, self.precision, self.quick = ckpt, precision, quick
        self._kept: dict[str, Pipeline] = {}

    def of(self, setting: Setting) -> Pipeline:
        """The pipeline that draws a setting."""
        whole = setting.quick and not setting.behind
        key = repr((sorted(setting.loaded.items()), setting.quick))
        if key not in self._kept:
            exact = repr(([], False))
            self._kept = {name: pipe for name, pipe in self._kept.items() if name == exact}
            adapters = self.quick.parent if setting.quick and self.quick is not None else None
            ckpt = self.quick if whole else self.ckpt
            how: dict[str, Any] = {"precision": self.precision, **setting.loaded}
            self._kept[key] = Pipeline.from_pretrained(ckpt, device="cpu", adapters=adapters, **how)
        return self._kept[key]


def draw(pipe: Pipeline, jobs: Sequence[Job]) -> tuple[list[np.ndarray], float]:
    """Pictures (H, W, 3) uint8 of jobs drawn together, and the seconds of the processor that they took."""
    began = time.process_time()
    results = pipe.draw_many(jobs)
    return [result.images[0] for result in results], time.process_time() - began


def three(values: Sequence[float]) -> dict[str, float]:
    """The median, and the quartiles beside it."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def distances(pictures: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Of each picture (H, W, 3) uint8 from its exact one, as `three` tells them; the PSNR of equal ones is left out."""
    pairs = list(zip(pictures, exact, strict=True))
    found = {
        "levels": [float(np.abs(one.astype(np.int16) - other).mean()) for one, other in pairs],
        "ssim": [ssim(one, other) for one, other in pairs],
        "psnr": [value for one, other in pairs if np.isfinite(value := psnr(one, other))],
    }
    return {kind: three(values) for kind, values in found.items() if values}


def compared(pipelines: Pipelines, setting: Setting, prompts: Sequence[str], seeds: int, batch: int) -> dict[str, Any]:
    """Speed and distance: every seed's prompts drawn exactly and in this way in turn, `batch` pictures together.

    The first exact ones and the first others are drawn once more before, and not counted.
    """
    ways = (EXACT, setting)
    drawn: list[list[np.ndarray]] = [[], []]
    seconds: list[list[float]] = [[], []]
    for way in ways:
        draw(pipelines.of(way), way.jobs(prompts[:batch], [0] * len(prompts[:batch])))
    for seed in range(seeds):
        for some in pieces(prompts, batch):
            for number, way in enumerate(ways):
                pictures, taken = draw(pipelines.of(way), way.jobs(some, [seed] * len(some)))
                drawn[number] += pictures
                seconds[number].append(taken / len(some))
    ratios = [exact / own for exact, own in zip(*seconds, strict=True)]
    return {
        "seconds": statistics.median(seconds[1]),
        "times as fast": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "distance": distances(drawn[1], drawn[0]),
        "pictures": len(drawn[1]),
    }


def pieces(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """`size` of them at a time, in order."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


@dataclass(frozen=True)
class Reference:
    """What drawn pictures are compared with: the features of real ones, and the captions to draw."""

    network: Network
    real: Tensor
    captions: Sequence[str]

    @classmethod
    def of(cls, network: Network, data: Path, samples: int, most: int, seed: int, kept: Path) -> Reference:
        """The first `most` pictures and `samples` captions in the seed's order; features lie in `kept` between runs.

        ValueError where the set has fewer than 10 pictures.
        """
        pictures = open_pictures(data)
        captions = captions_of(pictures, samples, seed)
        numbers = shuffled_numbers(len(pictures), most, seed)
        key = repr((network.name, network.hash, RESIZE, str(data.resolve()), len(pictures), seed, len(numbers)))
        if kept.exists():
            tensors, facts = load_safetensors(kept)
            if facts.get("key") == key:
                return cls(network, tensors["real"].clone(), captions)
        read = Looked(pictures, network.size)
        found = (picture for number in tqdm(numbers, "reading", disable=None) for picture in read.read([number]))
        real = features_of(network, found, RESIZE)
        if len(real) < LEAST:
            raise ValueError(f"data={str(data)!r}: {LEAST} readable pictures or more are needed, {len(real)} are there")
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(kept, {"real": real}, {"key": key})
        return cls(network, real, captions)


def from_real(pipe: Pipeline, setting: Setting, reference: Reference, batch: int) -> dict[str, dict[str, Any]]:
    """Frechet distance, KID, precision and recall of a picture of each caption; names say of which features."""
    captions, network = reference.captions, reference.network
    found = []
    for start in tqdm(range(0, len(captions), batch), setting.name, leave=False, disable=None):
        some = captions[start : start + batch]
        pictures, _ = draw(pipe, setting.jobs(some, range(start, start + len(some))))
        found.append(features_of(network, pictures, RESIZE))
    return measured([network], {network.name: reference.real}, {network.name: torch.cat(found)}, RESIZE)


def begun(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The results so far; ValueError, in one line, where a file holds those of another run."""
    if not path.exists():
        return {"run": run, "machine": machine(), "rows": {}}
    try:
        told = json.loads(path.read_text("utf-8"))
        before, rows = dict(told["run"]), dict(told["rows"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"out={str(path)!r}: no results of this benchmark; name another file") from error
    for name in run:
        if before.get(name) != run[name]:
            was = f"it is of {name}={before.get(name)!r}, now {run[name]!r}"
            raise ValueError(f"out={str(path)!r}: {was}; name another file")
    return told | {"rows": rows}


def table(rows: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    """The page's table in Markdown: medians and quartiles over pictures, and the distance from real pictures."""
    head = ["", "", "times as fast", "levels", "PSNR, dB", "SSIM"]
    head += [] if metric is None else [metric, metric.replace("-fid", "-kid")]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        near = row["distance"]
        psnrs = "same" if "psnr" not in near else f"{near['psnr']['median']:.1f}"
        levels = near["levels"]
        cells = [
            row["method"], row["strength"], f"{row['times as fast']['median']:.2f}",
            f"{levels['median']:.1f} ({levels['low']:.1f} to {levels['high']:.1f})", psnrs,
            f"{near['ssim']['median']:.3f}",
        ]  # fmt: skip
        if metric is not None:
            both = (row["metrics"][name]["value"] for name in (metric, metric.replace("-fid", "-kid")))
            cells += [f"{value:.4g}" for value in both]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def draw_figure(path: Path, rows: Sequence[Mapping[str, Any]], metric: str | None) -> None:
    """Speed against the distance from the exact picture, and against that from real ones: a line for each method."""
    from matplotlib.figure import Figure

    panels = 1 if metric is None else 2
    figure = Figure(figsize=(6 * panels, 5.5), layout="constrained")
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != EXACT.method]
    marks = "osv^D<>PX*"
    for number, method in enumerate(methods):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["times as fast"]["median"])
        x = [row["times as fast"]["median"] for row in own]
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": marks[number // 10], "label": method}
        levels = [row["distance"]["levels"] for row in own]
        middle = [each["median"] for each in levels]
        spread = [[each["median"] - each["low"] for each in levels], [each["high"] - each["median"] for each in levels]]
        all_axes[0].errorbar(x, middle, spread, capsize=2, **style)
        if metric is not None:
            all_axes[1].plot(x, [row["metrics"][metric]["value"] for row in own], **style)
    all_axes[0].set_ylabel("mean difference, levels of 255: median, quartiles")
    all_axes[0].set_yscale("symlog", linthresh=1)
    all_axes[0].set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50])
    all_axes[0].yaxis.set_major_formatter("{x:g}")
    all_axes[0].set_ylim(bottom=0)
    if metric is not None:
        exact = [row for row in rows if row["method"] == EXACT.method]
        facts = rows[0]["metrics"][metric]
        all_axes[1].set_ylabel(f"{metric}, {facts['drawn']:,} drawn, {facts['real']:,} real")
        for row in exact:
            all_axes[1].axhline(row["metrics"][metric]["value"], color="black", linestyle=":", label="exact")
    for axes in all_axes:
        axes.set_xlabel("times as fast as exact")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    if methods:
        all_axes[-1].legend(fontsize=7)
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="real pictures with captions, as sfumato evaluate takes them")
    add("--ckpt", type=Path, metavar="FILE", help="another model than the box")
    add("--quick", type=Path, metavar="FILE", help="what sfumato train consistency made of it, adapter or checkpoint")
    add("--points", nargs="+", metavar="NAME", help="only these methods or settings (reuse, 'reuse 2'; default: all)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of all settings (default: %(default)s)")
    add("--prompts", type=int, default=len(PROMPTS), metavar="N", help="of the distance (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="of each prompt (default: %(default)s)")
    add("--samples", type=int, default=512, metavar="N",
        help="pictures of each setting against the real ones; 0: none (default: %(default)s)")  # fmt: skip
    add("--reference", type=int, default=2048, metavar="N", help="real pictures, at most (default: %(default)s)")
    add("--features", default="mobilenet-v2", metavar="NAME[:FILE]", help="what sees them (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="pictures drawn together (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    usual = HERE / "results" / f"fewer_operations-{date.today().isoformat()}.json"
    add("--out", type=Path, default=usual, metavar="FILE", help="results; what is in it is not measured again")
    add("--figure", type=Path, default=HERE.parent / "docs" / "fewer-operations.png", metavar="FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """ValueError, in one line, for numbers out of range and what is not there."""
    for name, most in (("prompts", len(PROMPTS)), ("seeds", None), ("batch", None), ("threads", None)):
        value = getattr(args, name)
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name}={value}: 1 {'or more is needed' if most is None else f'to {most} are allowed'}")
    for name in ("samples", "reference"):
        value = getattr(args, name)
        if value < LEAST and (name, value) != ("samples", 0):
            raise ValueError(f"{name}={value}: {LEAST} or more are needed")
    if args.samples and args.data is None:
        raise ValueError("data: real pictures with captions are needed, or --samples 0")
    if args.quick is not None and not args.quick.is_file():
        raise ValueError(f"quick={str(args.quick)!r}: no such file")


def run(args: argparse.Namespace) -> None:
    """Measure what is not there yet, print, draw."""
    check(args)
    settings = settings_of(args.precision, args.quick)
    wanted = chosen(settings, args.points)
    pipelines = Pipelines(args.ckpt, args.precision, args.quick)
    facts: dict[str, Any] = {
        name: getattr(args, name) for name in ("precision", "prompts", "seeds", "samples", "batch", "threads")
    }
    facts["model"] = pipelines.of(EXACT).model.hash
    reference = None
    if args.samples:
        network = open_features(args.features)
        kept = args.out.with_suffix(".real.safetensors")
        reference = Reference.of(network, args.data, args.samples, args.reference, 0, kept)
        facts |= {"features": [network.name, network.hash], "data": args.data.resolve().name}
        facts["real"] = len(reference.real)
    told = begun(args.out, facts)
    quick = "" if args.quick is None else sha256(args.quick)[:16]
    rows: dict[str, Any] = told["rows"]
    for setting in tqdm(wanted, "settings", disable=None):
        if setting.name in rows and (not setting.quick or rows[setting.name]["quick"] == quick):
            continue
        row: dict[str, Any] = {"method": setting.method, "strength": setting.strength}
        row |= compared(pipelines, setting, PROMPTS[: args.prompts], args.seeds, args.batch)
        if setting.quick:
            row["quick"] = quick
        if reference is not None:
            row["metrics"] = from_real(pipelines.of(setting), setting, reference, args.batch)
        rows[setting.name] = row
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, told)
    shown = [rows[setting.name] for setting in settings if setting.name in rows]
    metric = None if reference is None else next(name for name in shown[0]["metrics"] if name.endswith("fid"))
    print(table(shown, metric))
    draw_figure(args.figure, shown, metric)
    print(args.out, args.figure, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = flags().parse_args(argv)
    keep_freed_memory()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, args.threads))
        run(args)
    except ValueError as error:
        print(f"fewer_operations: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
