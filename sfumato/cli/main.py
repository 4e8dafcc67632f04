"""`sfumato COMMAND ...`: finds the command, and turns what a person can mend into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence

from sfumato import __version__

BAD_INPUT, STOPPED = 2, 130
COMMANDS = {
    "txt2img": "draw pictures from a prompt",
    "img2img": "draw over a picture",
    "inpaint": "draw a part of a picture anew",
    "outpaint": "put new ground on the sides of a picture",
    "depth2img": "draw over a picture and keep its depth",
    "upscale": "enlarge a picture",
    "edit": "change a picture by words, from the noise that it could have come from",
    "augment": "draw over every picture of a folder",
    "annotate": "make hints that steer drawing from pictures",
    "compress": "write pictures as small files of latents",
    "expand": "show such files as pictures again",
    "plot": "draw a table of pictures that vary along axes",
    "replay": "draw a saved picture again and compare",
    "inspect": "tell what a checkpoint is",
    "convert": "write a checkpoint in another layout or precision",
    "merge": "merge checkpoints, or bake in an autoencoder",
    "lora": "tell, merge, extract and resize adapters",
    "prune": "write only what drawing needs",
    "extract-ema": "write the averaged weights of a training checkpoint",
    "data": "choose, measure, score and check pictures to train on",
    "train": "look after training runs",
    "evaluate": "measure how near drawn pictures are to real ones and to their captions",
}


def run_command(command: Callable[[argparse.Namespace], int], args: argparse.Namespace, name: str) -> int:
    """Run a command; what a person can mend becomes `name: error: ...` and code 2, Ctrl-C code 130."""
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    try:
        return command(args)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out_of_memory and "allocate memory" not in str(error):
            raise
        print(f"{name}: error: out of memory; a smaller width, height or count needs less", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: stopped; what was finished is kept", file=sys.stderr)
        return STOPPED


def parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The whole command line; only the `wanted` command's module is imported and has its flags (None: all)."""
    top = argparse.ArgumentParser(prog="sfumato", description="Stable Diffusion: pictures from words.")
    top.add_argument("--version", action="version", version=f"sfumato {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary)
        if wanted in (name, None):
            module = importlib.import_module(f"sfumato.cli.{name.replace('-', '_')}")
            sub.description = module.__doc__
            module.add_flags(sub)
            sub.set_defaults(command=module.run, name=f"sfumato {name}")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `sfumato` program; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in words if not word.startswith("-")), "")
    args = parser(wanted).parse_args(words)
    return run_command(args.command, args, args.name)


if __name__ == "__main__":
    sys.exit(main())
