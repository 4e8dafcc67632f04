"""Draw a saved picture again from its recipe. Exit code 0 if every pixel is equal, 1 with the difference if not."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np

from sfumato.cli.txt2img import draw_with_bar
from sfumato.images import load_png, save_png
from sfumato.pipeline import Pipeline, recipe
from sfumato.tasks.checks import job_from_dict

log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato replay`."""
    add = parser.add_argument
    add("picture", metavar="FILE.png", help="a picture that sfumato saved")
    add("--ckpt", metavar="FILE", help="the checkpoint that drew it (default: the model in the box)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--out", metavar="FILE.png", help="save the new drawing here")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    path = Path(args.picture)
    pixels, made = load_png(path)
    try:
        job, index = job_from_dict(made["job"]), int(made["index"])
        precision, model_hash, model_name = made["precision"], made["model"]["hash"], made["model"]["name"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged ({error!r})") from error
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(precision, precision)
    pipeline = Pipeline.from_pretrained(args.ckpt, args.device, precision)
    if pipeline.model.hash != model_hash:
        raise ValueError(
            f"ckpt: {str(path)!r} was drawn by {model_name} ({model_hash}), this is {pipeline.model.name} "
            f"({pipeline.model.hash}); name the right file with --ckpt"
        )
    if not 0 <= index < job.count:
        raise ValueError(f"picture={str(path)!r}: its recipe is damaged (index {index} of {job.count})")
    result = draw_with_bar(pipeline, job)
    again = result.images[index]
    if args.out:
        save_png(Path(args.out), again, recipe(result, index))
        print(args.out)
    if again.shape != pixels.shape:
        print(f"different: {again.shape[1]} x {again.shape[0]}, saved {pixels.shape[1]} x {pixels.shape[0]}")
        return 1
    difference = np.abs(again.astype(int) - pixels.astype(int))
    if not difference.any():
        print("equal: every pixel")
        return 0
    changed = int((difference.max(axis=2) > 0).sum())
    print(f"different: {changed} of {difference[..., 0].size} pixels, by {difference.max()} of 255 at most")
    return 1
