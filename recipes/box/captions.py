"""Captions and background colours of the box model's pictures.

Owns the colours, how often each is drawn, and the phrasings. Knows nothing of sprites and files;
randomness comes only from the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.box.things import with_article

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "gray": (140, 140, 140),
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (35, 80, 200),
    "light blue": (150, 205, 245),
    "purple": (125, 55, 165),
    "pink": (250, 160, 195),
    "brown": (120, 75, 40),
}
STYLES = ("3d", "flat", "cartoon", "sticker")

WHITE_PROB = 0.25  # of all pictures
SILENT_BACKGROUND_PROB = 0.10  # captions that do not name the background ...
SILENT_WHITE_PROB = 0.85  # ... which is then mostly white, so that white is the default
SILENT_STYLE_PROB = 0.35
MAIN_NAME_PROB = 0.75
TAG_PROB = 0.15
CAPITAL_PROB = 0.05

# {n} is the bare name, {an} the name with its article; a repeated line is drawn more often.
PLAIN = ("{an}", "{an}", "{an}", "{n}", "{n}", "a picture of {an}", "picture of {an}", "an image of {an}")
STYLED = {
    "3d": ("a 3d {n}", "3d {n}", "3d {n}", "a 3d render of {an}", "3d render of {an}", "{n}, 3d render", "{n}, 3d"),
    "flat": ("a flat {n}", "flat {n}", "flat icon of {an}", "a flat icon of {an}", "{n}, flat icon", "{n}, flat style"),
    "cartoon": (
        "a cartoon {n}", "cartoon {n}", "a cartoon of {an}", "cartoon of {an}", "{n}, cartoon", "{n}, cartoon style",
    ),
    "sticker": ("a {n} sticker", "{n} sticker", "a sticker of {an}", "sticker of {an}", "{n}, sticker"),
}  # fmt: skip
GROUNDS = (
    " on a {c} background", " on a {c} background", " on a {c} background",
    ", {c} background", ", {c} background", " on {c}", " on a plain {c} background", " against a {c} background",
)  # fmt: skip

# {a} stands so to {b}; a repeated line is drawn more often.
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("{a} to the left of {b}", "{a} to the left of {b}", "{a} left of {b}"),
    "right": ("{a} to the right of {b}", "{a} to the right of {b}", "{a} right of {b}"),
    "above": ("{a} above {b}", "{a} above {b}", "{a} over {b}"),
    "below": ("{a} below {b}", "{a} below {b}", "{a} under {b}"),
}
SCENE_STYLES = {
    "3d": ("3d render of {s}", "{s}, 3d", "{s}, 3d render"),
    "flat": ("flat icon of {s}", "{s}, flat style", "{s}, flat"),
    "cartoon": ("cartoon of {s}", "{s}, cartoon style", "{s}, cartoon"),
    "sticker": ("sticker of {s}", "{s}, sticker"),
}


def choose_background(rng: np.random.Generator, visible: Sequence[str] = tuple(BACKGROUNDS)) -> tuple[str, bool]:
    """A background name among `visible`, and whether the caption says it."""
    said = bool(rng.random() >= SILENT_BACKGROUND_PROB)
    # said white is rarer, so that white is WHITE_PROB over all
    said_white = (WHITE_PROB - SILENT_BACKGROUND_PROB * SILENT_WHITE_PROB) / (1 - SILENT_BACKGROUND_PROB)
    others = [name for name in visible if name != "white"] or list(BACKGROUNDS)[1:]
    if "white" in visible and rng.random() < (said_white if said else SILENT_WHITE_PROB):
        return "white", said
    return others[int(rng.integers(len(others)))], said


def shade(name: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """The colour with a small jitter; white is mostly pure."""
    base = np.array(BACKGROUNDS[name], np.float64)
    if name == "white":
        if rng.random() < 0.85:
            return BACKGROUNDS[name]
        colour = base - rng.uniform(1, 9)
    else:
        colour = base * rng.uniform(0.93, 1.07) + rng.uniform(-7, 7, 3 if name not in ("gray", "black") else 1)
    red, green, blue = (int(v) for v in np.clip(np.rint(colour), 0, 255))
    return red, green, blue


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _fill(template: str, name: str) -> str:
    """`a 3d {n}` keeps its article only if the name takes one (`3d grapes`, not `a 3d grapes`)."""
    takes_one = with_article(name).startswith(("a ", "an ", "the "))
    if template.startswith("a ") and "{n}" in template and "sticker" not in template and not takes_one:
        template = template.removeprefix("a ")
    text = template.format(n=name, an=with_article(name))
    if template == "a {n} sticker" and with_article(name).startswith("an "):
        text = "an " + text.removeprefix("a ")
    return text


def _on_ground(text: str, background: str | None, rng: np.random.Generator) -> str:
    """The caption with its background said, in one of the phrasings."""
    if background is None:
        return text
    ground = _pick(rng, GROUNDS)
    if "," in text:
        ground = ", {c} background"  # "octopus, 3d on blue" reads badly
    colour = "grey" if background == "gray" and rng.random() < 0.2 else background
    ground = ground.format(c=colour)
    if colour[0] in "aeiou":
        ground = ground.replace(" a orange", " an orange")
    return text + ground


def caption_of(
    names: Sequence[str],
    tags: Sequence[str],
    style: str,
    background: str | None,
    rng: np.random.Generator,
    silent_style: float = SILENT_STYLE_PROB,
) -> str:
    """A caption such as `a 3d octopus on a blue background`; `background` None is left unsaid.

    The style is left unsaid with probability `silent_style`.
    """
    if style not in STYLES:
        raise ValueError(f"style: {style!r} is not known; allowed: {', '.join(STYLES)}")
    name = names[0] if len(names) == 1 or rng.random() < MAIN_NAME_PROB else _pick(rng, names[1:])
    templates = PLAIN if rng.random() < silent_style else STYLED[style]
    text = _fill(_pick(rng, templates), name)
    if tags and len(names) == 1 and rng.random() < TAG_PROB:
        text = f"{text}, {_pick(rng, tags)}"
    text = _on_ground(text, background, rng)
    text = text.lower()
    return text[0].upper() + text[1:] if rng.random() < CAPITAL_PROB else text


def scene_caption(
    names: tuple[Sequence[str], Sequence[str]],
    relation: str,
    style: str,
    background: str | None,
    rng: np.random.Generator,
) -> str:
    """A caption such as `a cat to the left of a pizza on a green background`; `background` None is left unsaid."""
    first, second = (one[0] if len(one) == 1 or rng.random() < MAIN_NAME_PROB else _pick(rng, one[1:]) for one in names)
    how = rng.random()
    first = _fill(_pick(rng, (f"{style} {{n}}", f"a {style} {{n}}")), first) if how < 0.3 else with_article(first)
    text = _pick(rng, RELATIONS[relation]).format(a=first, b=with_article(second))
    if how >= 0.3 + SILENT_STYLE_PROB:
        text = _pick(rng, SCENE_STYLES[style]).format(s=text)
    return _on_ground(text, background, rng).lower()
