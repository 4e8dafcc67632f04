"""Pictures of shapes with captions, drawn here: nothing is fetched. Written as the shards that training reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "green": (42, 157, 80), "blue": (38, 84, 200), "yellow": (250, 204, 40),
    "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
ENLARGED = 4  # drawn so much larger, then made smaller, for smooth edges


def drawn(shape: str, colour: str, background: str, size: int, chance: np.random.Generator) -> Image.Image:
    """One shape of chance place and size on a plain background, `size` x `size` px."""
    side = size * ENLARGED
    image = Image.new("RGB", (side, side), COLOURS[background])
    radius = side * chance.uniform(0.26, 0.36)
    x, y = side * chance.uniform(0.42, 0.58, 2)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        arm = radius / 3
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def write_shapes(folder: Path, count: int, size: int, seed: int = 0) -> Path:
    """`count` pictures with captions as one shard, the same for the same arguments; returns the folder."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".shapes.part"
    with tarfile.open(beside, "w") as archive:
        for index in range(count):
            shape = SHAPES[chance.integers(len(SHAPES))]
            colour, background = chance.choice(list(COLOURS), 2, replace=False)
            png = io.BytesIO()
            drawn(shape, colour, background, size, chance).save(png, "PNG")
            facts = {"shape": shape, "colour": str(colour), "background": str(background)}
            caption = f"a {colour} {shape} on a {background} background"
            for suffix, data in (
                ("png", png.getvalue()),
                ("txt", caption.encode()),
                ("json", json.dumps(facts).encode()),
            ):
                member = tarfile.TarInfo(f"{index:05}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    beside.replace(folder / "shapes-00000.tar")
    return folder
