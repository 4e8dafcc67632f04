"""Builds the captioned pictures of the box model from openly licensed emoji art.

Owns the whole path: fetch pinned npm packages, rasterise sprites, compose them over plain backgrounds,
write captions and WebDataset shards. Knows nothing of models and training.

    python -m recipes.box.data --out data/box --size 128 --things common --per-picture 48 --seed 0
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from recipes.box.captions import (
    BACKGROUNDS,
    RELATIONS,
    SILENT_STYLE_PROB,
    caption_of,
    choose_background,
    scene_caption,
    shade,
)
from recipes.box.things import BOX, COMMON, CORE, HELD_OUT, names_of

log = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 2000
SCENE = -1  # in the order of the pictures: one of two things
MIN_STYLES = 3  # a thing must be drawn in at least this many of the four styles
GROUPS = {3: "animals-nature", 4: "food-drink", 5: "travel-places", 6: "activities", 7: "objects"}  # emojibase numbers
LABELS = "emojibase-data@17.0.0"
MAX_HIDDEN = 0.6  # share of a sprite's outline that may vanish in the background
NEAR = 48.0  # Euclidean RGB distance (0..441) under which an outline is hard to see


@dataclass(frozen=True)
class ArtSet:
    """One set of drawings: a pinned npm package, its style word and its licence (SPDX)."""

    style: str
    package: str
    licence: str


ART = (
    ArtSet("3d", "@lobehub/fluent-emoji-3d@1.1.0", "MIT"),
    ArtSet("flat", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    ArtSet("cartoon", "@iconify-json/noto@1.2.9", "Apache-2.0"),
    ArtSet("sticker", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
)


@dataclass(frozen=True)
class Thing:
    """A nameable thing: code point (lower case, fe0f removed), label, names (usual first), other words."""

    codepoint: str
    label: str
    names: tuple[str, ...]
    tags: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Sprite:
    """A thing drawn in one style: `rgba (h, w, 4)` uint8, straight alpha, trimmed; visible backgrounds by name."""

    thing: Thing
    art: ArtSet
    rgba: np.ndarray = field(repr=False)
    visible: tuple[str, ...] = ()


# ---- packages ------------------------------------------------------------------------------------------------


def fetch(package: str, cache: Path) -> Path:
    """Folder of an unpacked npm package `name@version`; downloaded once. ValueError if npm fails."""
    folder = cache / re.sub(r"[^A-Za-z0-9.-]+", "-", package).strip("-")
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        raise ValueError("npm is not installed: it is needed to fetch the art packages (install Node.js)")
    cache.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s", package)
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"package: npm could not fetch {package}: {why}")
    archive = cache / done.stdout.strip().splitlines()[-1]
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(beside, filter="data")
    (beside / "package").rename(folder)
    beside.rmdir()
    archive.unlink()
    return folder


def _plain(codepoint: str) -> str:
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


def read_things(labels: Path) -> list[Thing]:
    """Things of the five groups, in emojibase order; skin tones are left out."""
    things = []
    for entry in json.loads((labels / "en" / "data.json").read_text("utf-8")):
        group = entry.get("group")
        if group not in GROUPS:
            continue
        label = entry["label"].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        words = set(re.findall(r"\w+", label.lower()))
        tags = tuple(tag for tag in entry.get("tags", ()) if tag.lower() not in words)
        names = names_of(label, is_animal=group == 3)
        things.append(Thing(_plain(entry["hexcode"]), label, names, tags, GROUPS[group]))
    return things


def choose_things(things: list[Thing], which: str, drawn: dict[str, set[str]]) -> list[Thing]:
    """`all`, `common`, `core` or `box` things that at least `MIN_STYLES` sets draw; `drawn` is style -> code points."""
    lists = {"common": set(COMMON), "core": set(CORE), "box": set(BOX)}
    if which != "all" and which not in lists:
        raise ValueError(f"things: {which!r} is not known; allowed: {', '.join(lists)}, all")
    kept = [t for t in things if sum(t.codepoint in points for points in drawn.values()) >= MIN_STYLES]
    dropped = [t.label for t in things if t not in kept]
    if which in lists:
        kept = [t for t in kept if t.label in lists[which]]
        missing = lists[which] - {t.label for t in kept}
        if missing:
            raise ValueError(f"things: {which} labels not found in {LABELS}: {sorted(missing)}")
    elif dropped:
        log.info("left out (fewer than %d styles): %s", MIN_STYLES, ", ".join(dropped))
    return kept


# ---- sprites -------------------------------------------------------------------------------------------------


def open_art(art: ArtSet, folder: Path, side: int) -> dict[str, Iterator[np.ndarray]]:
    """Code point -> a one-shot reader of RGBA `(h, w, 4)` uint8 about `side` pixels wide."""
    if (folder / "assets").is_dir():
        return {_plain(path.stem): _read_picture(path) for path in sorted((folder / "assets").glob("*.webp"))}
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    chars = json.loads((folder / "chars.json").read_text("utf-8"))
    return {_plain(point): _read_svg(icons, name, side) for point, name in chars.items()}


def _read_picture(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        yield np.asarray(image.convert("RGBA"))


def _read_svg(icons: dict[str, Any], name: str, side: int) -> Iterator[np.ndarray]:
    import pyvips  # here, so that composing and captions work without it

    logging.getLogger("pyvips").setLevel(logging.WARNING)
    seen: dict[str, Any] = {}
    while name in icons.get("aliases", {}):
        seen = {**icons["aliases"][name], **seen}
        name = seen.pop("parent")
    icon = {**icons["icons"][name], **seen}
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'
    )
    picture = pyvips.Image.svgload_buffer(svg.encode(), scale=side / max(width, height))
    yield np.ascontiguousarray(picture.numpy())


def trim(rgba: np.ndarray, threshold: int = 8) -> np.ndarray:
    """`rgba (h, w, 4)` cut to the box where alpha > `threshold`. ValueError if nothing is there."""
    solid = rgba[..., 3] > threshold
    rows, cols = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if rows.size == 0:
        raise ValueError("sprite: the picture is fully transparent")
    return np.ascontiguousarray(rgba[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


def visible_on(rgba: np.ndarray) -> tuple[str, ...]:
    """Names of the backgrounds on which the outline of the sprite can be seen."""
    solid = np.pad(rgba[..., 3] > 128, 2)
    inside = solid[:-4, 2:-2] & solid[4:, 2:-2] & solid[2:-2, :-4] & solid[2:-2, 4:]
    outline = rgba[solid[2:-2, 2:-2] & ~inside][:, :3].astype(np.float32)
    names = []
    for name, colour in BACKGROUNDS.items():
        hidden = np.linalg.norm(outline - np.array(colour, np.float32), axis=1) < NEAR
        if hidden.size == 0 or hidden.mean() <= MAX_HIDDEN:
            names.append(name)
    return tuple(names)


def load_sprites(which: str, size: int, cache: Path) -> list[Sprite]:
    """All sprites of the chosen things; SVG at 1.5 * `size` pixels so that composing only shrinks."""
    readers = {art: open_art(art, fetch(art.package, cache), round(1.5 * size)) for art in ART}
    drawn = {art.style: set(points) for art, points in readers.items()}
    things = choose_things(read_things(fetch(LABELS, cache)), which, drawn)
    wanted = [(art, thing) for art in ART for thing in things if thing.codepoint in readers[art]]
    sprites = []
    for art, thing in tqdm(wanted, desc="sprites", unit="sprite"):
        rgba = trim(next(readers[art][thing.codepoint]))
        sprites.append(Sprite(thing, art, rgba, visible_on(rgba)))
    return sprites


def fitted(rgba: np.ndarray, longest: int) -> np.ndarray:
    """The sprite with its longest side at `longest` pixels, colours premultiplied: float32 `(h, w, 4)`, 0 to 255."""
    height, width = rgba.shape[:2]
    scale = longest / max(height, width)
    new = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Premultiplied ("RGBa"), so that the colour of transparent pixels does not leak into the edge.
    return np.asarray(Image.fromarray(rgba, "RGBA").convert("RGBa").resize(new, Image.Resampling.BICUBIC), np.float32)


def put(canvas: np.ndarray, sprite: np.ndarray, x: float, y: float) -> None:
    """Lay a premultiplied sprite over `canvas (h, w, 3)`, its middle near (x, y) in shares, wholly inside."""
    size, (height, width) = canvas.shape[0], sprite.shape[:2]
    left = int(np.clip(round(x * size - width / 2), 0, size - width))
    top = int(np.clip(round(y * size - height / 2), 0, size - height))
    window = canvas[top : top + height, left : left + width]
    # Porter and Duff 1984, "over" with premultiplied colour.
    window[:] = sprite[..., :3] + window * (1 - sprite[..., 3:] / 255)


def canvas_of(size: int, colour: tuple[int, int, int]) -> np.ndarray:
    """`(size, size, 3)` float32 of one colour."""
    return np.full((size, size, 3), colour, np.float32)


def picture_of(canvas: np.ndarray) -> Image.Image:
    """RGB picture of a canvas."""
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), "RGB")


def compose(rgba: np.ndarray, size: int, colour: tuple[int, int, int], box: float, dx: float, dy: float) -> Image.Image:
    """RGB picture of `size` pixels: the sprite fitted to `box` (share of the side), moved by `dx`, `dy` (shares)."""
    canvas = canvas_of(size, colour)
    put(canvas, fitted(rgba, round(box * size)), 0.5 + dx, 0.5 + dy)
    return picture_of(canvas)


# ---- samples and shards --------------------------------------------------------------------------------------


def make_sample(
    sprite: Sprite, size: int, rng: np.random.Generator, silent_style: float = SILENT_STYLE_PROB
) -> tuple[Image.Image, str, dict[str, str]]:
    """Picture, caption (without its style with probability `silent_style`) and the facts about it."""
    background, said = choose_background(rng, sprite.visible)
    box = rng.uniform(0.72, 0.86)
    dx, dy = rng.uniform(-0.04, 0.04, 2)
    picture = compose(sprite.rgba, size, shade(background, rng), box, dx, dy)
    ground = background if said else None
    caption = caption_of(sprite.thing.names, sprite.thing.tags, sprite.art.style, ground, rng, silent_style)
    facts = facts_of(sprite, background)
    return picture, caption, facts


def make_scene(sprites: list[Sprite], size: int, rng: np.random.Generator) -> tuple[Image.Image, str, dict[str, str]]:
    """Two different things of one style in a relation: picture, caption and the facts about it."""
    first = sprites[int(rng.integers(len(sprites)))]
    alike = [s for s in sprites if s.art is first.art and s.thing is not first.thing and common(s, first)]
    second = alike[int(rng.integers(len(alike)))]
    relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    background, said = choose_background(rng, common(first, second))
    canvas = canvas_of(size, shade(background, rng))
    apart = rng.uniform(0.235, 0.255)
    side = -apart if relation in ("left", "above") else apart
    along = 0 if relation in ("left", "right") else 1
    for sprite, shift in ((first, side), (second, -side)):
        middle = 0.5 + rng.uniform(-0.03, 0.03, 2)
        middle[along] += shift
        put(canvas, fitted(sprite.rgba, round(rng.uniform(0.40, 0.46) * size)), middle[0], middle[1])
    names = (first.thing.names, second.thing.names)
    caption = scene_caption(names, relation, first.art.style, background if said else None, rng)
    facts = facts_of(first, background)
    facts |= {"second": second.thing.names[0], "second_label": second.thing.label, "relation": relation}
    return picture_of(canvas), caption, facts


def common(a: Sprite, b: Sprite) -> tuple[str, ...]:
    """The backgrounds on which both can be seen."""
    return tuple(name for name in a.visible if name in b.visible)


def facts_of(sprite: Sprite, background: str) -> dict[str, str]:
    """What is known of a picture with this sprite."""
    return {
        "thing": sprite.thing.names[0],
        "label": sprite.thing.label,
        "style": sprite.art.style,
        "background": background,
        "source": sprite.art.package,
        "licence": sprite.art.licence,
        "codepoint": sprite.thing.codepoint,
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time and owner stay 0, so that equal seeds give equal bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def build(
    out: Path,
    size: int,
    which: str,
    per_picture: int,
    seed: int,
    cache: Path,
    scenes: int = 0,
    held_out: bool = False,
    silent_style: float = SILENT_STYLE_PROB,
) -> dict[str, Any]:
    """Writes the shards and then `summary.json`; returns the summary. Old shards in `out` are removed first.

    `scenes` pictures of two things are added. `held_out` builds from the (thing, style) pairs that others leave out.
    """
    lowest = {"size": (size, 16), "per-picture": (per_picture, 1), "seed": (seed, 0), "scenes": (scenes, 0)}
    for name, (value, low) in lowest.items():
        if value < low:
            raise ValueError(f"{name}: {value} is too small; at least {low}")
    if not 0 <= silent_style <= 1:
        raise ValueError(f"silent-style: {silent_style} is not between 0 and 1")
    start = time.monotonic()
    sprites = load_sprites(which, size, cache)
    sprites = [s for s in sprites if ((s.thing.label, s.art.style) in HELD_OUT) is held_out]
    singles = np.repeat(np.arange(len(sprites)), per_picture)
    order = np.random.default_rng([seed, 0]).permutation(np.append(singles, np.full(scenes, SCENE)))
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "summary.json", *out.glob("train-*.tar")):
        old.unlink(missing_ok=True)
    counts: dict[str, Counter[str]] = {"style": Counter(), "background": Counter(), "licence": Counter()}
    shards: list[str] = []
    with tqdm(total=len(order), desc=str(out), unit="picture") as bar:
        for first in range(0, len(order), SAMPLES_PER_SHARD):
            shard = out / f"train-{len(shards):05d}.tar"
            beside = shard.with_name(shard.name + ".partial")
            with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(first, min(first + SAMPLES_PER_SHARD, len(order))):
                    rng = np.random.default_rng([seed, 1, index])
                    picture, caption, facts = (
                        make_scene(sprites, size, rng)
                        if order[index] == SCENE
                        else make_sample(sprites[order[index]], size, rng, silent_style)
                    )
                    png = io.BytesIO()
                    picture.save(png, "PNG", compress_level=1)
                    _add(tar, f"{index:07d}.png", png.getvalue())
                    _add(tar, f"{index:07d}.txt", caption.encode())
                    _add(tar, f"{index:07d}.json", json.dumps(facts).encode())
                    for key, counter in counts.items():
                        counter[facts[key]] += 1
                    bar.update()
            beside.rename(shard)
            shards.append(shard.name)
    summary = {
        "samples": len(order),
        "shards": shards,
        "size": size,
        "things": len({s.thing.codepoint for s in sprites}),
        "sprites": len(sprites),
        "per_picture": per_picture,
        "scenes": scenes,
        "silent_style": silent_style,
        "which": which,
        "seed": seed,
        "counts": {key: dict(sorted(counter.items())) for key, counter in counts.items()},
        "names": list(dict.fromkeys(s.thing.names[0] for s in sprites)),
        "packages": {art.package: art.licence for art in ART} | {LABELS: "MIT"},
        "licences": "see LICENSES/",
        "seconds": round(time.monotonic() - start, 1),
    }
    beside = out / "summary.json.partial"
    beside.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside.rename(out / "summary.json")
    return summary


def main(argv: list[str] | None = None) -> None:
    """The command line; see the docstring of the file."""
    parser = argparse.ArgumentParser(description="Build captioned pictures from openly licensed emoji art.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--things", default="common", help="core, box, common or all")
    parser.add_argument("--per-picture", type=int, default=48, help="samples of each thing in each style")
    parser.add_argument("--scenes", type=int, default=0, help="pictures of two things of one style in a relation")
    parser.add_argument("--held-out", action="store_true", help="the (thing, style) pairs that are left out otherwise")
    parser.add_argument(
        "--silent-style", type=float, default=SILENT_STYLE_PROB,
        help="share of the captions of single things without their style (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache/box"), help="folder of the fetched packages")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        summary = build(
            args.out,
            args.size,
            args.things,
            args.per_picture,
            args.seed,
            args.cache,
            args.scenes,
            args.held_out,
            args.silent_style,
        )
    except ValueError as error:
        parser.error(str(error))
    log.info("%d pictures of %d things in %s", summary["samples"], summary["things"], args.out)


if __name__ == "__main__":
    main()
