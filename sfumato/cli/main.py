"""`sfumato COMMAND ...`: finds the command, and turns what a person can mend into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence

from sfumato import __version__

BAD_INPUT, STOPPED = 2, 130
COMMANDS = {  # name: (what it does, an example)
    "txt2img": ("draw pictures from a prompt", '--prompt "3d octopus on a blue background" --count 4'),
    "img2img": ("draw over a picture", '--image a.png --strength 0.6 --prompt "a rose"'),
    "inpaint": ("draw a part of a picture anew", '--image a.png --mask m.png --prompt "a rose"'),
    "outpaint": ("put new ground on the sides of a picture", '--image a.png --left 128 --right 128 --prompt "a beach"'),
    "depth2img": (
        "draw over a picture and keep its depth",
        '--ckpt sd2-depth.safetensors --image a.png --depth depth.png --prompt "a robot"',
    ),
    "upscale": ("enlarge a picture", "--image a.png --factor 4"),
    "edit": (
        "change a picture by words, from the noise that it could have come from",
        '--image a.png --prompt "a red apple" --to "a green apple"',
    ),
    "augment": ("draw over every picture of a folder", "faces/ others/ --strength 0.5 0.7 --copies 3"),
    "annotate": ("make hints that steer drawing from pictures", "canny photo.jpg hint.png --low 100 --high 200"),
    "compress": ("write pictures as small files of latents", "a.png --quality 40"),
    "expand": ("show such files as pictures again", "a.sfl"),
    "plot": (
        "draw a table of pictures that vary along axes",
        '--x sampler=euler,heun --y steps=2,5,10 --prompt "a cat"',
    ),
    "batch": ("draw every row of a table, exactly once", "prompts.parquet out/ --steps 20"),
    "serve": ("draw for many users at once over HTTP", "--port 7861 --data served/"),
    "replay": ("draw a saved picture again and compare", "outputs/txt2img-samples/samples/00000.png"),
    "watermark": ("write an invisible mark into a picture, or read it", 'write a.png b.png --text "mine"'),
    "check": ("look at pictures with a safety checker", "outputs/txt2img-samples/samples"),
    "keys": ("make a key to sign pictures with", "new ~/.ssh/pictures"),
    "verify": ("tell whether a picture is as it was signed, and by whom", "a.png --key pictures.pub"),
    "inspect": ("tell what a checkpoint is", "model.safetensors"),
    "convert": ("write a checkpoint in another layout or precision", "model.ckpt folder/"),
    "merge": (
        "merge checkpoints, or bake in an autoencoder",
        "a.safetensors b.safetensors out.safetensors --share 0.3",
    ),
    "lora": ("tell, merge, extract and resize adapters", "inspect style.safetensors --ckpt model.safetensors"),
    "prune": ("write only what drawing needs", "full.ckpt small.safetensors"),
    "extract-ema": ("write the averaged weights of a training checkpoint", "full.ckpt ema.safetensors"),
    "data": ("choose, measure, score and check pictures to train on", "stats pictures/ --out report"),
    "train": (
        "train models, adapters, words and what steers, on your own pictures",
        "diffusion --data pictures/ --out runs/mine --steps 2000",
    ),
    "evaluate": (
        "measure how near drawn pictures are to real ones and to their captions",
        "--a real/ --b drawn/ --features mobilenet-v2",
    ),
    "doctor": ("tell what is here, what would be chosen and why, and draw a test picture", "--json"),
    "completion": ("print completion of commands and flags for a shell", "bash"),
}
EXIT_CODES = {
    0: "done",
    1: "done, and something is not well: pixels differ (replay), pictures are broken (augment, data check), rows "
    "failed (batch), some of several jobs failed (drawing), the test picture is wrong (doctor)",
    BAD_INPUT: "not done, or not all of it: what was asked for cannot be, and one line says why",
    STOPPED: "stopped by Ctrl-C; what was finished is kept",
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
    codes = "; ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items())
    top = argparse.ArgumentParser(
        prog="sfumato", description="Stable Diffusion: pictures from words.",
        epilog=f"COMMAND --help tells more, with an example. Exit codes: {codes}.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"sfumato {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, example) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, epilog=f"example: sfumato {name} {example}")
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
