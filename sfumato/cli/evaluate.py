"""Measure a model: draw captions of real pictures at several guidances and compare, or compare two sets of pictures.

  sfumato evaluate --data PATH --features inception:FILE clip:FILE --out DIR
  sfumato evaluate --a DIR --b DIR --features mobilenet-v2
  sfumato evaluate scores --data PATH --predictor FILE --clip FILE
  sfumato evaluate --join a/results.json b/results.json --out DIR
  sfumato evaluate probe --prompts FILE --features clip:FILE --out DIR

FID, FID-infinity, KID, precision and recall of any network's features; Inception score of Inception's; CMMD, CLIP-FID
and CLIP score of a CLIP's. A run that is stopped goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sfumato import __version__
from sfumato.cli import names
from sfumato.cli.loading import add_device_flags, speed_flags
from sfumato.cli.probing import SAMPLES as PROBED
from sfumato.cli.probing import add_probe_flags, run_probe
from sfumato.cli.scoring import tell_scores

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from torch import Tensor

    from sfumato.evaluate.features import Network
    from sfumato.evaluate.sweep import Advance, Sweep
    from sfumato.pipeline import Pipeline
    from sfumato.train.data import Pictures

log = logging.getLogger(__name__)

REFERENCE = 10_000  # real pictures, where the set has so many
GUIDANCE = "1.5,2,3,4,5,6,7,8"  # those that the model cards of Stable Diffusion 1 show
STEPS, SAMPLER, SAMPLES = 50, "plms", 2000  # as there; they had 10,000 pictures


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("action", nargs="?", choices=["scores", "probe"],
        help="scores: aesthetic scores of --data by --predictor and --clip; probe: what is drawn of --prompts, counted "
        "as --features read it")  # fmt: skip
    add("--data", metavar="PATH", help="real pictures with captions: shards, a folder, JSON lines or Parquet")
    add("--a", metavar="PATH", help="compare these pictures (real) ...")
    add("--b", metavar="PATH", help="... with these, and draw nothing")
    add("--join", nargs="+", metavar="FILE", help="results.json of several sweeps: one figure of all their points, "
        "drawing nothing")  # fmt: skip
    add("--features", nargs="+", metavar="NAME[:FILE]", default=[], help=f"networks: {', '.join(names.FEATURES)}")
    add("--resize", choices=names.RESIZERS, default="clean",
        help="how pictures get a network's size (default: %(default)s)")  # fmt: skip
    add("--out", metavar="DIR", help="pictures, features, results.json and figure.png go there")
    add = parser.add_argument_group("drawing").add_argument
    add("--ckpt", nargs="+", metavar="PATH", default=[None], help="checkpoints (default: the model in the box)")
    add("--ema", action="store_true", help="use the averaged weights of full training checkpoints")
    add("--guidance", metavar="LIST", help=f"(default: {GUIDANCE}; probe: the model's own, one)")
    add("--steps", type=int, metavar="N", help=f"(default: {STEPS}; probe: the model's own)")
    add("--sampler", metavar="NAME", help=f"(default: {SAMPLER}; probe: the model's own)")
    add("--samples", type=int, metavar="N",
        help=f"pictures of each guidance, or of each prompt (default: {SAMPLES}; probe: {PROBED})")  # fmt: skip
    add("--reference", type=int, metavar="N", default=REFERENCE, help="real pictures, at most (default: %(default)s)")
    add("--seed", type=int, metavar="N", default=0, help="of the captions' order and the noise (default: %(default)s)")
    add("--batch", type=int, metavar="N", default=16, help="pictures drawn together (default: %(default)s)")
    add("--fast", action="store_true", help="on a CPU: each layer in its fastest way, which rounds differently")
    add_probe_flags(parser)
    add = parser.add_argument_group("scores").add_argument
    add("--predictor", metavar="FILE", help="linear or MLP predictor, as LAION publishes them")
    add("--clip", metavar="FILE", help="a CLIP whose image tower makes the embeddings (names of CLIPModel)")
    add_device_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if args.action == "scores":
        return tell_scores(args)
    if args.action == "probe":
        return run_probe(args, labels_of(args.ckpt))
    if args.join:
        return join(args)
    if args.data and (args.a or args.b):
        raise ValueError("data: either --data, to draw, or --a and --b")
    if args.a or args.b:
        return compare(args)
    if not args.data:
        raise ValueError("data: say with --data what to draw and compare with, or with --a and --b what to compare")
    return draw_and_measure(args)


# --- what both need


def _networks(args: argparse.Namespace) -> list[Network]:
    from sfumato.evaluate.features import FEATURES, open_features
    from sfumato.pipeline import choose_device

    if not args.features:
        raise ValueError(f"features: name one or more with --features, of {', '.join(FEATURES)}")
    names = [text.partition(":")[0] for text in args.features]
    if len(set(names)) < len(names):
        raise ValueError(f"features={' '.join(names)!r}: each network once")
    device = choose_device(args.device)
    return [open_features(text).to(device) for text in args.features]


class Looked:
    """Reads pictures of a set, and counts what it had to change or leave out."""

    def __init__(self, pictures: Pictures, least: int) -> None:
        self.pictures, self.least = pictures, least
        self.grey = self.small = 0

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Those that can be read."""
        from sfumato.train.data.pictures import read

        found = []
        for number in numbers:
            got = read(self.pictures, number, need_caption=False)
            if got is not None:
                pixels = got[0]
                self.grey += bool((pixels == pixels[..., :1]).all())
                self.small += min(pixels.shape[:2]) < self.least
                found.append(pixels)
        return found

    def lines(self) -> list[str]:
        """What a person should know of the set."""
        name = str(self.pictures.path)
        lines = [f"{name}: {self.grey:,} grey pictures, taken as colour ones"] if self.grey else []
        if self.small:
            lines.append(f"{name}: {self.small:,} pictures below {self.least} px a side, enlarged")
        return lines + (self.pictures.report.lines() if self.pictures.report.broken else [])


def _told(results: dict[str, dict[str, Any]]) -> None:
    for metric, entry in results.items():
        spread = f" +- {entry['deviation']:.4g}" if "deviation" in entry else ""
        facts = f"{entry['features']} {entry['hash'][:8]}, {entry['resize']}, {entry['real']:,} / {entry['drawn']:,}"
        print(f"{metric:28} {entry['value']:12.6g}{spread}  ({facts})")


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="pictures", leave=False, file=sys.stderr, disable=None)


# --- two sets


def compare(args: argparse.Namespace) -> int:
    """--a and --b: measure two sets of pictures."""
    from sfumato.evaluate.measuring import measured
    from sfumato.evaluate.sweep import write_json
    from sfumato.train.data import open_pictures

    for name in ("a", "b"):
        if getattr(args, name) is None:
            raise ValueError(f"{name}: both --a and --b are needed")
    sets = [open_pictures(path, need_captions=False) for path in (args.a, args.b)]
    networks = _networks(args)
    found = []
    for pictures in sets:
        looked = Looked(pictures, max(network.size for network in networks))
        with _bar(len(pictures), str(pictures.path)) as bar:
            found.append(_in_memory(networks, looked, args, bar.update))
        print("\n".join(looked.lines()), end="\n" if looked.lines() else "")
    results = measured(networks, found[0], found[1], args.resize, args.seed)
    _told(results)
    if args.out:
        content = {"sfumato": __version__, "a": args.a, "b": args.b, "metrics": results}
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out) / "results.json", content)
    return 0


def _in_memory(
    networks: Sequence[Network], looked: Looked, args: argparse.Namespace, advance: Advance
) -> dict[str, Tensor]:
    """Features by network of all pictures that can be read."""
    import torch

    from sfumato.evaluate.resizing import resized

    parts: dict[str, list[Tensor]] = {network.name: [torch.zeros(0, network.dim)] for network in networks}
    total, batch = len(looked.pictures), max(1, args.batch)
    for start in range(0, total, batch):
        pictures = looked.read(range(start, min(start + batch, total)))
        for network in networks if pictures else ():
            parts[network.name].append(network(resized(pictures, network.size, args.resize)))
        advance(min(batch, total - start))
    return {name: torch.cat(part) for name, part in parts.items()}


# --- drawing


def draw_and_measure(args: argparse.Namespace) -> int:
    """--data: draw, measure, write results.json and figure.png."""
    from sfumato.evaluate.features import facts_of
    from sfumato.evaluate.figure import draw_figure
    from sfumato.evaluate.measuring import check_count, measured
    from sfumato.evaluate.statistics import save_statistics, statistics_of
    from sfumato.evaluate.sweep import Sweep, drawn_features, key_of, once, write_json
    from sfumato.pipeline import Pipeline
    from sfumato.train.data import open_pictures

    if args.out is None:
        raise ValueError("out: say with --out DIR where pictures and results go")
    usual = {"guidance": GUIDANCE, "steps": STEPS, "sampler": SAMPLER, "samples": SAMPLES}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("samples", "reference", "batch", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: 1 or more is needed")
    check_count("samples", args.samples)
    guidance = guidance_of(args.guidance)
    labels = labels_of(args.ckpt)
    pictures = open_pictures(args.data)
    captions = captions_of(pictures, args.samples, args.seed)
    sweep = Sweep(tuple(captions), guidance, args.steps, args.sampler, args.seed, args.batch)
    networks = _networks(args)
    out = Path(args.out)
    real = _real(args, pictures, networks, out / "real")
    for network in networks:
        check_count("real", len(real[network.name]))
        save_statistics(
            out / f"real-{network.name}.safetensors", statistics_of(real[network.name], facts_of(network, args.resize))
        )
    points: dict[tuple[str, float], dict[str, Any]] = {}
    source = f"{Path(args.data).resolve().name}, {len(pictures)} pictures"

    def measure(label: str, pipeline: Pipeline, scale: float, wait: bool, advance: Advance) -> None:
        """Draw what lacks, measure and tell it; without `wait`, nothing where another process measures it now."""
        folder = out / f"{label}-guidance-{scale:g}"
        drawn = drawn_features(folder, pipeline, sweep, scale, networks, args.resize, advance)
        facts = [asdict(facts_of(network, args.resize)) for network in networks]
        key = key_of(json.dumps([__version__, facts, args.seed, captions]), real, drawn)
        results = once(
            folder / "metrics.json",
            key,
            lambda: measured(networks, real, drawn, args.resize, args.seed, captions),
            wait,
        )
        if results is not None:
            points[label, scale] = _point(label, pipeline, sweep, scale, results)
            _told(results)
            ordered = [points[at] for at in product(labels, guidance) if at in points]
            write_json(out / "results.json", {"sfumato": __version__, "data": source, "points": ordered})

    with _bar(len(labels) * len(guidance) * len(captions), "drawing") as bar:
        for label, path in labels.items():
            pipeline = Pipeline.from_pretrained(
                path, args.device, args.precision, use_ema=args.ema, fast=args.fast, **speed_flags(args)
            )
            for scale in guidance:
                measure(label, pipeline, scale, False, bar.update)
            for scale in guidance:
                if (label, scale) not in points:
                    measure(label, pipeline, scale, True, lambda count: None)
    draw_figure(out / "figure.png", [points[at] for at in product(labels, guidance)])
    print(out / "results.json", out / "figure.png", sep="\n")
    return 0


def join(args: argparse.Namespace) -> int:
    """--join: the points of several results.json as one, with one figure."""
    from sfumato.evaluate.figure import draw_figure
    from sfumato.evaluate.joining import join_files
    from sfumato.evaluate.sweep import write_json

    if args.out is None:
        raise ValueError("out: say with --out DIR where results.json and figure.png go")
    out = Path(args.out)
    paths = [Path(name) for name in args.join]
    if (out / "results.json").resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"out={str(out)!r}: its results.json is one of those to join; another folder is needed")
    results = join_files(paths)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    draw_figure(out / "figure.png", results["points"])
    print(out / "results.json", out / "figure.png", sep="\n")
    return 0


def _point(label: str, pipeline: Pipeline, sweep: Sweep, guidance: float, results: dict[str, Any]) -> dict[str, Any]:
    print(f"{label}, guidance {guidance:g}")
    return {
        "checkpoint": label,
        "model hash": pipeline.model.hash,
        "precision": pipeline.model.precision,
        "guidance": guidance,
        "steps": sweep.steps,
        "sampler": sweep.sampler,
        "seed": sweep.seed,
        "samples": len(sweep.captions),
        "metrics": results,
    }


def guidance_of(text: str) -> tuple[float, ...]:
    """Numbers between commas; ValueError where they are none, or one comes twice."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"guidance={text!r}: numbers between commas are needed, such as {GUIDANCE}") from error
    if len(set(found)) < len(found) or not np.isfinite(found).all():
        raise ValueError(f"guidance={text!r}: finite numbers, each once, are needed")
    return found


def labels_of(paths: Sequence[str | None]) -> dict[str, str | None]:
    """A name for each checkpoint: its file's, numbered where several have the same."""
    found: dict[str, str | None] = {}
    for path in paths:
        name = "box" if path is None else Path(path).stem
        label, number = name, 1
        while label in found:
            number += 1
            label = f"{name}-{number}"
        found[label] = path
    return found


def captions_of(pictures: Pictures, count: int, seed: int) -> list[str]:
    """Captions to draw, in the seed's order, over and over where there are too few.

    Those that cannot be read or are not there are left out and reported. ValueError where there are none.
    """
    from sfumato.evaluate.sweep import shuffled_numbers

    found: list[str] = []
    for number in shuffled_numbers(len(pictures), len(pictures), seed):
        if len(found) == count:
            break
        caption = _caption(pictures, number)
        if caption is not None:
            found.append(caption)
    if not found:
        raise ValueError(f"data={str(pictures.path)!r}: no captions there")
    return [found[index % len(found)] for index in range(count)]


def _caption(pictures: Pictures, number: int) -> str | None:
    from sfumato.train.data.pictures import caption_in, line_of

    try:
        caption = caption_in(pictures.facts(number))
        if caption is None:
            raise ValueError("no caption")
    except (ValueError, OSError) as error:
        pictures.report.note_broken(pictures.name(number), line_of(error))
        return None
    return caption


def _real(args: argparse.Namespace, pictures: Pictures, networks: Sequence[Network], folder: Path) -> dict[str, Tensor]:
    """Features of the real pictures, the first ones of the captions' order."""
    from sfumato.evaluate.sweep import begin, gathered, shuffled_numbers

    numbers = shuffled_numbers(len(pictures), min(args.reference, len(pictures)), args.seed)
    looked = Looked(pictures, max(network.size for network in networks))
    run = {"data": Path(args.data).resolve().name, "pictures": len(pictures), "seed": args.seed, "batch": args.batch}
    begin(folder, run, networks, args.resize)

    def make(places: range) -> list[np.ndarray]:
        return looked.read([numbers[place] for place in places])

    def key(places: range) -> str:
        return repr([pictures.name(numbers[place]).removeprefix(str(pictures.path)) for place in places])

    with _bar(len(numbers), "reading") as bar:
        found = gathered(folder, len(numbers), args.batch, networks, args.resize, make, key, bar.update)
    if lines := looked.lines():
        print("\n".join(lines))
    return found
