"""`sfumato train diffusion` and `sfumato train autoencoder`: whole networks go on with captioned pictures."""

from __future__ import annotations

import argparse

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
from sfumato.train.autoencoder import AutoencoderLoss
from sfumato.train.data import open_pictures
from sfumato.train.diffusion import DiffusionConfig
from sfumato.train.tuning import tune_autoencoder, tune_diffusion


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    """Of the U-Net."""
    add_run_flags(parser)
    parser.add_argument("--train-text", action="store_true", help="train the text encoder as well")
    add_loss_flags(parser, 0.1)
    add_watch_flags(parser)


def add_autoencoder_flags(parser: argparse.ArgumentParser) -> None:
    """Of the autoencoder."""
    add_run_flags(parser)
    add = parser.add_argument
    add("--decoder-only", action="store_true", help="keep the latents as they are, so that the U-Net still knows them")
    add("--random-crop", type=int, metavar="PX", help="train on crops of this side")


def run_diffusion(args: argparse.Namespace) -> int:
    """`sfumato train diffusion`."""
    options = DiffusionConfig(args.caption_drop, args.min_snr, offset_noise=args.offset_noise)
    config = config_of(args)
    pictures, model = open_pictures(*args.data), load(args, device_of(args), "full").model
    shown = shown_of(args, model)
    path = tune_diffusion(model, pictures, args.out, shown, config, options, watched_of(args), args.train_text)
    return done(path, pictures)


def run_autoencoder(args: argparse.Namespace) -> int:
    """`sfumato train autoencoder`."""
    loss = AutoencoderLoss(perceptual_weight=0.0, crop=args.random_crop, decoder_only=args.decoder_only)
    config = config_of(args)
    pictures, model = open_pictures(*args.data, need_captions=False), load(args, device_of(args), "full").model
    return done(tune_autoencoder(model, pictures, args.out, shown_of(args, model), config, loss), pictures)
