"""`sfumato evaluate probe`: what a model draws when it is not told, and how often what it is told."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from sfumato import __version__

log = logging.getLogger(__name__)

SAMPLES = 32  # pictures of each prompt: a share's interval is then 34 % wide at most


def add_probe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only the probe has."""
    add = parser.add_argument_group("probe").add_argument
    add("--prompts", metavar="FILE", help="prompts and attributes, TOML or JSON (docs/evaluation.md)")
    add("--shown", type=int, metavar="N", default=8, help="pictures in a row of the montage (default: %(default)s)")


def run_probe(args: argparse.Namespace, labels: dict[str, str | None]) -> int:
    """Draw a probe's prompts with each checkpoint, read them, write results.json, table.md and montage.png."""
    from sfumato.evaluate.features import FEATURES, open_features
    from sfumato.evaluate.probe import Drawing, probed
    from sfumato.evaluate.probe_files import read_probe, table, write_answers
    from sfumato.evaluate.readers import reader_of
    from sfumato.pipeline import Pipeline, choose_device

    for name, wanted in (("prompts", "the file of prompts and attributes"), ("out", "where pictures and results go")):
        if getattr(args, name) is None:
            raise ValueError(f"{name}: say with --{name} {wanted}")
    if args.shown < 1:
        raise ValueError(f"shown={args.shown}: 1 or more is needed")
    if len(args.features) != 1:
        raise ValueError(f"features: one network reads the pictures, of {', '.join(FEATURES)}; name it with --features")
    probe, options = read_probe(args.prompts)
    drawing = Drawing(
        SAMPLES if args.samples is None else args.samples, args.steps, _guidance(args.guidance), args.sampler,
        args.seed, args.batch,
    )  # fmt: skip
    reader = reader_of(open_features(args.features[0]).to(choose_device(args.device)), options, args.resize)
    total = len(labels) * len(probe.prompts) * drawing.samples
    with tqdm(total=total, desc="drawing", unit="pictures", leave=False, file=sys.stderr, disable=None) as bar:
        for label, path in labels.items():
            pipeline = Pipeline.from_pretrained(path, args.device, args.precision, use_ema=args.ema)
            folder = Path(args.out) / label
            answers = list(probed(folder, pipeline, probe, drawing, reader, bar.update, args.shown))
            facts = {
                "sfumato": __version__,
                "checkpoint": label,
                "model hash": pipeline.model.hash,
                "drawing": asdict(drawing),
                "reader": dict(reader.facts),
            }
            title = f"{label}, {drawing.samples} pictures of each prompt, seed {drawing.seed}"
            tallies, shown = [tally for tally, _ in answers], [pictures for _, pictures in answers]
            content = write_answers(folder, facts, probe, tallies, shown, title)
            print(table([*content["groups"], *content["prompts"]]))
            print(*(folder / name for name in ("results.json", "table.md", "montage.png")), sep="\n")
    return 0


def _guidance(text: str | None) -> float | None:
    """One number, or None for the model's own."""
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise ValueError(f"guidance={text!r}: a probe has one guidance, a number") from error
