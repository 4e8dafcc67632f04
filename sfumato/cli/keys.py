"""Make a key to sign pictures with: `sfumato keys new FILE` writes FILE, to be kept secret, and FILE.pub to show."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfumato.safety.provenance import new_key


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato keys`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = commands.add_parser("new", help="make a new key")
    new.add_argument("file", metavar="FILE", help="where the private key goes, readable by its owner only")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    print(f"{args.file}\n{args.file}.pub\n{new_key(Path(args.file))}")
    return 0
