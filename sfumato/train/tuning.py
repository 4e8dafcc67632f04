"""Training goes on from a checkpoint: its U-Net, or its autoencoder, on a person's own captioned pictures.

What `sfumato train diffusion` and `sfumato train autoencoder` do. Knows no command line. Letters: B pictures.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sfumato.families import Model
from sfumato.models.layers import hasten
from sfumato.train.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.conditions import check_trainable, objective_of, predicting
from sfumato.train.critic import PatchCritic
from sfumato.train.data import Pictures
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective
from sfumato.train.distributed import is_first, whole_weights
from sfumato.train.loop import LoopConfig, State, fit
from sfumato.train.perceptual import Perceptual
from sfumato.train.samples import Samples, Watched
from sfumato.train.views import Encoded, Hints, Shown, latents_of
from sfumato.weights.checkpoint import save_checkpoint

__all__ = ["CHECKPOINT", "Encoded", "Shown", "Whole", "tune_autoencoder", "tune_diffusion", "tuned"]

CHECKPOINT = "model.safetensors"  # of the averaged weights, in the run's folder: any command draws from it


def tuned(model: Model, options: DiffusionConfig, train_text: bool) -> DiffusionObjective:
    """The objective that trains a model's whole U-Net, and its text encoders where asked; all else rests."""
    check_trainable(model, sees=("inpaint", "picture", "depth"))
    _as_if_loaded(model)
    parts: dict[str, nn.Module] = {"unet": model.unet.requires_grad_(True)}
    if train_text:
        texts = zip(model.family.text_parts, model.texts, strict=True)
        parts |= {name: text.requires_grad_(True) for name, text in texts}
    return objective_of(model, nn.ModuleDict(parts), predicting(model), options, train_text)


def tune_diffusion(
    model: Model,
    pictures: Pictures,
    folder: Path,
    shown: Shown,
    config: LoopConfig,
    options: DiffusionConfig,
    watched: Watched | None = None,
    train_text: bool = False,
    seen: Hints | None = None,
) -> Path:
    """Train a model's U-Net, and its text encoder where asked, on pictures; returns the checkpoint of the result.

    `seen` are the pictures that are edited, or depth maps, for models that see those. The run in `folder` goes on where
    it stopped. ValueError for families whose U-Net is told more than a text and one of these.
    """
    objective = tuned(model, options, train_text)
    examples = latents_of(model, pictures, shown, config, seen)
    samples = Samples(model.family, model.networks, watched, folder) if watched else None
    fit(objective, examples, config, folder, Whole(model, folder / CHECKPOINT), samples)
    return folder / CHECKPOINT


def tune_autoencoder(
    model: Model,
    pictures: Pictures,
    folder: Path,
    shown: Shown,
    config: LoopConfig,
    loss: AutoencoderLoss,
    perceptual: Perceptual | None = None,
    critic: PatchCritic | None = None,
) -> Path:
    """Train a model's autoencoder, or its decoder alone where `loss` says so; returns the checkpoint."""
    _as_if_loaded(model)
    for judge in (perceptual, critic):
        if judge is not None:
            judge.to(model.device)
    objective = AutoencoderObjective(model.autoencoder.requires_grad_(True), loss, perceptual, critic)
    fit(objective, shown.batches(pictures, config), config, folder, Whole(model, folder / CHECKPOINT))
    return folder / CHECKPOINT


def _as_if_loaded(model: Model) -> None:
    """Weights of their own in memory, for gradients: a loaded model's may be maps of a file. All at rest.

    In the order that convolutions compute in: moments that are resumed must lie as those that were begun. The U-Net's
    and the autoencoder's convolutions are hastened.
    """
    with torch.inference_mode(False), torch.no_grad():
        for network in model.networks.values():
            for parameter in network.parameters():
                order = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
                parameter.data = parameter.data.clone(memory_format=order)
            network.eval().requires_grad_(False)
            hasten(network)


class Whole:
    """What a loop calls after each save: the averaged weights as a checkpoint that any command draws from.

    All ranks call it where they hold parts of the weights; the first one writes.
    """

    def __init__(self, model: Model, path: Path) -> None:
        self.model, self.path = model, path

    def __call__(self, state: State) -> None:
        with state.averaged():
            parts = {name: whole_weights(network) for name, network in self.model.networks.items()}
            if is_first():
                save_checkpoint(self.path, self.model.family, parts, torch.float32)
