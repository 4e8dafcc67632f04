"""The judge: a small network that reads what is in a picture of the box's kind, trained on real pictures alone.

It is trained apart from the box, on pictures that the box never saw, and never used in training it. Five answers: how
many things and how they stand, the first thing (left or above), the second, the style, the background's colour. It
knows the drawings of each thing by heart, so its style is "the drawing of that set"; `style.py` reads style as such.

    python -m recipes.box.judge train --data data/judge data/judge-held --out runs/judge
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import tarfile
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from recipes.box.captions import BACKGROUNDS, STYLES
from recipes.box.things import BOX, COMMON
from sfumato.train.loop import LoopConfig, ema_weights, fit

log = logging.getLogger(__name__)

THINGS = tuple(COMMON[label][0] for label in BOX)
PLACING = ("single", "beside", "over")  # one thing; two, side by side; two, one above the other
HEADS: Mapping[str, Sequence[str]] = {
    "placing": PLACING, "first": THINGS, "second": THINGS, "style": STYLES, "background": tuple(BACKGROUNDS),
}  # fmt: skip
NOTHING = -100  # of the second thing where there is one alone, and of things that are not the box's: no loss
AXES = {"left": 1, "right": 1, "above": 2, "below": 2}
TURNED = ("right", "below")  # the caption's first thing is the picture's second


def truth(facts: Mapping[str, str]) -> tuple[int, ...]:
    """The right answer to each head for a picture with these facts (recipes/box/data.py)."""
    style, background = STYLES.index(facts["style"]), list(BACKGROUNDS).index(facts["background"])
    # By label: two emoji are called "cat", and one of them is the box's.
    first = BOX.index(facts["label"]) if facts["label"] in BOX else NOTHING
    if "relation" not in facts:
        return 0, first, NOTHING, style, background
    pair = (first, BOX.index(facts["second_label"]))
    pair = pair[::-1] if facts["relation"] in TURNED else pair
    return AXES[facts["relation"]], *pair, style, background


@dataclass(frozen=True)
class Judged:
    """Pictures (B, 3, H, W) in [-1, 1] and the right answers (B, 5)."""

    pixels: Tensor
    answers: Tensor


class Pictures:
    """All pictures of some folders of shards, in memory as bytes."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.data: list[bytes] = []
        self.facts: list[dict[str, str]] = []
        for shard in sorted(path for folder in folders for path in folder.glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    if member.name.endswith(".png"):
                        self.data.append(file.read())
                    elif member.name.endswith(".json"):
                        self.facts.append(json.loads(file.read()))
        if not self.data:
            raise ValueError(f"data={', '.join(map(str, folders))}: no pictures there")

    def __len__(self) -> int:
        return len(self.data)

    def only(self, wanted: Callable[[Mapping[str, str]], bool]) -> Pictures:
        """Those whose facts are wanted; there may be none."""
        kept = [index for index, facts in enumerate(self.facts) if wanted(facts)]
        some = copy(self)
        some.data, some.facts = [self.data[index] for index in kept], [self.facts[index] for index in kept]
        return some

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        with Image.open(io.BytesIO(self.data[index])) as image:
            return np.asarray(image.convert("RGB"))

    def batch(self, indices: Sequence[int]) -> Judged:
        pixels = np.stack([self.pixels(index) for index in indices])
        return Judged(as_input(pixels), torch.tensor([truth(self.facts[index]) for index in indices]))


def as_input(pixels: np.ndarray) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class Residual(nn.Module):
    """Two convolutions beside the identity, at half the size."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, before)
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.second_norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.short = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(F.silu(self.second_norm(self.first(F.silu(self.norm(x))))))
        return z + self.short(F.avg_pool2d(x, 2))


class Judge(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> logits (B, n) of each head; the last cells keep their places."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.body = nn.Sequential(Residual(width, 2 * width), Residual(2 * width, 4 * width))
        self.deep = Residual(4 * width, 6 * width)
        self.hidden = nn.Linear(6 * width * 16, 384)
        self.heads = nn.ModuleDict({name: nn.Linear(384, len(answers)) for name, answers in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.deep(self.body(self.stem(images.contiguous(memory_format=torch.channels_last))))
        x = F.silu(self.hidden(F.silu(x).flatten(1)))
        return {name: head(x) for name, head in self.heads.items()}


def disturbed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures a little blurred, noisy, shifted in colour: a judge of drawings must not read pixels."""
    kind = torch.rand(3, generator=generator)
    if kind[0] < 0.4:
        side = int(torch.randint(64, 112, (1,), generator=generator))
        pixels = F.interpolate(F.interpolate(pixels, side, mode="bilinear", antialias=True), pixels.shape[-2:])
    if kind[1] < 0.5:
        pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=generator)
    shift = 0.06 * torch.randn((len(pixels), 3, 1, 1), generator=generator)
    return (pixels + shift).clamp(-1, 1)


class JudgeObjective:
    """Cross-entropy of all heads."""

    def __init__(self, network: Judge) -> None:
        self.network = network

    def loss(self, batch: Judged, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.network(disturbed(batch.pixels, generator))
        losses = {
            name: F.cross_entropy(found[name], batch.answers[:, place], label_smoothing=0.05)
            for place, name in enumerate(HEADS)
            if (batch.answers[:, place] != NOTHING).any()
        }
        return torch.stack(list(losses.values())).sum(), losses


def load_judge(folder: Path) -> Judge:
    """The judge of a finished training, averaged weights."""
    judge = Judge()
    judge.load_state_dict(ema_weights(folder / "state.safetensors"))
    return judge.eval()


@torch.inference_mode()
def answers(judge: Judge, pixels: np.ndarray) -> dict[str, Tensor]:
    """Log probabilities (N, n) of each head for pictures (N, H, W, 3) uint8."""
    parts = [judge(as_input(pixels[start : start + 64])) for start in range(0, len(pixels), 64)]
    return {name: torch.cat([part[name] for part in parts]).log_softmax(1) for name in HEADS}


def scores(found: Mapping[str, Tensor], right: Tensor) -> dict[str, float]:
    """Shares of right answers, right (N, 5): of single pictures top-1 and top-5, of scenes both things and placing."""
    hit = {name: found[name].argmax(1) == right[:, place] for place, name in enumerate(HEADS)}
    single = (right[:, 0] == 0) & (right[:, 1] != NOTHING)
    told: dict[str, float] = {}
    if single.any():
        best = found["first"][single].topk(5).indices
        told["thing top-1"] = hit["first"][single].float().mean().item()
        told["thing top-5"] = (best == right[single, 1:2]).any(1).float().mean().item()
    if (scene := right[:, 0] > 0).any():
        told["placing"] = hit["placing"][scene].float().mean().item()
        told["either thing"] = ((hit["first"] | hit["second"])[scene]).float().mean().item()
        told["both things"] = ((hit["first"] & hit["second"])[scene]).float().mean().item()
        told["both and placing"] = ((hit["first"] & hit["second"] & hit["placing"])[scene]).float().mean().item()
    told["style"] = hit["style"].float().mean().item()
    told["background"] = hit["background"].float().mean().item()
    return told


def train(folders: Sequence[Path], out: Path, steps: int) -> None:
    """Train, or go on."""
    torch.manual_seed(0)
    judge = Judge()
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = LoopConfig(steps, batch_size=48, lr=1e-3, decay="cosine", weight_decay=0.05, ema_decay=0.995)
    fit(JudgeObjective(judge), Pictures(folders), config, out)


def main() -> None:
    """Command line of the judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "test"))
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.what == "train":
        train(args.data, args.out, args.steps)
    pictures = Pictures(args.data)
    chosen = range(0, len(pictures), max(1, len(pictures) // 1000))
    pixels = np.stack([pictures.pixels(index) for index in chosen])
    right = torch.tensor([truth(pictures.facts[index]) for index in chosen])
    judge = load_judge(args.out)
    for name, share in scores(answers(judge, pixels), right).items():
        log.info("%-18s %.3f", name, share)


if __name__ == "__main__":
    main()
