"""One kind of personalising, from its pictures to its figures: makes them, trains, draws before and after, measures.

    python -m recipes.personal.report lora

The training is the command of docs/personalising.md. Writes KIND.json and KIND.png, and the page's table. Pictures
and the judge are those of the box's recipe (recipes/box/README.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from recipes.personal.page import PAGE, update
from recipes.personal.pictures import write_character, write_edges, write_style
from recipes.personal.sheet import save_sheet
from recipes.personal.training import COMMANDS, DATA, as_given, trained
from recipes.personal.trials import STYLE, TRIALS, Trial
from sfumato.pipeline import Pipeline

log = logging.getLogger(__name__)

OUT = Path("docs/personal")
STYLE_COUNT, EDGES_COUNT = 200, 1000  # pictures


def make_pictures(kind: str, data: Path, size: int) -> None:
    """What the kind's command learns from."""
    if kind == "style":
        write_style(DATA, data, STYLE, STYLE_COUNT)
    elif kind == "edges":
        write_edges(DATA, data, EDGES_COUNT)
    else:
        write_character(DATA, size)


def rounded(value: object) -> object:
    """Figures with four digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def report(args: argparse.Namespace) -> dict[str, object]:
    """Everything of a kind; what KIND.json holds."""
    model = Pipeline.from_pretrained(args.model, adapters=[]).model
    make_pictures(args.kind, args.data, model.family.size)
    given = [as_given(command, args.model, args.train_steps) for command in COMMANDS[args.kind]]
    runs = [trained(command, model.hash) for command in given]
    trial = Trial(args.model, runs, args.real, args.judge, args.count, args.steps)
    figures, rows = TRIALS[args.kind](trial)
    save_sheet(args.out / f"{args.kind}.png", rows)
    return {
        "model": model.hash,
        "trained": [{"command": run.command, "seconds": run.seconds, "core seconds": run.core_seconds} for run in runs],
        "cores": len(os.sched_getaffinity(0)),
        "drawn": {"each": args.count, "steps": args.steps},
        "figures": rounded(figures),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", choices=tuple(TRIALS))
    add("--model", metavar="FILE", help="a checkpoint of the box's family (default: the model in the box)")
    add("--out", type=Path, default=OUT, metavar="DIR", help="(default: %(default)s, with the page's table)")
    add("--data", type=Path, default=Path("data/box2"), metavar="DIR", help="pictures to learn styles and edges from")
    add("--real", type=Path, default=Path("data/judge-test"), metavar="DIR", help="real pictures, apart from those")
    add("--judge", type=Path, default=Path("runs/judge"), metavar="RUN", help="recipes.box.judge's run")
    add("--count", type=int, default=40, metavar="N", help="pictures drawn of each set (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="of the sampler (default: %(default)s)")
    add("--train-steps", type=int, metavar="N", help="a shorter training than the command's, to try")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = report(args)
    text = json.dumps(found, indent=1)
    (args.out / f"{args.kind}.json").write_text(text + "\n", encoding="utf-8")
    if args.out == OUT:
        update(PAGE, OUT)
    print(text)


if __name__ == "__main__":
    main()
