"""Training from nothing: a model of random weights, its CLIP, and the scale of the latents that it learned.

The order is Stable Diffusion's: autoencoder, CLIP, then the U-Net. Knows no command line. Letters: B pictures.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sfumato.families import BOX, FAMILIES, Family, Model
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNetConfig
from sfumato.train.autoencoder import initialise
from sfumato.train.clip import CLIPObjective
from sfumato.train.data import Pictures
from sfumato.train.loop import LoopConfig, State, fit
from sfumato.train.tuning import CHECKPOINT
from sfumato.train.views import Shown
from sfumato.weights.checkpoint import save_checkpoint
from sfumato.weights.files import save_safetensors
from sfumato.weights.parts import build

TINY = replace(
    BOX,
    name="tiny",
    texts=(replace(BOX.texts[0], config=CLIPTextConfig(vocab_size=1024, width=64, num_layers=2, num_heads=4)),),
    unet=UNetConfig(
        in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1),
        context_dim=64, num_heads=4, norm_groups=8,
    ),
    autoencoder=AutoencoderConfig(
        channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, latent_channels=4, norm_groups=4
    ),
    size=32,
    latent_scale=1.0,
)  # fmt: skip
PATCHES = 8  # of an image tower, along a side
LEAST = 1e-4  # deviation of latents that hold anything
MEASURED = 512  # pictures whose latents tell the scale, at most


def family_to_begin(name: str) -> Family:
    """A family by its name, or "tiny", which is trained in minutes; ValueError lists the names."""
    known = {"tiny": TINY} | FAMILIES
    if name not in known:
        raise ValueError(f"config={name!r}: one of {', '.join(known)}")
    return known[name]


def write_new(path: Path, family: Family, seed: int = 0) -> None:
    """A checkpoint (float32) of a family with random weights of the seed; training goes on from it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        parts = build(family)
        initialise(parts["autoencoder"], seed)  # type: ignore[arg-type]
        for part, tower in zip(family.text_parts, family.texts, strict=True):
            if tower.config.projection is None and hasattr(parts[part], "text_model"):
                parts[part].text_model.load_state_dict(_towers(tower.config, family.size).text_model.state_dict())  # type: ignore[union-attr]
    states = {name: network.state_dict() for name, network in parts.items()}
    save_checkpoint(path, replace(family, latent_scale=1.0), states, torch.float32)


def _towers(text: CLIPTextConfig, size: int) -> CLIP:
    """Two towers for pictures of `size` px, the image tower as deep and wide as the other."""
    vision = CLIPVisionConfig(size, max(1, size // PATCHES), text.width, text.num_layers, text.num_heads,
                              text.quick_gelu)  # fmt: skip
    return CLIP(CLIPConfig(text, vision, text.projection or text.width))


def train_clip(model: Model, pictures: Pictures, folder: Path, shown: Shown, config: LoopConfig) -> Path:
    """Train a model's text encoder, and an image tower beside it, to find each other; returns the checkpoint.

    The image tower begins with random weights of `config.seed`; both are also written as FOLDER/clip.safetensors, by
    the names of CLIPModel. ValueError for families of several text encoders, or whose last layers are not stored.
    """
    if len(model.texts) != 1 or model.family.texts[0].not_stored:
        raise ValueError(f"family={model.family.name!r}: CLIP is trained of families with one whole text encoder")
    if shown.buckets is not None:
        raise ValueError("buckets: CLIP takes squares")
    if shown.size % PATCHES:
        raise ValueError(f"size={shown.size}: a multiple of {PATCHES} is needed")
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        network = _towers(model.family.texts[0].config, shown.size)
    network.text_model.load_state_dict(model.texts[0].text_model.state_dict())
    network.to(model.device)
    saver = _Towers(model, folder)
    objective = CLIPObjective(network, ClipTokenizer(model.family.texts[0].config.vocab_size))
    fit(objective, shown.batches(pictures, config), config, folder, saver)
    return folder / CHECKPOINT


class _Towers:
    """What the loop calls after each save: the model with its averaged text encoder, and both towers."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder

    def __call__(self, state: State) -> None:
        with state.averaged():
            towers = {name: value.clone() for name, value in state.trained.network.state_dict().items()}
        text = self.model.family.text_parts[0]
        parts = {name: dict(network.state_dict()) for name, network in self.model.networks.items()}
        own = {name: value for name, value in towers.items() if name.startswith("text_model.")}
        parts[text] = {name: own.get(name, value) for name, value in parts[text].items()}
        save_checkpoint(self.folder / CHECKPOINT, self.model.family, parts, torch.float32)
        save_safetensors(self.folder / "clip.safetensors", towers, {"format": "pt"})


@torch.no_grad()
def measured_scale(model: Model, pictures: Pictures, shown: Shown, batch_size: int = 8) -> float:
    """1 / deviation of the latents of pictures, of at most 512: what makes them of unit variance (Rombach et al. 2022,
    section G)."""
    count = min(MEASURED, len(pictures))
    config = LoopConfig(steps=0, batch_size=min(batch_size, count))
    batches = shown.batches(pictures, config, need_captions=False)
    means, variances = [], []
    for step in range(-(-count // config.batch_size)):
        posterior = model.autoencoder.encode(batches.batch(batches.indices_at(step)).pixels.to(model.device))
        means.append(posterior.mean.flatten().double().cpu())
        variances.append(posterior.std.square().mean().double().cpu())
    deviation = float((torch.cat(means).var() + torch.stack(variances).mean()).sqrt())
    if not LEAST < deviation < math.inf:
        raise ValueError(f"latent_scale: the latents' deviation is {deviation}; the autoencoder has learned nothing")
    return 1 / deviation


def rescaled(path: Path, model: Model, scale: float) -> None:
    """Write a loaded model's checkpoint anew with another scale of its latents."""
    networks: dict[str, nn.Module] = model.networks
    states = {name: network.state_dict() for name, network in networks.items()}
    save_checkpoint(path, replace(model.family, latent_scale=scale), states, torch.float32)
