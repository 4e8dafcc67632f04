"""Training: a checkpoint goes on with your own pictures, learns a subject, a style or to be steered; how far a run is.

The same command goes on where its run stopped. What a run makes lies in its folder: `model.safetensors` of diffusion
and autoencoder, else NAME.safetensors (NAME.pt of a hypernetwork), as `--adapters RUN` of every command finds it. With
several GPUs: `torchrun --nproc-per-node 8 -m sfumato.cli.main train diffusion ...`.
"""

from __future__ import annotations

import argparse

from sfumato.cli.training import beginning, distilling, personal, status, whole

COMMANDS = (
    ("new", beginning.add_new_flags, beginning.run_new, "write a checkpoint of random weights, to train from nothing"),
    ("clip", beginning.add_clip_flags, beginning.run_clip, "train the text encoder to tell pictures by their captions"),
    ("diffusion", whole.add_diffusion_flags, whole.run_diffusion, "train the U-Net, and the text encoder if you like"),
    ("autoencoder", whole.add_autoencoder_flags, whole.run_autoencoder, "train the autoencoder, or its decoder alone"),
    ("lora", personal.add_lora_flags, personal.run_lora, "learn a subject or a style beside the weights"),
    ("dreambooth", personal.add_dreambooth_flags, personal.run_dreambooth, "learn a subject, and keep its class"),
    ("textual-inversion", personal.add_inversion_flags, personal.run_inversion, "learn a new word"),
    ("hypernetwork", personal.add_hypernetwork_flags, personal.run_hypernetwork, "learn a network beside attentions"),
    ("controlnet", personal.add_controlnet_flags, personal.run_controlnet, "learn to be steered by pictures"),
    ("consistency", distilling.add_consistency_flags, distilling.run_consistency, "learn to draw in 1 to 8 steps"),
    ("status", status.add_status_flags, status.show_status, "tell how far a run is"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `sfumato train`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, flags, command, about in COMMANDS:
        sub = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        flags(sub)
        sub.set_defaults(train=command)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    return int(args.train(args))
