"""`sfumato COMMAND ...`: finds the command, and turns what a person can mend into one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from sfumato import __version__
from sfumato.cli import replay, txt2img

BAD_INPUT, STOPPED = 2, 130


def run_command(command: Callable[[argparse.Namespace], int], args: argparse.Namespace, name: str) -> int:
    """Run a command; what a person can mend becomes `name: error: ...` and code 2, Ctrl-C code 130."""
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    try:
        return command(args)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print(f"{name}: error: out of memory; a smaller width, height or count needs less", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: stopped; what was finished is kept", file=sys.stderr)
        return STOPPED


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="sfumato", description="Stable Diffusion: pictures from words.")
    top.add_argument("--version", action="version", version=f"sfumato {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module, summary in (
        ("txt2img", txt2img, "draw pictures from a prompt"),
        ("replay", replay, "draw a saved picture again and compare"),
    ):
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_flags(sub)
        sub.set_defaults(command=module.run, name=f"sfumato {name}")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `sfumato` program; returns the exit code."""
    args = parser().parse_args(argv)
    return run_command(args.command, args, args.name)


if __name__ == "__main__":
    sys.exit(main())
