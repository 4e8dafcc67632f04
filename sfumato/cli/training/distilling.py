"""`sfumato train consistency`: a model learns to draw in few steps what it draws in many."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from sfumato.cli.loading import load
from sfumato.cli.names import LCM_RANK, LCM_SOLVER_STEPS, PRECISIONS
from sfumato.cli.training.runs import (
    add_run_flags,
    add_watch_flags,
    config_of,
    device_of,
    done,
    shown_of,
    watched_of,
)


def add_consistency_flags(parser: argparse.ArgumentParser) -> None:
    """The loop's, the teacher's, the adapter's."""
    add_run_flags(parser, 1e-4, 0.95, ranks=False, need_data=False)
    add_watch_flags(parser, None)
    add = parser.add_argument
    add("--latents", nargs="+", type=Path, metavar="FILE", help="instead of --data: latents that were computed before")
    add("--name", dest="result", metavar="NAME", help="of the result's file (default: the run's folder's)")
    add("--guidance", type=float, metavar="G", help="the teacher's, which the result has in it (default: the model's)")
    add("--solver-steps", type=int, default=LCM_SOLVER_STEPS, metavar="N",
        help="levels of the teacher's DDIM (default: %(default)s)")  # fmt: skip
    add("--rank", type=int, default=LCM_RANK, metavar="N", help="of the adapter (default: %(default)s)")
    add("--save-dtype", choices=PRECISIONS, default="fp16", help="precision of the adapter's file; training "
        "keeps its own (default: %(default)s)")  # fmt: skip
    add("--full", action="store_true", help="train the whole U-Net instead: the result is a checkpoint")


def run_consistency(args: argparse.Namespace) -> int:
    """`sfumato train consistency`."""
    from sfumato.pipeline import PRECISIONS as DTYPES
    from sfumato.train.conditions import check_trainable
    from sfumato.train.consistency import LCM_LORA, ConsistencyConfig, distil
    from sfumato.train.data import CachedLatents, open_pictures
    from sfumato.train.data.latents import fingerprint
    from sfumato.train.views import latents_of

    if (args.data is None) == (args.latents is None):
        raise ValueError("data: one of --data PATH and --latents FILE is needed")
    loop, lora = config_of(args), replace(LCM_LORA, rank=args.rank, alpha=float(args.rank))
    pictures = None if args.data is None else open_pictures(*args.data)
    model = load(args, device_of(args), "full").model
    check_trainable(model, sees=())
    guidance = model.family.defaults.guidance if args.guidance is None else args.guidance
    config = ConsistencyConfig(guidance, args.solver_steps)
    watched = watched_of(args)
    if watched is not None:
        watched = replace(watched, steps=watched.steps or 4, sampler="lcm", guidance=1.0)
    name = args.result or args.out.absolute().name
    adapter, dtype = None if args.full else lora, DTYPES[args.save_dtype]
    if pictures is not None:
        examples = latents_of(model, pictures, shown_of(args, model), loop)
        path = distil(model, examples, args.out, name, loop, config, adapter, watched, dtype)
        return done(path, pictures)
    whole = loop.batch_size * int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says so
    cached = CachedLatents(args.latents, fingerprint(model.autoencoder)).in_batches(whole, loop.seed)
    print(distil(model, cached, args.out, name, loop, config, adapter, watched, dtype))
    return 0
