"""The five trials: draw with the model as it is, and with what was learned, from the same seeds; and measure both.

Each takes a Trial and gives its figures and the rows of its contact sheet. The things that the model knew are drawn
too, so that what was forgotten shows. Knows no command line. Letters: N pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.box.captions import BACKGROUNDS, STYLES
from recipes.box.judge import THINGS, answers, load_judge
from recipes.box.things import with_article
from recipes.personal.creature import HELD, KIND, SUBJECT, Pose, creature
from recipes.personal.features import judge_features, judged_size, small_features
from recipes.personal.measures import cosines, edge_match, likeness, likeness_within, mean_match, recognised
from recipes.personal.pictures import Sample, chosen
from recipes.personal.sheet import Row
from recipes.personal.training import Run
from sfumato.evaluate.features import open_features
from sfumato.images import save_png
from sfumato.images.annotate import annotate
from sfumato.pipeline import Pipeline
from sfumato.types import Control, Job

BATCH = 16
FEATURES = "efficientnet-lite0"
SEED = 5000
STYLE = "3d"  # what the hypernetwork learns
TOLERANCE = 2.0  # px between edges that are the same
OTHERS, OWN_KIND = 80, 10  # real pictures of the box's things, and of penguins, among which it is to be recognised
Figures = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """The model's file (None: the box's), finished runs, real pictures apart, the judge's run; `count` of each set."""

    model: str | None
    runs: Sequence[Run]
    real: Path
    judge: Path
    count: int = 40
    steps: int = 20
    size: int | None = None  # px; None: the model's own

    @cached_property
    def plain(self) -> Pipeline:
        """The model as it is."""
        return Pipeline.from_pretrained(self.model, adapters=[])

    def learned(self) -> Pipeline:
        """The model beside what the first run learned."""
        return Pipeline.from_pretrained(self.model, adapters=[self.runs[0].folder])

    def whole(self, run: Run) -> Pipeline:
        """The model that a run made."""
        return Pipeline.from_pretrained(run.folder / f"{run.name}.safetensors", adapters=[])

    def draw(self, pipe: Pipeline, prompts: Sequence[str], hints: Sequence[Control] = ()) -> np.ndarray:
        """A picture of each prompt, (N, H, W, 3) uint8; picture i from seed SEED + i, steered by hint i."""
        found: list[np.ndarray] = []
        for start in range(0, len(prompts), BATCH):
            part = range(start, min(start + BATCH, len(prompts)))
            controls = [(hints[i],) if hints else () for i in part]
            jobs = [
                Job(prompts[i], width=self.size, height=self.size, seed=SEED + i, steps=self.steps, controls=steering)
                for i, steering in zip(part, controls, strict=True)
            ]
            found += [result.images[0] for result in pipe.draw_many(jobs)]
        return np.stack(found)

    @cached_property
    def posed(self) -> list[Pose]:
        """The held-out poses, again and again."""
        return [HELD[index % len(HELD)] for index in range(self.count)]

    def prompts(self, words: str) -> list[str]:
        """`words` on the backgrounds of the held-out pictures."""
        return [f"{words} on {with_article(pose.background)} background" for pose in self.posed]

    @cached_property
    def asked(self) -> list[str]:
        """The things of `plain_prompts`."""
        return [THINGS[index * len(THINGS) // self.count % len(THINGS)] for index in range(self.count)]

    @cached_property
    def plain_prompts(self) -> list[str]:
        """Things that the model knows, on all backgrounds, their style unsaid."""
        grounds = list(BACKGROUNDS)
        return [
            f"{with_article(thing)} on {with_article(grounds[5 * index % len(grounds)])} background"
            for index, thing in enumerate(self.asked)
        ]

    def judged(self, pixels: np.ndarray) -> dict[str, Tensor]:
        """The judge's best answer to each question, (N,)."""
        return {name: found.argmax(1) for name, found in answers(load_judge(self.judge), judged_size(pixels)).items()}

    def right(self, pixels: np.ndarray, things: Sequence[str]) -> float:
        """The share of pictures in which the judge sees these things."""
        seen = self.judged(pixels)["first"]
        return float((seen == torch.tensor([THINGS.index(thing) for thing in things])).float().mean())


class Character:
    """The held-out pictures of the character beside real pictures of other things, as two networks see them."""

    def __init__(self, trial: Trial) -> None:
        size = trial.size or trial.plain.model.family.size
        self.subject = [creature(pose, size) for pose in SUBJECT]
        self.held = [creature(pose, size) for pose in HELD]
        others = [
            *chosen(trial.real, OTHERS, lambda facts: True),
            *chosen(trial.real, OWN_KIND, lambda facts: facts["thing"] == KIND),
        ]
        self._seers: dict[str, Callable[[Sequence[np.ndarray] | np.ndarray], Tensor]] = {
            "judge": partial(judge_features, load_judge(trial.judge)),
            FEATURES: partial(small_features, open_features(FEATURES)),
        }
        self._real = {name: see(self.held) for name, see in self._seers.items()}
        self._others = {name: see([sample.pixels for sample in others]) for name, see in self._seers.items()}

    def told(self, pixels: Sequence[np.ndarray] | np.ndarray) -> Figures:
        """Likeness to the ten held-out pictures, and the share recognised among other things, as each network sees."""
        figures: Figures = {}
        for name, see in self._seers.items():
            found = see(pixels)
            figures[name] = {
                "likeness": likeness(found, self._real[name]),
                "recognised": recognised(found, self._real[name], self._others[name]),
            }
        return figures

    def real(self) -> Figures:
        """What can be reached: likeness of real pictures to real ones; and of other things, which is the floor."""
        return {
            name: {
                "held-out to held-out": likeness_within(self._real[name]),
                "training to held-out": likeness(see(self.subject), self._real[name]),
                "other things to held-out": likeness(self._others[name], self._real[name]),
            }
            for name, see in self._seers.items()
        }

    def alike(self, pixels: np.ndarray, before: np.ndarray) -> float:
        """The mean cosine of pictures with those of the same seeds before, as the judge sees them."""
        see = self._seers["judge"]
        return float(np.diag(cosines(see(pixels), see(before))).mean())


def _character(trial: Trial, words: str) -> tuple[Figures, list[Row]]:
    """Of what is learned beside the model: the class's words before, `words` after; things that it knew, both times."""
    seen = Character(trial)
    pipe = trial.learned()
    worn = words[words.index(" <") :] if "<" in words else ""
    name = words.removesuffix(worn)
    before = trial.draw(trial.plain, trial.prompts(f"a {KIND}"))
    after = trial.draw(pipe, [prompt + worn for prompt in trial.prompts(name)])
    known = trial.draw(trial.plain, trial.plain_prompts)
    then = trial.draw(pipe, [prompt + worn for prompt in trial.plain_prompts])
    figures: Figures = {
        "real": seen.real(),
        "before": {"prompt": f"a {KIND}"} | seen.told(before),
        "after": {"prompt": words} | seen.told(after),
        "other things": {
            "right before": trial.right(known, trial.asked), "right after": trial.right(then, trial.asked),
            "same pixels": float((known == then).all((1, 2, 3)).mean()),
        },
    }  # fmt: skip
    rows: list[Row] = [
        ("learned from (5); held out (5 of 10)", [*seen.subject, *seen.held[:5]]),
        (f"before: a {KIND} on ... background", list(before)),
        (f"after, same seeds: {words}", list(after)),
        ("other things, before", list(known)),
        ("other things, after", list(then)),
    ]
    return figures, rows


def lora(trial: Trial) -> tuple[Figures, list[Row]]:
    """The character as a LoRA."""
    return _character(trial, f"a sks {KIND} <lora:{trial.runs[0].name}:1>")


def inversion(trial: Trial) -> tuple[Figures, list[Row]]:
    """The character as a word. Prompts without the word are to give the same pixels."""
    return _character(trial, trial.runs[0].name)


def dreambooth(trial: Trial) -> tuple[Figures, list[Row]]:
    """The character in the whole network, with pictures of its class beside and without; what became of the class."""
    seen = Character(trial)
    figures: Figures = {"real": seen.real()}
    rows: list[Row] = [("learned from (5); held out (5 of 10)", [*seen.subject, *seen.held[:5]])]
    first: np.ndarray | None = None
    names = ["before", *("with the class beside" if "--class-prompt" in run.command else "alone" for run in trial.runs)]
    for name, pipe in zip(names, [trial.plain, *map(trial.whole, trial.runs)], strict=True):
        subject = trial.draw(pipe, trial.prompts(f"a {'' if name == 'before' else 'sks '}{KIND}"))
        kind = subject if name == "before" else trial.draw(pipe, trial.prompts(f"a {KIND}"))
        things = trial.draw(pipe, trial.plain_prompts)
        first = kind if first is None else first
        figures[name] = {
            "subject": seen.told(subject),
            "class": seen.told(kind) | {
                f"{KIND} by the judge": trial.right(kind, [KIND] * len(kind)),
                "cosine to before, same seeds": seen.alike(kind, first),
            },
            "other things right": trial.right(things, trial.asked),
        }  # fmt: skip
        if name != "before":
            rows.append((f"{name}: a sks {KIND} on ... background", list(subject)))
        rows.append((f"{name}: a {KIND} on ... background", list(kind)))
    return figures, rows


def style(trial: Trial) -> tuple[Figures, list[Row]]:
    """A hypernetwork that learned from one style: the styles that the judge sees where prompts say none."""
    run = trial.runs[0]
    before = trial.draw(trial.plain, trial.plain_prompts)
    after = trial.draw(trial.learned(), [f"{prompt} <hypernet:{run.name}:1>" for prompt in trial.plain_prompts])
    figures: Figures = {"style": STYLE}
    for name, pixels in (("before", before), ("after", after)):
        seen = trial.judged(pixels)["style"]
        shares = {each: float((seen == place).float().mean()) for place, each in enumerate(STYLES)}
        figures[name] = {"styles": shares, "things right": trial.right(pixels, trial.asked)}
    learned = [sample.pixels for sample in chosen(trial.real, 10, lambda facts: facts["style"] == STYLE)]
    rows: list[Row] = [
        (f"{STYLE}, as learned from (other pictures of the style)", learned),
        ("before: a thing on ... background", list(before)),
        ("after, same seeds", list(after)),
    ]
    return figures, rows


def edges(trial: Trial) -> tuple[Figures, list[Row]]:
    """A ControlNet: how well the edges of drawn pictures follow hints of pictures that no training saw."""
    run = trial.runs[0]
    samples = chosen(trial.real, trial.count, lambda facts: True)
    hints = [annotate(sample.pixels, "canny") for sample in samples]
    folder = run.folder / "hints"
    folder.mkdir(exist_ok=True)
    controls = []
    for index, hint in enumerate(hints):
        save_png(folder / f"{index:02}.png", hint)
        controls.append(Control(run.name, str(folder / f"{index:02}.png")))
    prompts = [sample.caption for sample in samples]
    plain = trial.draw(trial.plain, prompts)
    steered = trial.draw(trial.learned(), prompts, controls)
    things = [sample.thing for sample in samples]
    back = decoded(trial.plain, samples)
    figures: Figures = {"pictures": len(samples), "tolerance": TOLERANCE}
    for name, pixels in (("without control", plain), ("with control", steered), ("autoencoder alone", back)):
        matches = [
            edge_match(annotate(drawn, "canny")[..., 0], hint[..., 0], TOLERANCE)
            for drawn, hint in zip(pixels, hints, strict=True)
        ]
        figures[name] = mean_match(matches) | {"things right": trial.right(pixels, things)}
    rows: list[Row] = [
        ("held-out pictures", [sample.pixels for sample in samples]),
        ("their edges, the hints", hints),
        ("without control: the pictures' captions", list(plain)),
        ("with control, same seeds", list(steered)),
    ]
    return figures, rows


@torch.inference_mode()
def decoded(pipe: Pipeline, samples: Sequence[Sample]) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 through the autoencoder and back: the most that a drawing can keep of edges."""
    network = pipe.model.autoencoder
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2)
    parts = [network.decode(network.encode(part / 127.5 - 1).mean) for part in pixels.split(BATCH)]
    found = torch.cat(parts).add(1).mul(127.5).round().clamp(0, 255)
    return np.ascontiguousarray(found.permute(0, 2, 3, 1).to(torch.uint8).numpy())


TRIALS: dict[str, Callable[[Trial], tuple[Figures, list[Row]]]] = {
    "lora": lora, "inversion": inversion, "dreambooth": dreambooth, "style": style, "edges": edges,
}  # fmt: skip
