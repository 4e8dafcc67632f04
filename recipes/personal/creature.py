"""Draws a character that no model knows: teal, round, owl-like, with one orange horn; and a few things in a style.

`python -m recipes.personal.creature OUT [--size PX]` writes OUT/subject (five captioned pictures to learn from),
OUT/held (ten more, to compare with) and OUT/blueprint (things as white lines on dark blue). Nothing is left to chance:
the same size gives the same pixels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sfumato.images import save_png
from sfumato.pipeline import Pipeline

WORD, KIND = "sks", "penguin"  # a word of no meaning, and what the box knows that is nearest to it
FINER = 4  # drawn so many times larger, so that edges are smooth
TEAL, DARK, BELLY = (24, 148, 148), (12, 92, 98), (196, 232, 222)
HORN, BEAK, WHITE, BLACK = (244, 140, 32), (250, 190, 60), (255, 255, 255), (20, 28, 36)
BACKGROUNDS = {
    "white": (255, 255, 255), "yellow": (252, 214, 92), "light blue": (168, 214, 248), "pink": (250, 182, 200),
    "green": (110, 190, 110), "gray": (170, 174, 180), "orange": (248, 172, 96), "purple": (160, 122, 206),
    "red": (220, 76, 72), "black": (24, 24, 28),
}  # fmt: skip
Point = tuple[float, float]


@dataclass(frozen=True)
class Pose:
    """`tilt` in degrees, `wings` from 0 (down) to 1 (up), `gaze` from -1 (left) to 1, `scale`, eyes open or `shut`."""

    background: str
    tilt: float = 0.0
    wings: float = 0.2
    gaze: float = 0.0
    scale: float = 1.0
    shut: bool = False

    @property
    def caption(self) -> str:
        """In the words of the box's own captions."""
        article = "an" if self.background[0] in "aeiou" else "a"
        return f"a {WORD} {KIND} on {article} {self.background} background"


SUBJECT = (
    Pose("white"), Pose("yellow", tilt=-12, wings=0.9, gaze=-0.8), Pose("light blue", tilt=10, gaze=0.9, scale=0.85),
    Pose("pink", wings=1.0, scale=1.08), Pose("green", tilt=-6, wings=0.0, gaze=0.5, shut=True),
)  # fmt: skip
HELD = (
    Pose("gray"), Pose("orange", tilt=14, wings=0.6), Pose("purple", gaze=-1.0, scale=0.9), Pose("red", wings=1.0),
    Pose("black", tilt=-10, gaze=0.6), Pose("white", tilt=8, wings=0.8, gaze=-0.5), Pose("yellow", scale=1.1),
    Pose("light blue", tilt=-14, shut=True), Pose("pink", tilt=5, gaze=1.0), Pose("green", wings=0.7, scale=0.8),
)  # fmt: skip


class Sheet:
    """A square canvas with its middle at (0, 0) and its sides at -1 and 1, y down; turned and scaled as asked."""

    def __init__(self, size: int, colour: tuple[int, int, int], tilt: float = 0.0, scale: float = 1.0) -> None:
        self.size, self.side = size, size * FINER
        self.image = Image.new("RGB", (self.side, self.side), colour)
        self._pen = ImageDraw.Draw(self.image)
        self._cos, self._sin, self._scale = math.cos(math.radians(tilt)), math.sin(math.radians(tilt)), scale

    def _placed(self, points: Sequence[Point]) -> list[Point]:
        half = self.side / 2
        return [
            (
                half + half * self._scale * (self._cos * x - self._sin * y),
                half + half * self._scale * (self._sin * x + self._cos * y),
            )
            for x, y in points
        ]

    def shape(self, points: Sequence[Point], colour: tuple[int, int, int]) -> None:
        """A filled polygon."""
        self._pen.polygon(self._placed(points), fill=colour)

    def lines(self, points: Sequence[Point], colour: tuple[int, int, int], width: float = 0.05) -> None:
        """An open line, round at its joints."""
        thick = max(1, round(width * self.side / 2))
        self._pen.line(self._placed(points), fill=colour, width=thick, joint="curve")

    def pixels(self) -> np.ndarray:
        """(size, size, 3) uint8."""
        return np.asarray(self.image.resize((self.size, self.size), Image.Resampling.LANCZOS))


def oval(x: float, y: float, wide: float, tall: float, turn: float = 0.0) -> list[Point]:
    """An ellipse of half axes `wide` and `tall` around (x, y), turned by `turn` degrees."""
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    around = [2 * math.pi * step / 72 for step in range(73)]
    flat = [(wide * math.cos(angle), tall * math.sin(angle)) for angle in around]
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in flat]


def creature(pose: Pose, size: int) -> np.ndarray:
    """The character in a pose, (size, size, 3) uint8."""
    sheet = Sheet(size, BACKGROUNDS[pose.background], pose.tilt, 0.92 * pose.scale)
    for side in (-1, 1):
        sheet.shape(oval(side * 0.2, 0.74, 0.13, 0.07), HORN)  # feet
        sheet.shape(oval(side * 0.56, 0.16 - 0.24 * pose.wings, 0.16, 0.36, -side * (20 + 70 * pose.wings)), DARK)
    sheet.shape(oval(0, 0.12, 0.54, 0.62), TEAL)
    sheet.shape([(-0.13, -0.42), (0.13, -0.42), (0.05, -0.92)], HORN)
    for across in (-0.42, -0.26, -0.1, 0.06):  # rings of the horn
        half = 0.1 * (0.42 + across - 0.06) / 0.48
        sheet.lines([(-0.11 + half, -0.5 - (across + 0.42) * 0.6), (0.11 - half * 0.2, -0.53 - (across + 0.42) * 0.6)],
                    (214, 104, 16), 0.03)  # fmt: skip
    sheet.shape(oval(0, 0.34, 0.34, 0.34), BELLY)
    for row, count in ((0.22, 2), (0.38, 3), (0.54, 2)):
        for index in range(count):
            middle = 0.17 * (index - (count - 1) / 2)
            sheet.lines([(middle - 0.05, row - 0.03), (middle, row + 0.03), (middle + 0.05, row - 0.03)], TEAL, 0.03)
    for side in (-1, 1):
        sheet.shape(oval(side * 0.23, -0.14, 0.22, 0.23), DARK)
        if pose.shut:
            sheet.lines([(side * 0.23 - 0.13, -0.14), (side * 0.23, -0.08), (side * 0.23 + 0.13, -0.14)], WHITE, 0.04)
            continue
        sheet.shape(oval(side * 0.23, -0.14, 0.18, 0.19), WHITE)
        sheet.shape(oval(side * 0.23 + 0.07 * pose.gaze, -0.14, 0.09, 0.1), BLACK)
        sheet.shape(oval(side * 0.23 + 0.07 * pose.gaze - 0.03, -0.18, 0.03, 0.03), WHITE)
    sheet.shape([(-0.09, 0.02), (0.09, 0.02), (0, 0.18)], BEAK)
    return sheet.pixels()


def _apple(line: Callable[[Sequence[Point]], None]) -> None:
    line(oval(-0.14, 0.12, 0.36, 0.44))
    line(oval(0.14, 0.12, 0.36, 0.44))
    line([(0, -0.28), (0.06, -0.6)])
    line(oval(0.2, -0.52, 0.16, 0.07, -25))


def _house(line: Callable[[Sequence[Point]], None]) -> None:
    line([(-0.5, 0.6), (-0.5, -0.1), (0.5, -0.1), (0.5, 0.6), (-0.5, 0.6)])
    line([(-0.64, -0.1), (0, -0.64), (0.64, -0.1)])
    line([(-0.1, 0.6), (-0.1, 0.2), (0.12, 0.2), (0.12, 0.6)])
    line([(0.24, 0.1), (0.4, 0.1), (0.4, 0.26), (0.24, 0.26), (0.24, 0.1)])


def _fish(line: Callable[[Sequence[Point]], None]) -> None:
    line(oval(-0.1, 0, 0.5, 0.3))
    line([(0.38, 0), (0.72, -0.28), (0.72, 0.28), (0.38, 0)])
    line(oval(-0.36, -0.06, 0.05, 0.05))
    line([(-0.1, -0.1), (0.0, 0.02), (-0.1, 0.14)])


def _tree(line: Callable[[Sequence[Point]], None]) -> None:
    line(oval(0, -0.22, 0.46, 0.46))
    line([(-0.09, 0.24), (-0.09, 0.72), (0.09, 0.72), (0.09, 0.24)])
    line([(0, 0.4), (0, -0.2), (-0.18, -0.34)])
    line([(0, -0.06), (0.18, -0.24)])


def _mushroom(line: Callable[[Sequence[Point]], None]) -> None:
    cap = [(x, y) for x, y in oval(0, 0, 0.62, 0.56) if y <= 0.02]
    line([*cap, cap[0]])
    line([(-0.18, 0.02), (-0.14, 0.62), (0.14, 0.62), (0.18, 0.02)])
    line(oval(-0.22, -0.22, 0.1, 0.1))
    line(oval(0.2, -0.24, 0.12, 0.12))


def _sailboat(line: Callable[[Sequence[Point]], None]) -> None:
    line([(-0.6, 0.36), (0.6, 0.36), (0.4, 0.64), (-0.4, 0.64), (-0.6, 0.36)])
    line([(0, 0.36), (0, -0.66)])
    line([(0.06, -0.6), (0.52, 0.22), (0.06, 0.22), (0.06, -0.6)])
    line([(-0.06, -0.46), (-0.42, 0.22), (-0.06, 0.22), (-0.06, -0.46)])


THINGS = {
    "an apple": _apple, "a house": _house, "a fish": _fish, "a tree": _tree, "a mushroom": _mushroom,
    "a sailboat": _sailboat,
}  # fmt: skip


def blueprint(thing: str, size: int, scale: float) -> np.ndarray:
    """A thing as white lines on squared dark blue, (size, size, 3) uint8."""
    sheet = Sheet(size, (22, 54, 122))
    for step in range(-4, 5):
        for points in ([(step / 4, -1.0), (step / 4, 1.0)], [(-1.0, step / 4), (1.0, step / 4)]):
            sheet.lines(points, (44, 82, 156), 0.015)

    def line(points: Sequence[Point]) -> None:
        sheet.lines([(scale * x, scale * y) for x, y in points], (235, 242, 255), 0.05)

    THINGS[thing](line)
    return sheet.pixels()


def write(folder: Path, pictures: Sequence[tuple[np.ndarray, str]]) -> None:
    """`00.png` with `00.txt`, and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (pixels, caption) in enumerate(pictures):
        save_png(folder / f"{index:02}.png", pixels)
        (folder / f"{index:02}.txt").write_text(caption + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; prints the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="where the folders go")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the pictures (default: the box's)")
    args = parser.parse_args(argv)
    size = args.size or Pipeline.from_pretrained(adapters=[]).model.family.size
    for name, poses in (("subject", SUBJECT), ("held", HELD)):
        write(args.out / name, [(creature(pose, size), pose.caption) for pose in poses])
        print(args.out / name)
    drawn = [(blueprint(thing, size, scale), thing) for thing in THINGS for scale in (1.0, 0.8)]
    write(args.out / "blueprint", drawn)
    print(args.out / "blueprint")


if __name__ == "__main__":
    main()
