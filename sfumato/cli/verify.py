"""Tell whether a picture and its recipe are as they were signed, and by whom. Exit code 0 if so, 1 if not."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfumato.safety.provenance import load_public, verify


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato verify`."""
    add = parser.add_argument
    add("picture", metavar="FILE.png", help="a picture that sfumato saved")
    add("--key", metavar="PUB", help="the public key that must have signed it (default: any may)")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.images import load_png

    wanted = None if args.key is None else load_public(args.key)
    report = verify(*load_png(Path(args.picture)))
    if report.by is None:
        print("not signed")
        return 1
    print(f"pixels: {'as signed' if report.pixels_same else 'changed'}")
    print(f"recipe: {'as signed' if report.recipe_same else 'changed, or not signed with the key that it names'}")
    print(f"signed by {report.by}" if report.recipe_same else f"says it is signed by {report.by}")
    if wanted is not None and report.by != wanted:
        print(f"that is another key than {wanted}")
        return 1
    return 0 if report.sound else 1
