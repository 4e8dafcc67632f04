"""The flags that every training run has, and what they become: pictures, their sizes, the loop's settings."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.loading import add_model_flags
from sfumato.cli.names import CROPS
from sfumato.train.config import DECAYS, OPTIMIZERS, PRECISIONS, LoopConfig

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.families import Model
    from sfumato.train.data import Pictures
    from sfumato.train.samples import Watched
    from sfumato.train.views import Shown

log = logging.getLogger(__name__)


def add_run_flags(
    parser: argparse.ArgumentParser,
    lr: float = 1e-5,
    ema_decay: float = 0.999,
    batch: int = 4,
    ranks: bool = True,
    need_data: bool = True,
    text: bool = True,
) -> None:
    """Data, folder, model, sizes, steps; with the defaults of a kind of training, and whether it knows ranks.

    Without `need_data` the command has another way to say what is learned from; with `text` it may train text
    encoders beside.
    """
    add = parser.add_argument
    add("--data", nargs="+", required=need_data, metavar="PATH",
        help="captioned pictures: a folder, shards (.tar), JSON lines or Parquet (docs/data.md)")  # fmt: skip
    add("--out", required=True, type=Path, metavar="RUN", help="the run's folder")
    add_model_flags(parser)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--size", type=int, metavar="PX", help="side of the pictures (default: the model's own)")
    add("--buckets", action="store_true", help="keep each picture's shape, near that many pixels, in batches of a kind")
    add("--crop", choices=CROPS, default="centre", help="where pictures are cut (default: %(default)s)")
    add("--flip", action="store_true", help="mirror half of the pictures")
    add("--steps", type=int, required=True, metavar="N", help="train up to this step")
    add("--batch", type=int, default=batch, metavar="N", help="pictures of a batch, on a rank (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches of a step (default: %(default)s)")
    add("--lr", type=float, default=lr, metavar="X", help="highest learning rate (default: %(default)s)")
    if text:
        help = "that of the text encoders, with --train-text (default: --lr)"
        add("--text-lr", type=float, metavar="X", help=help)
    add("--warmup", type=int, default=100, metavar="N", help="steps until it is reached (default: %(default)s)")
    add("--decay", choices=DECAYS, default="constant", help="what it does then (default: %(default)s)")
    add("--ema-decay", type=float, default=ema_decay, metavar="X", help="of averaged weights (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the forward pass (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: %(default)s)")
    if ranks:
        add("--shard", action="store_true", help="parameters in parts on the ranks (FSDP2)")
    add("--checkpoint-every", type=int, default=200, metavar="N", help="steps (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def add_watch_flags(parser: argparse.ArgumentParser, sample_every: int | None = 200) -> None:
    """What is drawn on the way."""
    add = parser.add_argument
    shown = "a tenth of the steps" if sample_every is None else "%(default)s"
    add("--prompt", action="append", default=[], metavar="TEXT", help="draw this on the way; may be given again")
    add("--sample-every", type=int, default=sample_every, metavar="N",
        help=f"steps between drawings, the first before the first step (default: {shown})")  # fmt: skip
    add("--sample-steps", type=int, metavar="N", help="steps of each drawing (default: the model's own)")


def add_loss_flags(parser: argparse.ArgumentParser, caption_drop: float) -> None:
    """What the objective does beside the plain error."""
    add = parser.add_argument
    add("--caption-drop", type=float, default=caption_drop, metavar="X",
        help="share without a caption (default: %(default)s)")  # fmt: skip
    add("--min-snr", type=float, metavar="GAMMA", help="weigh timesteps (Hang et al. 2023), 5 is usual (default: off)")
    add("--offset-noise", type=float, default=0.0, metavar="X", help="0.05 to 0.1 for very dark and light pictures")


def config_of(args: argparse.Namespace) -> LoopConfig:
    """The loop's settings that the flags ask for."""
    every = 0
    if getattr(args, "prompt", None):
        every = max(1, args.steps // 10) if args.sample_every is None else args.sample_every
    part_lr = {}
    if getattr(args, "text_lr", None) is not None:
        if not getattr(args, "train_text", False):
            raise ValueError(f"text_lr={args.text_lr:g}: text encoders are trained with --train-text only")
        part_lr["text"] = args.text_lr
    return LoopConfig(
        args.steps, args.batch, args.lr, args.warmup, args.decay, accumulate=args.accumulate,
        ema_decay=args.ema_decay, seed=args.seed, checkpoint_every=args.checkpoint_every, sample_every=every,
        precision=args.precision, optimizer=args.optimizer, shard=getattr(args, "shard", False), part_lr=part_lr,
    )  # fmt: skip


def watched_of(args: argparse.Namespace) -> Watched | None:
    """What is drawn on the way."""
    from sfumato.train.samples import Watched

    return Watched(tuple(args.prompt), steps=args.sample_steps) if args.prompt else None


def shown_of(args: argparse.Namespace, model: Model) -> Shown:
    """How pictures are shown. ValueError where the size is none of the model's."""
    from sfumato.train.data import bucket_sizes
    from sfumato.train.views import Shown

    size, step = args.size or model.family.size, model.family.size_step
    if size < step or size % step:
        raise ValueError(f"size={size}: a multiple of {step} is needed")
    buckets = (
        bucket_sizes(size * size, max(step, size // 2 // step * step), 2 * size, step, size) if args.buckets else None
    )
    return Shown(size, buckets, args.crop, args.flip)


def device_of(args: argparse.Namespace) -> str | None:
    """The device asked for; under torchrun this rank's own."""
    from sfumato.train.distributed import local_device

    return str(local_device()) if args.device is None and "WORLD_SIZE" in os.environ else args.device


def done(path: Path, pictures: Pictures) -> int:
    """Tell what was wrong with pictures, and print the result's file."""
    for line in pictures.report.lines():
        log.warning("%s", line)
    print(path)
    return 0
