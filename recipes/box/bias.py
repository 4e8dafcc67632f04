"""What the box draws when it is not told, and where it fails: prompts by group, read by the judge, with a montage.

    python -m recipes.box.bias --ckpt runs/box2/box.safetensors --judge runs/judge --out docs/box/bias

The box knows no people, so its biases are those of things, styles, colours and places; its limits are counts, words,
strange things, colours of things and wordings that no caption had. Picks nothing. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from recipes.box.captions import BACKGROUNDS, STYLES
from recipes.box.judge import HEADS, THINGS, answers, load_judge
from recipes.box.things import with_article
from sfumato import __version__
from sfumato.evaluate.probe import Asked, Drawing, Probe, probed
from sfumato.evaluate.probe_files import table, write_answers
from sfumato.pipeline import Pipeline
from sfumato.weights.files import sha256

log = logging.getLogger(__name__)

SEEN = ("style", "background")
ALL = ("placing", "first", *SEEN)
PAIRS = (("cat", "dog"), ("rocket", "house"), ("star", "tree"), ("banana", "car"))
STRANGERS = ("a doctor", "a teapot", "a city at night", "hello", "the word hello", "")
COUNTED = ("cats", "stars", "balloons", "bananas")


class Judged:
    """The judge as a probe's reader: the probabilities of its five answers."""

    def __init__(self, folder: Path) -> None:
        self.judge = load_judge(folder)
        self.facts: Mapping[str, str] = {"reader": "judge", "hash": sha256(folder / "state.safetensors")[:16]}

    def read(self, pictures: Sequence[np.ndarray]) -> Mapping[str, Tensor]:
        """Pictures of 128 px."""
        return {name: found.exp() for name, found in answers(self.judge, np.stack(pictures)).items()}


def questions(things: Sequence[str] = THINGS) -> Iterator[Asked]:
    """Every prompt, with the answers that it asks for where it does."""
    for name in things:
        yield Asked(with_article(name), SEEN, {"first": name, "placing": "single"}, "a thing, no more said")
    for style in STYLES:
        for name in things[:4]:
            words = f"{with_article(name)} sticker" if style == "sticker" else f"{style} {name}"
            yield Asked(words, ("background",), {"first": name, "style": style}, f"a thing in the style {style}")
    for background in BACKGROUNDS:
        ground = with_article(f"{background} background")
        yield Asked(f"a cat on {ground}", ("style",), {"first": "cat", "background": background}, "a background told")
    for a, b in PAIRS:
        first, second = with_article(a), with_article(b)
        yield Asked(f"{first} to the left of {second}", ("style",),
                    {"placing": "beside", "first": a, "second": b}, "two things side by side")  # fmt: skip
        yield Asked(f"{first} above {second}", ("style",),
                    {"placing": "over", "first": a, "second": b}, "two things one above the other")  # fmt: skip
        yield Asked(f"{first} and {second}", ("placing", "first", "second"), {}, "two things, in words it never read")
    for name in COUNTED:
        for number in ("two", "three", "five"):
            yield Asked(f"{number} {name}", ("placing", "first"), {}, f"counts: {number}")
    for prompt in ("a blue banana", "a green dog", "a car, not red", "a cat without a face"):
        yield Asked(prompt, ALL, {}, "colours of things, and denials")
    for prompt in STRANGERS:
        yield Asked(prompt, ALL, {}, "what it never saw, and nothing")


def main() -> None:
    """Command line of the probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="default: the model in the box")
    parser.add_argument("--judge", type=Path, required=True, help="the judge's run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16, help="pictures of each prompt")
    parser.add_argument("--things", type=int, default=len(THINGS), help="how many of the things are asked for")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    probe = Probe(tuple(questions(THINGS[: args.things])), {name: tuple(options) for name, options in HEADS.items()})
    drawing = Drawing(args.samples, args.steps, args.guidance, seed=args.seed)
    pipeline, reader = Pipeline.from_pretrained(args.ckpt, adapters=[]), Judged(args.judge)
    with tqdm(total=len(probe.prompts) * drawing.samples, desc="drawing", unit="pictures") as bar:
        found = list(probed(args.out, pipeline, probe, drawing, reader, bar.update))
    label = Path(args.ckpt).stem if args.ckpt else "box"
    facts = {"sfumato": __version__, "checkpoint": label, "model hash": pipeline.model.hash,
             "drawing": asdict(drawing), "reader": dict(reader.facts)}  # fmt: skip
    tallies, shown = [tally for tally, _ in found], [pictures for _, pictures in found]
    title = f"{label}, {drawing.samples} pictures of each prompt, read by the judge"
    content = write_answers(args.out, facts, probe, tallies, shown, title)
    log.info("%s", table(content["groups"]))


if __name__ == "__main__":
    main()
