"""`sfumato train diffusion` and `sfumato train autoencoder`: whole networks go on with captioned pictures."""

from __future__ import annotations

import argparse
import logging

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

log = logging.getLogger(__name__)


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """Of the U-Net."""
    add_run_flags(parser)
    parser.add_argument("--train-text", action="store_true", help="train the text encoder as well")
    add_loss_flags(parser, 0.1)
    add_watch_flags(parser)


def add_autoencoder_flags(parser: argparse.ArgumentParser) -> None:
    """Of the autoencoder."""
    add_run_flags(parser, text=False)
    add = parser.add_argument
    add("--decoder-only", action="store_true", help="keep the latents as they are, so that the U-Net still knows them")
    add("--random-crop", type=int, metavar="PX", help="train on crops of this side")
    add("--measure-scale", action="store_true", help="measure the latents in the end, and write their scale into the "
        "checkpoint: of a model from nothing, whose U-Net is still to be trained")  # fmt: skip


def run_diffusion(args: argparse.Namespace) -> int:
    """`sfumato train diffusion`."""
    from sfumato.train.data import open_pictures
    from sfumato.train.diffusion import DiffusionConfig
    from sfumato.train.tuning import tune_diffusion

    options = DiffusionConfig(args.caption_drop, args.min_snr, offset_noise=args.offset_noise)
    config = config_of(args)
    pictures, model = open_pictures(*args.data), load(args, device_of(args), "full").model
    shown = shown_of(args, model)
    path = tune_diffusion(model, pictures, args.out, shown, config, options, watched_of(args), args.train_text)
    return done(path, pictures)


def run_autoencoder(args: argparse.Namespace) -> int:
    """`sfumato train autoencoder`."""
    from sfumato.train.autoencoder import AutoencoderLoss
    from sfumato.train.beginning import measured_scale, rescaled
    from sfumato.train.data import open_pictures
    from sfumato.train.tuning import tune_autoencoder
    from sfumato.weights.checkpoint import load_model

    loss = AutoencoderLoss(perceptual_weight=0.0, crop=args.random_crop, decoder_only=args.decoder_only)
    config = config_of(args)
    if args.measure_scale and args.decoder_only:
        raise ValueError("measure_scale: with --decoder-only the latents and their scale stay as they are")
    pictures, model = open_pictures(*args.data, need_captions=False), load(args, device_of(args), "full").model
    shown = shown_of(args, model)
    path = tune_autoencoder(model, pictures, args.out, shown, config, loss)
    if args.measure_scale:
        result = load_model(path, model.device)
        scale = measured_scale(result, pictures, shown)
        rescaled(path, result, scale)
        log.info("latent_scale %.5f, 1 / deviation of the latents, is in %s", scale, path)
    return done(path, pictures)
