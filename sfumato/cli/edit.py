"""Edit a picture by words: it is followed back to the noise that it could have come from, and drawn again from there.

DDIM inversion finds the noise, with --prompt saying what the picture shows; --to says what it is to become. With
--null-text the negative prompt is learnt step by step so that guidance does not lead away from the picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from sfumato.cli.loading import add_device_flags, add_model_flags, load
from sfumato.cli.protecting import Protecting, add_protecting_flags
from sfumato.cli.saving import Saver
from sfumato.types import Answer, Job, Query

# What a picture's recipe says of its edit.
TOLD = ("image", "prompt", "to", "negative", "guidance", "strength", "steps", "rounds", "null_text", "null_rounds",
        "null_rate")  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato edit`."""
    add = parser.add_argument
    add("--image", required=True, metavar="PATH", help="the picture")
    add("--prompt", default="", metavar="TEXT", help="what it shows (default: nothing is said)")
    add("--to", metavar="TEXT", help="what it is to show (default: the same: it is drawn again as it was)")
    add("--negative", default="", metavar="TEXT", help="what to stay away from; not with --null-text")
    add("--guidance", "--scale", type=float, default=1.5, metavar="G",
        help="how hard --to pulls; above 2 little stays without --null-text (default: %(default)s)")  # fmt: skip
    add("--strength", type=float, default=1.0, metavar="X",
        help="how far back to go, 1 is to noise; less keeps more (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, default=50, metavar="N", help="steps each way (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N",
        help="refinements of each step back, so that the way forth returns (default: %(default)s)")  # fmt: skip
    add("--null-text", action="store_true", help="learn the negative prompt of each step (Mokady et al. 2023)")
    add("--null-rounds", type=int, default=10, metavar="N", help="of learning, a step (default: %(default)s)")
    add("--null-rate", type=float, default=0.05, metavar="X", help="and its rate (default: %(default)s)")
    add_model_flags(parser)
    add_device_flags(parser)
    add("--outdir", metavar="DIR", default="outputs/edit-samples", help="(default: %(default)s)")
    add_protecting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import read_picture
    from sfumato.images.fitting import fitted
    from sfumato.tasks.canvas import flat
    from sfumato.tasks.inversion import inverted, null_text, redrawn
    from sfumato.tasks.scenes import Drawn
    from sfumato.tasks.studio import Studio

    if args.null_text and args.negative:
        raise ValueError(f"negative={args.negative!r}: it is learnt with --null-text; one of the two is needed")
    original = read_picture(args.image)
    picture = flat(original)
    protecting = Protecting(args)
    protecting.check_prompts([args.prompt if args.to is None else args.to])
    protecting.check_size(*picture.shape[:2])
    pipeline = load(args, args.device, args.precision)
    saver = Saver(Path(args.outdir))
    model = pipeline.model
    studio = Studio(model, tile=pipeline.tile)
    tall, wide = picture.shape[:2]
    step = model.family.size_step
    ground = fitted(picture, -(-wide // step) * step, -(-tall // step) * step, "keep")
    with tqdm(unit="step", leave=False, file=sys.stderr, disable=None) as bar:

        def watch(query: Query, answer: Answer) -> None:
            bar.update()

        latents = studio.encode(ground[None], Job())
        inversion = inverted(latents, args.prompt, model, args.steps, args.rounds, args.strength, watch)
        contexts = None
        if args.null_text:
            contexts = null_text(inversion, model, args.guidance, args.null_rounds, args.null_rate)
        wanted = args.prompt if args.to is None else args.to
        drawn = redrawn(inversion, wanted, model, args.guidance, args.negative, contexts, watch)
    pixels = studio.decode(Drawn(drawn, 0.0), Job())[:, :tall, :wide]
    told = {name: getattr(args, name) for name in TOLD}
    made = {
        "edit": told,
        "pictures": {"image": original.sha256},
        "model": {"name": model.name, "hash": model.hash, **model.facts},
        "made with": pipeline.made_with,
    }
    saver.picture(*protecting.protected(pipeline.result(Job(prompt=wanted), pixels, {}, 0.0), made))
    return 0
