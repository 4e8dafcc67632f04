"""The box's report card: drawn pictures read by the judge, beside real ones; and each one's nearest training picture.

    python -m recipes.box.report --ckpt runs/box2/box.safetensors --judge runs/judge --data data/box2 \
        --real data/judge-test --real-held-out data/judge-test-held --out docs/box

Prompts are made here in the plainest words: every (thing, style) that training showed, the pairs that it never showed,
and scenes of two things. Nothing is picked. Writes report.json and sheets.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from recipes.box.captions import BACKGROUNDS, RELATIONS, STYLES
from recipes.box.judge import THINGS, Pictures, answers, load_judge, scores, truth
from recipes.box.things import BOX, COMMON, HELD_OUT, with_article
from sfumato.images import grid
from sfumato.pipeline import PRECISIONS, Pipeline
from sfumato.types import Job

log = logging.getLogger(__name__)

BATCH = 16


@dataclass(frozen=True)
class Asked:
    """A prompt and the right answers to the judge's questions."""

    prompt: str
    answers: tuple[int, ...]


def styled(style: str, words: str) -> str:
    """The words in a style, plainly."""
    return f"{words}, {style}" if style == "sticker" else f"{style} {words.removeprefix('a ').removeprefix('an ')}"


def single(label: str, style: str, background: str) -> Asked:
    """One thing: `3d octopus on a blue background`."""
    name = COMMON[label][0]
    facts = {"label": label, "style": style, "background": background}
    ground = f"{background} background" if style == "sticker" else f"on a {background} background"
    joint = ", " if style == "sticker" else " "
    return Asked(
        f"{styled(style, with_article(name))}{joint}{ground}".replace("on a orange", "on an orange"), truth(facts)
    )


def singles(held_out: bool, count: int, rng: np.random.Generator) -> Iterator[Asked]:
    """Pairs of thing and style that training showed, or those that it never did, each as often, backgrounds drawn."""
    pairs = [(label, style) for label in BOX for style in STYLES if ((label, style) in HELD_OUT) is held_out]
    for index in range(count):
        label, style = pairs[index % len(pairs)]
        yield single(label, style, list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))])


def scenes(count: int, rng: np.random.Generator) -> Iterator[Asked]:
    """Two things in a relation."""
    for _ in range(count):
        first, second = rng.choice(len(BOX), 2, replace=False)
        relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
        style = STYLES[int(rng.integers(len(STYLES)))]
        background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        a, b = with_article(THINGS[first]), with_article(THINGS[second])
        words = RELATIONS[relation][0].format(a=a, b=b)
        facts = {"label": BOX[first], "second_label": BOX[second], "relation": relation, "style": style,
                 "background": background}  # fmt: skip
        yield Asked(f"{words}, {style}, {background} background", truth(facts))


def drawn(pipe: Pipeline, asked: Sequence[Asked], seed: int, steps: int | None, guidance: float | None) -> np.ndarray:
    """A picture of each prompt, (N, H, W, 3) uint8."""
    found = []
    for start in tqdm(range(0, len(asked), BATCH), desc="drawing"):
        part = asked[start : start + BATCH]
        jobs = [Job(a.prompt, seed=seed + start + i, steps=steps, guidance=guidance) for i, a in enumerate(part)]
        found += [result.images[0] for result in pipe.draw_many(jobs)]
    return np.stack(found)


def real(folder: Path, count: int, size: int) -> tuple[np.ndarray, Tensor, list[bool]]:
    """Real pictures, the right answers, and which are scenes."""
    pictures = Pictures([folder])
    chosen = range(0, len(pictures), max(1, len(pictures) // count))
    pixels = np.stack([pictures.pixels(index) for index in chosen])
    facts = [pictures.facts[index] for index in chosen]
    return pixels, torch.tensor([truth(each) for each in facts]), ["relation" in each for each in facts]


def small(pixels: np.ndarray, side: int = 32) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, side * side * 3) float32, for comparing."""
    flat = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BOX)) for each in pixels]
    return np.stack(flat).reshape(len(pixels), -1).astype(np.float32)


def nearest(pixels: np.ndarray, data: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """The training picture nearest to each in pixels at 32 px, and its distance (mean of 255)."""
    wanted, best = small(pixels), np.full(len(pixels), np.inf, np.float32)
    place = np.zeros(len(pixels), int)
    for start in tqdm(range(0, len(data), 512), desc="neighbours"):
        part = small(np.stack([data.pixels(index) for index in range(start, min(start + 512, len(data)))]))
        apart = np.abs(wanted[:, None] - part[None]).mean(2) if len(wanted) * len(part) < 2e5 else None
        assert apart is not None, "at most 390 pictures"
        here = apart.argmin(1)
        closer = apart[np.arange(len(wanted)), here]
        place = np.where(closer < best, start + here, place)
        best = np.minimum(best, closer)
    return np.stack([data.pixels(int(index)) for index in place]), best


def save_sheet(path: Path, pixels: np.ndarray) -> None:
    """A sheet of many pictures (H, W, 3) uint8, as JPEG: as PNG it would be five times as large."""
    Image.fromarray(pixels).save(path, quality=90)


def report(args: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """Every share, of drawn and of real pictures."""
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained(args.ckpt, precision=args.precision, adapters=[])
    judge = load_judge(args.judge)
    rng = np.random.default_rng(args.seed)
    found: dict[str, Mapping[str, float]] = {}
    seen: np.ndarray | None = None
    for name, asked in (
        ("seen", list(singles(False, args.count, rng))),
        ("held out", list(singles(True, args.count // 2, rng))),
        ("scenes", list(scenes(args.count // 2, rng))),
    ):
        pixels = drawn(pipe, asked, args.seed, args.steps, args.guidance)
        seen = pixels if seen is None else seen
        right = torch.tensor([each.answers for each in asked])
        found[name] = scores(answers(judge, pixels), right)
        save_sheet(args.out / f"report-{name.replace(' ', '-')}.jpg", grid(pixels[:96], columns=12))
    pixels, right, is_scene = real(args.real, 2000, pipe.model.family.size)
    scene = torch.tensor(is_scene)
    told = answers(judge, pixels)
    found["real"] = scores({head: log_probs[~scene] for head, log_probs in told.items()}, right[~scene])
    found["real scenes"] = scores({head: log_probs[scene] for head, log_probs in told.items()}, right[scene])
    pixels, right, _ = real(args.real_held_out, 500, pipe.model.family.size)
    found["real held out"] = scores(answers(judge, pixels), right)
    assert seen is not None
    beside, apart = nearest(seen[:100], Pictures(args.data))
    log.info("nearest training picture: %.1f of 255 away in the mean, %.1f at least", apart.mean(), apart.min())
    found["nearest training picture"] = {"mean distance": float(apart.mean()), "least": float(apart.min())}
    pairs = np.stack([seen[:100], beside], 1).reshape(-1, *seen.shape[1:])
    save_sheet(args.out / "neighbours.jpg", grid(pairs, columns=20))
    return found


def main() -> None:
    """Command line of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="default: the model in the box")
    parser.add_argument("--judge", type=Path, required=True, help="the judge's run")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the training pictures")
    parser.add_argument("--real", type=Path, required=True, help="other real pictures")
    parser.add_argument("--real-held-out", type=Path, required=True, help="and those of pairs that were held out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=592, help="pictures of seen pairs; half as many of the others")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="full", help="of the drawing (default: full)")
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = report(args)
    for name, shares in found.items():
        log.info("%s: %s", name, ", ".join(f"{what} {share:.3f}" for what, share in shares.items()))
    (args.out / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
