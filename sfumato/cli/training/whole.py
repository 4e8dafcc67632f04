"""`sfumato train diffusion` and `sfumato train autoencoder`: whole networks go on with captioned pictures."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli.loading import load
from sfumato.cli.training.runs import (
    add_loss_flags,
    add_run_flags,
    add_watch_flags,
    config_of,
    device_of,
    done,
    shown_of,
    watched_of,
)

if TYPE_CHECKING:
    from sfumato.train.autoencoder import AutoencoderLoss
    from sfumato.train.critic import PatchCritic
    from sfumato.train.views import Shown

log = logging.getLogger(__name__)

INTO = ("inpaint", "edit", "depth")


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """Of the U-Net."""
    add_run_flags(parser)
    parser.add_argument("--train-text", action="store_true", help="train the text encoder as well")
    parser.add_argument("--into", choices=INTO, help="make of a model that draws from words one that inpaints, edits "
        "by instructions (the captions), or sees depth: its U-Net gets more channels, zero at first")  # fmt: skip
    parser.add_argument("--seen", type=Path, metavar="DIR", help="for those that edit or see depth: pictures of the "
        "same names, what is edited or depth maps (bright is near)")  # fmt: skip
    parser.add_argument("--seen-drop", type=float, metavar="X",
        help="share that is not shown them (default: 0.1 for models that edit, 0 for others)")  # fmt: skip
    add_loss_flags(parser, 0.1)
    add_watch_flags(parser)


def add_autoencoder_flags(parser: argparse.ArgumentParser) -> None:
    """Of the autoencoder."""
    add_run_flags(parser, text=False)
    add = parser.add_argument
    add("--decoder-only", action="store_true", help="keep the latents as they are, so that the U-Net still knows them")
    add("--random-crop", type=int, metavar="PX", help="train on crops of this side")
    add("--critic", action="store_true", help="train against a critic of patches as well, with an optimiser of its own")
    add("--critic-weight", type=float, metavar="X", help="of its opinion, beside the adaptive weight (default: 0.5)")
    add("--critic-start", type=int, metavar="N", help="step from which it counts; from random weights some thousands "
        "(default: 0)")  # fmt: skip
    add("--lpips", type=Path, nargs="+", metavar="FILE",
        help="how pictures look counts too: a whole saved LPIPS, or VGG16's weights and its heads'")  # fmt: skip
    add("--lpips-weight", type=float, metavar="X", help="of that (default: 1)")
    add("--equivariance", type=float, default=0.0, metavar="X",
        help="share of steps whose latents are shrunk and turned (EQ-VAE; default: %(default)s)")  # fmt: skip
    add("--measure-scale", action="store_true", help="measure the latents in the end, and write their scale into the "
        "checkpoint: of a model from nothing, whose U-Net is still to be trained")  # fmt: skip


def run_diffusion(args: argparse.Namespace) -> int:
    """`sfumato train diffusion`."""
    from sfumato.train.data import open_pictures
    from sfumato.train.diffusion import DiffusionConfig
    from sfumato.train.seen import KINDS, widened
    from sfumato.train.tuning import tune_diffusion
    from sfumato.train.views import Hints

    config = config_of(args)
    pictures, model = open_pictures(*args.data), load(args, device_of(args), "full").model
    if args.into and model.family.concat != KINDS[args.into]:
        model = widened(model, args.into)
    concat = model.family.concat
    if (args.seen or args.seen_drop is not None) and concat not in ("picture", "depth"):
        raise ValueError(f"seen: {model.family.name}'s U-Net sees no other pictures; see --into")
    if args.prompt and concat in ("picture", "depth"):
        raise ValueError(f"prompt: {model.family.name} draws from pictures, so nothing is drawn on the way")
    seen = None if args.seen is None else Hints(args.seen, pictures, field="seen")
    drop = args.seen_drop if args.seen_drop is not None else 0.1 if concat == "picture" else 0.0
    options = DiffusionConfig(
        args.caption_drop, args.min_snr, offset_noise=args.offset_noise, beside_drop_prob=drop
    )  # fmt: skip
    shown = shown_of(args, model)
    path = tune_diffusion(model, pictures, args.out, shown, config, options, watched_of(args), args.train_text, seen)
    return done(path, pictures)


def _autoencoder_loss(args: argparse.Namespace) -> AutoencoderLoss:
    """The loss that the flags ask for; ValueError for a weight of what is not there."""
    from sfumato.train.autoencoder import AutoencoderLoss

    for flag, needed in (("critic_weight", "critic"), ("critic_start", "critic"), ("lpips_weight", "lpips")):
        if getattr(args, flag) is not None and not getattr(args, needed):
            raise ValueError(f"{flag}={getattr(args, flag):g}: it needs --{needed}")
    if args.lpips and len(args.lpips) > 2:
        raise ValueError(f"lpips: {len(args.lpips)} files; one (a whole LPIPS) or two (VGG16, heads) are taken")
    return AutoencoderLoss(
        perceptual_weight=0.0 if not args.lpips else 1.0 if args.lpips_weight is None else args.lpips_weight,
        critic_weight=0.5 if args.critic_weight is None else args.critic_weight,
        critic_start=args.critic_start or 0,
        crop=args.random_crop, decoder_only=args.decoder_only, equivariance=args.equivariance,
    )  # fmt: skip


def _smallest_side(args: argparse.Namespace, shown: Shown) -> int:
    """Of what critic and LPIPS see, px; ValueError where they cannot see so little."""
    side = args.random_crop or min(min(size) for size in shown.buckets or [(shown.size, shown.size)])
    if args.equivariance:
        side //= 2  # what latents are shrunk to at most
    for name in ("critic", "lpips"):
        if getattr(args, name) and side < 16:
            shrunk = ", shrunk by --equivariance," if args.equivariance else ""
            raise ValueError(f"{name}: 16 px or more are needed; pictures or crops{shrunk} are {side}")
    return side


def _critic(side: int, seed: int) -> PatchCritic:
    """The published critic; with a layer less where its patches of 70 px are larger than the pictures."""
    from sfumato.train.critic import CriticConfig, PatchCritic

    return PatchCritic(CriticConfig(num_layers=3 if side >= 64 else 2)).initialise(seed)


def run_autoencoder(args: argparse.Namespace) -> int:
    """`sfumato train autoencoder`."""
    from sfumato.train.beginning import measured_scale, rescaled
    from sfumato.train.data import open_pictures
    from sfumato.train.perceptual import load_lpips
    from sfumato.train.tuning import tune_autoencoder
    from sfumato.weights.checkpoint import load_model

    loss = _autoencoder_loss(args)
    config = config_of(args)
    if args.measure_scale and args.decoder_only:
        raise ValueError("measure_scale: with --decoder-only the latents and their scale stay as they are")
    perceptual = load_lpips(*args.lpips) if args.lpips else None
    pictures, model = open_pictures(*args.data, need_captions=False), load(args, device_of(args), "full").model
    shown = shown_of(args, model)
    side = _smallest_side(args, shown)
    critic = _critic(side, args.seed) if args.critic else None
    path = tune_autoencoder(model, pictures, args.out, shown, config, loss, perceptual, critic)
    if args.measure_scale:
        result = load_model(path, model.device)
        scale = measured_scale(result, pictures, shown)
        rescaled(path, result, scale)
        log.info("latent_scale %.5f, 1 / deviation of the latents, is in %s", scale, path)
    return done(path, pictures)
