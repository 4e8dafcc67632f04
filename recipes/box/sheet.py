"""The contact sheet of the box: fixed prompts, four seeds each, drawn by the shipped checkpoint, captions below.

`python -m recipes.box.sheet --out docs/box/contact-sheet.png`; nothing is picked by hand, the seeds are 0 to 3.
`--sweep` draws guidance 1 to 8 and negative prompts instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfumato.images import grid
from sfumato.pipeline import Pipeline

PROMPTS = (
    "a red apple on a white background", "3d octopus on a blue background", "a cartoon cat on a yellow background",
    "flat rocket on a black background", "a guitar on a green background", "3d hamburger on a pink background",
    "sticker of a sunflower on a purple background", "a cartoon penguin on a light blue background",
    "3d soccer ball on an orange background", "a house on a white background", "flat umbrella on a gray background",
    "3d crown on a purple background", "a cartoon frog on a pink background", "an airplane on a light blue background",
    "a butterfly on a white background", "flat banana on a blue background", "3d snowman on a red background",
    "a castle on a yellow background", "strawberry sticker, green background", "a light bulb on a black background",
)  # fmt: skip
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
SWEPT = ("3d octopus on a blue background", "a red apple", "a cartoon cat on a yellow background")
NEGATIVES = ("", "blue", "white background", "3d")
INK, PAPER = (30, 30, 30), (255, 255, 255)


def labelled(image: np.ndarray, text: str) -> np.ndarray:
    """A row of pictures (H, W, 3) with its prompt below."""
    picture = Image.fromarray(image)
    sheet = Image.new("RGB", (picture.width, picture.height + 20), PAPER)
    sheet.paste(picture)
    ImageDraw.Draw(sheet).text((4, picture.height + 3), text, fill=INK, font=ImageFont.load_default(12))
    return np.asarray(sheet)


def contact_sheet(pipe: Pipeline, seeds: int) -> np.ndarray:
    """All PROMPTS, one labelled row of `seeds` pictures each, in two columns."""
    rows = [labelled(grid(pipe(prompt, count=seeds).images, seeds, 0), prompt) for prompt in PROMPTS]
    return grid(np.stack(rows), columns=2, gap=6)


def sweep(pipe: Pipeline) -> np.ndarray:
    """Each of SWEPT over GUIDANCES, then over NEGATIVES, from one seed."""
    rows = []
    for prompt in SWEPT:
        images = [pipe(prompt, guidance=scale, seed=1).images for scale in GUIDANCES]
        shown = " ".join(f"{scale:g}" for scale in GUIDANCES)
        rows.append(labelled(grid(np.concatenate(images), len(images), 0), f"{prompt}: guidance {shown}"))
    for prompt in SWEPT:
        images = [pipe(prompt, negative=text, seed=1).images for text in NEGATIVES]
        while len(images) < len(GUIDANCES):
            images.append(np.full_like(images[0], 255))
        shown = ", ".join(text or "none" for text in NEGATIVES)
        rows.append(labelled(grid(np.concatenate(images), len(images), 0), f"{prompt}: negative {shown}"))
    return grid(np.stack(rows), columns=1, gap=6)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", help="a checkpoint of the box family (default: the shipped one)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.ckpt)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sweep(pipe) if args.sweep else contact_sheet(pipe, args.seeds)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
