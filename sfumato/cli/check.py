"""Look at pictures with a safety checker: a line of JSON for each. Exit code 1 where one was flagged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sfumato.cli.beginning import pictures_in


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato check`."""
    add = parser.add_argument
    add("pictures", nargs="+", metavar="FILE", help="pictures, or folders of them")
    add("--safety-checker", metavar="PATH", help="the published checker's weights, or opennsfw (default: opennsfw)")
    add("--flagged", action="store_true", help="print only those that are flagged")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import read_picture
    from sfumato.safety.choosing import open_checker
    from sfumato.tasks.canvas import flat

    checker = open_checker(args.safety_checker)
    paths = [
        path for name in args.pictures for path in (pictures_in(Path(name)) if Path(name).is_dir() else [Path(name)])
    ]
    any_flagged = False
    for path in paths:
        verdict = checker.check(flat(read_picture(path))[None])[0]
        any_flagged = any_flagged or verdict.flagged
        if verdict.flagged or not args.flagged:
            print(json.dumps({"picture": str(path), **verdict.to_dict()}, ensure_ascii=False), flush=True)
    return 1 if any_flagged else 0
