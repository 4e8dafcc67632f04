"""Training goes on from a checkpoint: its U-Net, or its autoencoder, on a person's own captioned pictures.

What `sfumato train diffusion` and `sfumato train autoencoder` do. Knows no command line. Letters: B pictures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Model
from sfumato.families.conditioning import encode_captions
from sfumato.train.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.data import Bucketed, LatentBatch, Pictures
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, frozen
from sfumato.train.loop import LoopConfig, State, fit
from sfumato.train.samples import Samples, Watched
from sfumato.weights.checkpoint import save_checkpoint

CHECKPOINT = "model.safetensors"  # of the averaged weights, in the run's folder: any command draws from it


@dataclass(frozen=True)
class Shown:
    """How pictures are shown to what is trained: at `size` px square, or near it in each one's own shape (`buckets`).

    `crop` is "centre" or "random", `flip` mirrors half of them.
    """

    size: int
    buckets: Sequence[tuple[int, int]] | None = None
    crop: str = "centre"
    flip: bool = False

    def batches(self, pictures: Pictures, config: LoopConfig) -> Bucketed:
        """The pictures in batches, in the order that the run's seed gives."""
        sizes = self.buckets or (self.size, self.size)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says so; a batch is of all ranks together
        return Bucketed(pictures, sizes, config.batch_size * ranks, config.seed, self.crop, self.flip)


class Encoded:
    """Batches of latents of pictures, encoded when they are asked for, in the pictures' own order."""

    def __init__(self, pictures: Bucketed, model: Model) -> None:
        self.pictures, self.model = pictures, model
        self.batch_size = pictures.batch_size

    def __len__(self) -> int:
        return len(self.pictures)

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The pictures' own order."""
        return self.pictures.indices_at(step, rank, ranks)

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> LatentBatch:
        """Posterior means and deviations, and captions."""
        given = self.pictures.batch(indices)
        posterior = self.model.autoencoder.encode(given.pixels.to(self.model.device))
        return LatentBatch(posterior.mean, posterior.std, given.captions)


def tune_diffusion(
    model: Model,
    pictures: Pictures,
    folder: Path,
    shown: Shown,
    config: LoopConfig,
    options: DiffusionConfig,
    prompts: Sequence[str] = (),
    train_text: bool = False,
) -> Path:
    """Train a model's U-Net, and its text encoder where asked, on pictures; returns the checkpoint of the result.

    The run in `folder` goes on where it stopped. ValueError for families whose U-Net is told more than a text.
    """
    family = model.family
    if family.unet.vector_dim is not None or family.concat is not None or family.unet.num_classes is not None:
        raise ValueError(f"ckpt: {model.name!r} ({family.name}): only models that are told of a text alone are trained")
    _as_if_loaded(model)
    (text,), (tokenizer,), (tower,) = model.texts, model.tokenizers, family.texts
    parts: dict[str, nn.Module] = {"unet": model.unet.requires_grad_(True)}
    if train_text:
        parts["text"] = text.requires_grad_(True)

    def states(captions: list[str]) -> Tensor:
        return encode_captions(tower, text, tokenizer, captions)

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return model.unet(x, t, context)

    denoiser = Denoiser[Tensor](predict, NoiseSchedule(family.schedule), family.prediction)
    context = states if train_text else frozen(states)
    objective = DiffusionObjective(nn.ModuleDict(parts), denoiser, context, family.latent_scale, options)
    examples = Encoded(shown.batches(pictures, config), model)
    samples = Samples(family, model.networks, Watched(tuple(prompts)), folder) if prompts else None
    fit(objective, examples, config, folder, _Saving(model, folder), samples)
    return folder / CHECKPOINT


def tune_autoencoder(
    model: Model, pictures: Pictures, folder: Path, shown: Shown, config: LoopConfig, loss: AutoencoderLoss
) -> Path:
    """Train a model's autoencoder, or its decoder alone where `loss` says so; returns the checkpoint."""
    _as_if_loaded(model)
    objective = AutoencoderObjective(model.autoencoder.requires_grad_(True), loss)
    fit(objective, shown.batches(pictures, config), config, folder, _Saving(model, folder))
    return folder / CHECKPOINT


def _as_if_loaded(model: Model) -> None:
    """Weights of their own in memory, for gradients: a loaded model's may be maps of a file. All at rest.

    In the order that convolutions compute in: moments that are resumed must lie as those that were begun.
    """
    with torch.inference_mode(False), torch.no_grad():
        for network in model.networks.values():
            for parameter in network.parameters():
                order = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
                parameter.data = parameter.data.clone(memory_format=order)
            network.eval().requires_grad_(False)


class _Saving:
    """What a loop calls after each save: the averaged weights as a checkpoint that any command draws from."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.path = model, folder / CHECKPOINT

    def __call__(self, state: State) -> None:
        with state.averaged():
            parts = {name: network.state_dict() for name, network in self.model.networks.items()}
            save_checkpoint(self.path, self.model.family, parts, torch.float32)
