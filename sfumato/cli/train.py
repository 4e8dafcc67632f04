"""Training: a checkpoint goes on with your own captioned pictures; and how far a run is.

The same command goes on where its run stopped. With several GPUs: `torchrun --nproc-per-node 8 -m sfumato.cli.main
train diffusion ...`. `model.safetensors` in the run's folder is what every command draws from.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from sfumato.cli.loading import add_model_flags, load
from sfumato.families import Model
from sfumato.train.autoencoder import AutoencoderLoss
from sfumato.train.config import DECAYS, OPTIMIZERS, PRECISIONS, LoopConfig
from sfumato.train.data import Pictures, bucket_sizes, open_pictures
from sfumato.train.data.bucketed import CROPS
from sfumato.train.diffusion import DiffusionConfig
from sfumato.train.distributed import local_device
from sfumato.train.logs import Status, status_of
from sfumato.train.tuning import Shown, tune_autoencoder, tune_diffusion

log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `sfumato train`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command, about in (
        ("diffusion", run_diffusion, "the U-Net, and the text encoder if you like"),
        ("autoencoder", run_autoencoder, "the autoencoder, or its decoder alone"),
    ):
        sub = commands.add_parser(name, help=f"train {about}", description=f"Train {about}.")
        _add_run_flags(sub)
        (_add_diffusion_flags if name == "diffusion" else _add_autoencoder_flags)(sub)
        sub.set_defaults(train=command)
    status = commands.add_parser("status", help="how far a run is", description="How far a training run is.")
    status.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(train=show_status)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="PATH",
        help="captioned pictures: a folder, shards (.tar), JSON lines or Parquet (docs/data.md)")  # fmt: skip
    add("--out", required=True, type=Path, metavar="RUN", help="the run's folder")
    add_model_flags(parser)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--size", type=int, metavar="PX", help="side of the pictures (default: the model's own)")
    add("--buckets", action="store_true", help="keep each picture's shape, near that many pixels, in batches of a kind")
    add("--crop", choices=CROPS, default="centre", help="where pictures are cut (default: %(default)s)")
    add("--flip", action="store_true", help="mirror half of the pictures")
    add("--steps", type=int, required=True, metavar="N", help="train up to this step")
    add("--batch", type=int, default=4, metavar="N", help="pictures of a batch, on each rank (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches of a step (default: %(default)s)")
    add("--lr", type=float, default=1e-5, metavar="X", help="highest learning rate (default: %(default)s)")
    add("--warmup", type=int, default=100, metavar="N", help="steps until it is reached (default: %(default)s)")
    add("--decay", choices=DECAYS, default="constant", help="what it does then (default: %(default)s)")
    add("--ema-decay", type=float, default=0.999, metavar="X", help="of the averaged weights")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the forward pass (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: %(default)s)")
    add("--shard", action="store_true", help="parameters in parts on the ranks (FSDP2)")
    add("--checkpoint-every", type=int, default=200, metavar="N", help="steps (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train-text", action="store_true", help="train the text encoder as well")
    add("--caption-drop", type=float, default=0.1, metavar="X", help="share without a caption (default: %(default)s)")
    add("--min-snr", type=float, metavar="GAMMA", help="weigh timesteps (Hang et al. 2023), 5 is usual (default: off)")
    add("--offset-noise", type=float, default=0.0, metavar="X", help="0.05 to 0.1 for very dark and light pictures")
    add("--prompt", action="append", default=[], metavar="TEXT", help="draw this at step 0 and on; may be repeated")
    add("--sample-every", type=int, default=200, metavar="N", help="steps between drawings (default: %(default)s)")


def _add_autoencoder_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--decoder-only", action="store_true", help="latents stay as they are, so that the U-Net still knows them")
    add("--random-crop", type=int, metavar="PX", help="train on crops of this side")


def run_diffusion(args: argparse.Namespace) -> int:
    """`sfumato train diffusion`."""
    options = DiffusionConfig(args.caption_drop, args.min_snr, offset_noise=args.offset_noise)
    config = config_of(args, sample_every=args.sample_every if args.prompt else 0)
    pictures, model = open_pictures(*args.data), load(args, device_of(args), "full").model
    shown = shown_of(args, model)
    path = tune_diffusion(model, pictures, args.out, shown, config, options, args.prompt, args.train_text)
    return _done(path, pictures)


def run_autoencoder(args: argparse.Namespace) -> int:
    """`sfumato train autoencoder`."""
    loss = AutoencoderLoss(perceptual_weight=0.0, crop=args.random_crop, decoder_only=args.decoder_only)
    config = config_of(args)
    pictures, model = open_pictures(*args.data, need_captions=False), load(args, device_of(args), "full").model
    return _done(tune_autoencoder(model, pictures, args.out, shown_of(args, model), config, loss), pictures)


def config_of(args: argparse.Namespace, sample_every: int = 0) -> LoopConfig:
    """The loop's settings that the flags ask for."""
    return LoopConfig(
        args.steps, args.batch, args.lr, args.warmup, args.decay, accumulate=args.accumulate,
        ema_decay=args.ema_decay, seed=args.seed, checkpoint_every=args.checkpoint_every, sample_every=sample_every,
        precision=args.precision, optimizer=args.optimizer, shard=args.shard,
    )  # fmt: skip


def shown_of(args: argparse.Namespace, model: Model) -> Shown:
    """How pictures are shown. ValueError where the size is none of the model's."""
    size, step = args.size or model.family.size, model.family.size_step
    if size < step or size % step:
        raise ValueError(f"size={size}: a multiple of {step} is needed")
    buckets = (
        bucket_sizes(size * size, max(step, size // 2 // step * step), 2 * size, step, size) if args.buckets else None
    )
    return Shown(size, buckets, args.crop, args.flip)


def device_of(args: argparse.Namespace) -> str | None:
    """The device asked for; under torchrun this rank's own."""
    return str(local_device()) if args.device is None and "WORLD_SIZE" in os.environ else args.device


def _done(path: Path, pictures: Pictures) -> int:
    for line in pictures.report.lines():
        log.warning("%s", line)
    print(path)
    return 0


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    return int(args.train(args))


def show_status(args: argparse.Namespace) -> int:
    """`sfumato train status`."""
    status = status_of(args.run)
    print(json.dumps(asdict(status), default=str) if args.json else told(status))
    return 0


def told(status: Status) -> str:
    """A status as lines for people."""
    owner = f"process {status.owner.get('pid', '?')} on {status.owner.get('host', '?')}"
    rest = f" (was killed: {owner})" if status.owner else ""
    share = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    lines = {
        "run": f"{status.folder}: {f'running, {owner}' if status.running else f'not running{rest}'}",
        "step": f"{status.step:,}{share}",
        "loss of late": None if status.loss is None else f"{status.loss:.5g}",
        "samples/s": None if status.per_second is None else f"{status.per_second:g}",
        "ETA": None if status.eta is None or not status.running else duration(status.eta),
        "last checkpoint": "none yet",
        "skipped steps": f"{status.skipped:,} not finite, {status.overflows:,} overflows of float16",
    }
    if status.checkpoint is not None and status.checkpoint_age is not None:
        lines["last checkpoint"] = (
            f"{status.checkpoint}, step {status.checkpoint_step:,}, {duration(status.checkpoint_age)} ago"
        )
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items() if value is not None)


def duration(seconds: float) -> str:
    """Such as 2 d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour:02}:{minute:02}:{second:02}"
