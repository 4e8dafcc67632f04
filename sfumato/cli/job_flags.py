"""Flags for every field of a Job, made from its dataclass and the table below; what is done to texts before drawing.

A command that has spellings of its own for some fields leaves those out. Knows no model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.cli.names import (
    FILLS,
    FITS,
    LATENT_UPSCALERS,
    RANGES,
    SAMPLERS,
    SCHEDULES,
    SOURCES,
    UPSCALERS,
    WEIGHTINGS,
)
from sfumato.prompts.choices import choose
from sfumato.prompts.styles import Style, apply_styles, find_styles, read_styles
from sfumato.tasks.profiles import PROFILES
from sfumato.types import Control, Hires, Job


class Flag(NamedTuple):
    """How a field is asked for on the command line; its type, range and default are added.

    `unset` says what leaving it out means where the Job's own default does not; `allowed` where no range is known.
    """

    metavar: str
    help: str
    unset: str = ""
    allowed: str = ""
    names: tuple[str, ...] = ()


NUMBERS: Mapping[str, type] = {"int": int, "float": float}
OWN = "the model's own"
FIRST = "the first pass's"
GROUPS: Mapping[str, Mapping[str, Flag]] = {
    "picture": {
        "prompt": Flag("TEXT", "what to draw; an empty text draws unconditionally"),
        "negative": Flag("TEXT", "what to stay away from", "nothing"),
        "width": Flag("PX", "width in pixels", OWN, names=("--W",)),
        "height": Flag("PX", "height in pixels", OWN, names=("--H",)),
        "seed": Flag("N", "where noise comes from; picture i is drawn from seed + i", allowed="0 or more"),
        "count": Flag("N", "pictures"),
    },
    "sampling": {
        "steps": Flag("N", "sampling steps", OWN),
        "sampler": Flag("NAME", f"one of {', '.join(SAMPLERS)}, in any program's spelling", OWN),
        "schedule": Flag("NAME", f"the noise levels: one of {', '.join(SCHEDULES)}", "the sampler's own"),
        "eta": Flag("X", "fresh noise at each step, of samplers that have eta; 0 is none", "the sampler's own"),
        "options": Flag(
            "NAME=NUMBER", "an option of the sampler (docs/samplers.md), such as s_churn=10; may be repeated", "none",
            names=("--option",),
        ),
        "like": Flag(
            "PROGRAM", f"read prompts, draw noise and fill gaps as another program: {', '.join(PROFILES)}", "sfumato"
        ),
    },
    "texts": {
        "weighting": Flag("NAME", f"how (words:1.3) are weighed: {', '.join(WEIGHTINGS)}", "--like's"),
        "clip_skip": Flag("N", "the text encoder's layer to take, counted from its end; 1 is the last", OWN),
    },
    "noise": {
        "noise": Flag(
            "SOURCE", f"where noise is drawn: {', '.join(SOURCES)} (philox: as a CUDA card draws it)", "--like's"
        ),
        "variation_seed": Flag("N", "a second seed, towards whose noise the first turns", "none", "0 or more"),
        "variation_strength": Flag("X", "how far: 0 is the picture of --seed, 1 that of --variation-seed"),
        "noise_width": Flag("PX", "draw the noise of a picture of this width, laid in the middle", "--width"),
        "noise_height": Flag("PX", "the same for the height; both or none are needed", "--height"),
        "ensd": Flag("N", "noise after the first comes from seed + N (A1111's eta noise seed delta)", allowed="0: off"),
    },
    "guidance": {
        "guidance": Flag("G", "how hard the prompt pulls; 1 is none", OWN, names=("--scale",)),
        "guidance_start": Flag("X", "the fraction of the steps at which guidance begins"),
        "guidance_end": Flag("X", "the fraction of the steps at which it ends"),
        "guidance_low": Flag("SIGMA", "the noise level down to which guidance works"),
        "guidance_high": Flag("SIGMA", "the noise level from which on guidance works", "all"),
        "guidance_thin": Flag("SIGMA", "below this noise level every second step has no guidance"),
        "rescale": Flag("X", "share in which guided contrast is brought back to the unguided one's"),
        "threshold": Flag("X", "dynamic thresholding: the percentile beyond which values are clipped", "off"),
        "mimic": Flag("G", "dynamic thresholding for latents: the guidance whose range to keep", "off"),
        "pag": Flag("X", "perturbed-attention guidance, about 3; 0 is off"),
        "sag": Flag("X", "self-attention guidance, about 0.75; 0 is off"),
        "freeu": Flag(
            "B1,B2,S1,S2", "FreeU: factors of the U-Net's backbone and skip connections, such as 1.5,1.6,0.9,0.2", "off"
        ),
    },
    "fewer operations": {
        "reuse": Flag(
            "N[:DEPTH]", "compute the U-Net's deep part in every N-th call only; DEPTH of its blocks are shallow (1)",
            "off",
        ),
        "tome": Flag("RATIO", "share of the cells that self-attention merges, at the highest resolution; 0 is off"),
    },
    "SD XL": {
        "original_width": Flag("PX", "the width that the model is told the original had", "--width"),
        "original_height": Flag("PX", "and the height", "--height"),
        "crop_left": Flag("PX", "how far it is told that the original was cropped at the left", "0"),
        "crop_top": Flag("PX", "and at the top", "0"),
        "aesthetic": Flag("X", "the refiner's score of beauty for the prompt", "6"),
        "negative_aesthetic": Flag("X", "and for the negative prompt", "2.5"),
    },
    "second pass": {
        "hires.scale": Flag("SCALE", "draw, enlarge so many times, and draw again", "off", "1 to 8", ("--hires",)),
        "hires.upscaler": Flag("NAME", f"how to enlarge: {', '.join((*LATENT_UPSCALERS, *UPSCALERS))}"),
        "hires.strength": Flag("X", "how much of the noise comes back; 0 only enlarges", allowed="0 to 1"),
        "hires.steps": Flag("N", "steps really taken", FIRST, "1 to 1000"),
        "hires.guidance": Flag("G", "guidance", FIRST, "0 to 1000"),
        "hires.sampler": Flag("NAME", "sampler", FIRST),
        "hires.schedule": Flag("NAME", "schedule", FIRST),
        "hires.prompt": Flag("TEXT", "prompt", FIRST),
        "hires.negative": Flag("TEXT", "negative prompt", FIRST),
    },
    "image": {
        "image": Flag("PATH", "the picture to begin from", "none", names=("--init-img",)),
        "strength": Flag("X", "how much of it may change: 0 nothing, 1 all", "the task's own"),
        "exact_steps": Flag("", "take all --steps whatever the strength"),
        "resize": Flag("HOW", f"how it comes to another width and height: {', '.join(FITS)}", "keep its size"),
        "noise_multiplier": Flag("X", "factor of the noise that is put over it"),
        "depth": Flag("PATH", "its depth map, near is bright, or a depth network's .onnx file", "none"),
        "image_guidance": Flag("G", "how hard the image pulls, of models that edit by instruction", "1.5"),
    },
    "mask": {
        "mask": Flag("PATH", "draw only where this picture is white", "all"),
        "mask_blur_x": Flag("PX", "blur of the mask's edge from left to right", "a quarter of a latent cell"),
        "mask_blur_y": Flag("PX", "and from top to bottom", "the same"),
        "mask_invert": Flag("", "draw where it is black"),
        "mask_resize": Flag("", "stretch a mask of another size over the image"),
        "from_alpha": Flag("", "without a mask: draw where the image is transparent"),
        "mask_soft": Flag("", "grey is changed in part: the darker, the later"),
        "fill": Flag("HOW", f"what is under the mask to begin with: {', '.join(FILLS)}", "original; new ground: noise"),
        "only_masked": Flag("", "draw the mask's surroundings alone, at --width x --height"),
        "padding": Flag("PX", "the surroundings, with --only-masked"),
    },
    "new ground": {
        "left": Flag("PX", "put on so much at the left"),
        "right": Flag("PX", "at the right"),
        "up": Flag("PX", "at the top"),
        "down": Flag("PX", "at the bottom"),
        "falloff": Flag("X", "exponent of the spectrum of the noise that it begins as: lower has more detail"),
        "colour_variation": Flag("X", "how many colours that noise has"),
    },
    "steering": {
        "controls": Flag(
            "MODEL[,KEY=VALUE]",
            "a ControlNet's name or file, and image=PATH, annotate=canny, weight=1, start=0, end=1, "
            "mode=balanced|prompt|control|guess, resize=crop|stretch|fill, options such as low=100 (docs/control.md); "
            "may be repeated",
            "none",
            names=("--control",),
        ),
    },
    "large pictures": {
        "upscale": Flag("FACTOR", "enlarge the image", "off", names=("--factor",)),
        "upscaler": Flag(
            "NAME", f"how: {', '.join(UPSCALERS)}, or a network's file or packaged name (docs/editing.md)", "lanczos"
        ),
        "tile": Flag("PX", "draw, encode and decode in tiles of this side", "whole"),
        "overlap": Flag("PX", "what neighbouring tiles share", "a quarter of a tile; of --upscale an eighth"),
        "seamless": Flag("XY", "edges that meet, for textures: x, y or xy", "none", "x, y, xy"),
    },
}  # fmt: skip
SUMMARIES = {
    "fewer operations": "quicker, and not the exact picture any more (docs/fewer-operations.md)",
    "second pass": "--hires draws the picture, enlarges it and draws over it again",
    "SD XL": "what XL models are told of an original; others ignore it",
    "noise": "what a picture begins with",
    "mask": "--mask draws a part of the image; pixels outside it stay as they are",
    "new ground": "outpainting: what is put on at the sides",
    "steering": "what a picture says of another: edges, depth, a pose",
}


def flag_names(name: str) -> tuple[str, ...]:
    """The spellings of a field's flag: `clip_skip` is --clip-skip."""
    flag = next(group[name] for group in GROUPS.values() if name in group)
    plain = "--" + name.replace(".", "-").replace("_", "-")
    return (
        flag.names
        if name in ("options", "controls")
        else (*flag.names, plain)
        if name == "hires.scale"
        else (plain, *flag.names)
    )


def kind_of(name: str) -> str:
    """The type of a Job's field as it is written, without None: "int" of int | None."""
    owner = Hires if name.startswith("hires.") else Job
    return str(owner.__dataclass_fields__[name.removeprefix("hires.")].type).removesuffix(" | None")


def add_job_flags(
    parser: argparse.ArgumentParser, without: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """Flags for the fields of a Job but those in `without`. One that is not given is None, or what `defaults` says."""
    defaults = defaults or {}
    for title, flags in GROUPS.items():
        wanted = {name: flag for name, flag in flags.items() if name not in without}
        group = parser.add_argument_group(title, SUMMARIES.get(title)) if wanted else None
        for name, flag in wanted.items():
            assert group is not None
            kind = kind_of(name)
            more: dict[str, Any] = {"type": NUMBERS[kind]} if kind in NUMBERS else {}
            if name in ("options", "controls"):
                more["action"] = "append"
            if kind == "bool":
                more["action"] = "store_true"
            else:
                more["metavar"] = flag.metavar
            text = help_of(name, flag, defaults).replace("%", "%%")
            group.add_argument(*flag_names(name), dest=name, default=defaults.get(name), help=text, **more)
        if title == "texts":
            _add_text_flags(group or parser)


def help_of(name: str, flag: Flag, defaults: Mapping[str, Any]) -> str:
    """A flag's help text with what is allowed and the default."""
    own = getattr(Hires(), name[6:]) if name.startswith("hires.") else getattr(Job(), name)
    default = defaults.get(name, flag.unset or own)
    allowed = flag.allowed or RANGES.get(name, "")
    if isinstance(default, bool):
        return flag.help
    usual = f"default: {default:g}" if isinstance(default, (int, float)) else f"default: {default}" if default else ""
    said = "; ".join(part for part in (allowed, usual) if part)
    return f"{flag.help} ({said})" if said else flag.help


def _add_text_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        metavar="NAME[:STRENGTH]",
        help="put a LoRA on, by its name in --adapters or its file; the same as <lora:NAME:STRENGTH> in the prompt",
    )
    add(
        "--hypernet",
        dest="hypernets",
        action="append",
        default=[],
        metavar="NAME[:STRENGTH]",
        help="put a hypernetwork on; the same as <hypernet:NAME:STRENGTH> in the prompt",
    )
    add("--style", dest="style_names", action="append", default=[], metavar="NAME",
        help="put a style's texts around the prompts; may be repeated")  # fmt: skip
    add("--styles", metavar="FILE", default="styles.csv", help="where styles are, as A1111's (default: %(default)s)")
    add("--wildcards", metavar="DIR", help="replace each __name__ in a prompt by a line of DIR/name.txt")
    add("--no-choices", action="store_true", help="leave {red|blue} alone; else one is drawn from each picture's seed")


def job_from_flags(args: argparse.Namespace, **own: Any) -> Job:
    """The Job that the flags ask for; `own` are fields that a command found out by itself. Texts stand as they were.

    ValueError where a flag does not fit another.
    """
    from sfumato.tasks.plot import read_numbers

    given = {name: getattr(args, name, None) for flags in GROUPS.values() for name in flags} | own
    fields = {name: value for name, value in given.items() if value is not None}
    if "freeu" in fields and isinstance(fields["freeu"], str):
        try:
            fields["freeu"] = read_numbers(fields["freeu"])
        except ValueError as error:
            raise ValueError(f"freeu={error}") from error
    if isinstance(fields.get("options"), list):
        fields["options"] = dict(map(_option, fields["options"]))
    if isinstance(fields.get("controls"), list):
        fields["controls"] = tuple(map(read_control, fields["controls"]))
    if tags := "".join(_tags(args)):
        fields["prompt"] = f"{fields.get('prompt') or ''}{tags}"
    second = {name.removeprefix("hires."): fields.pop(name) for name in list(fields) if name.startswith("hires.")}
    if second and "scale" not in second:
        name, value = next(iter(second.items()))
        raise ValueError(f"hires-{name}={value!r}: there is no second pass; --hires SCALE asks for one")
    return Job(**fields, hires=Hires(**second) if second else None)


def _option(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        return name.strip().replace("-", "_"), float(number if equals and name.strip() else "")
    except ValueError:
        raise ValueError(f"option={text!r}: NAME=NUMBER is needed, as in s_churn=10") from None


def read_control(text: str) -> Control:
    """`MODEL,image=edges.png,weight=0.8` as a Control; names that it has no field for are its annotator's options."""
    model, *rest = text.split(",")
    values: dict[str, Any] = {"model": model.strip()}
    options: dict[str, float] = {}
    kinds = {field.name: field.type for field in fields_of(Control)}
    for part in rest:
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not name:
            raise ValueError(f"control={text!r}: MODEL,KEY=VALUE,... is needed, {part!r} is no KEY=VALUE")
        try:
            if name in kinds and name != "options":
                values[name] = float(value) if kinds[name] == "float" else value
            else:
                options[name] = float(value)
        except ValueError:
            raise ValueError(f"control={text!r}: {name}={value!r}: a number is needed") from None
    return Control(**values, options=options)


def _tags(args: argparse.Namespace) -> Iterator[str]:
    """The tags that --lora and --hypernet stand for; a colon of a drive or a path is no strength."""
    for kind, names in (("lora", getattr(args, "loras", [])), ("hypernet", getattr(args, "hypernets", []))):
        for text in names:
            name, colon, strength = text.rpartition(":")
            try:
                float(strength if colon else "x")
            except ValueError:
                name, strength = text, "1"
            if set(name) & set("<>:"):
                raise ValueError(
                    f"{kind}={text!r}: a name with '<', '>' or ':' cannot stand in a prompt; move the file"
                )
            yield f" <{kind}:{name}:{strength}>"


@dataclass(frozen=True)
class Texts:
    """What is done to a job's prompts before it is drawn: styles are put around them, then choices are made.

    `choices` None: made where the job's own profile is this program's, whose braces they are.
    """

    styles: list[Style] = field(default_factory=list)
    wildcards: Path | None = None
    choices: bool | None = None

    def jobs(self, job: Job) -> list[Job]:
        """The job with its texts as they will be drawn; where there are choices, a job of one picture for each."""
        from sfumato.tasks.scenes import seeds_of

        job = _each_text(job, self._styled) if self.styles else job
        own = job.like is None or job.like.lower() == "sfumato"
        if not (own if self.choices is None else self.choices):
            return [job]
        if self._chosen(job, job.seed) == job:  # a choice never leaves a text as it was
            return [job]
        found = []
        for index, seed in enumerate(seeds_of(job)):
            other = None if job.variation_seed is None else job.variation_seed + index
            found.append(self._chosen(replace(job, seed=seed, count=1, variation_seed=other), seed))
        return found

    def _styled(self, text: str, is_negative: bool) -> str:
        return apply_styles(text, [style.negative if is_negative else style.prompt for style in self.styles])

    def _chosen(self, job: Job, seed: int) -> Job:
        """Every text begins anew from the seed, so that like braces in them choose alike."""
        return _each_text(job, lambda text, _: choose(text, random.Random(seed), self.wildcards))


def _each_text(job: Job, change: Callable[[str, bool], str]) -> Job:
    """The job with a function of (text, whether it is negative) applied to its prompts, its second pass's too."""
    if job.hires is not None:
        prompt, negative = job.hires.prompt, job.hires.negative
        prompt = None if prompt is None else change(prompt, False)
        negative = None if negative is None else change(negative, True)
        job = replace(job, hires=replace(job.hires, prompt=prompt, negative=negative))
    return replace(job, prompt=change(job.prompt, False), negative=change(job.negative, True))


def texts_from_flags(args: argparse.Namespace) -> Texts:
    """What --style, --wildcards and --no-choices ask for. ValueError for a style or a folder that is not there."""
    wildcards = None if args.wildcards is None else Path(args.wildcards)
    if args.no_choices and wildcards is not None:
        raise ValueError(f"wildcards={args.wildcards!r}: --no-choices leaves them alone; one of the two is needed")
    if wildcards is not None and not wildcards.is_dir():
        raise ValueError(f"wildcards={args.wildcards!r}: no such folder")
    styles: list[Style] = []
    if args.style_names:
        path = Path(args.styles)
        if not path.is_file():
            raise ValueError(f"styles={args.styles!r}: no such file")
        styles = find_styles(args.style_names, read_styles(path))
    return Texts(styles, wildcards, False if args.no_choices else True if wildcards else None)
