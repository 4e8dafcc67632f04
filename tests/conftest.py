"""Fixtures that several files share: a tiny family of the box's shape, and a checkpoint of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

import pytest
import torch

from sfumato.families import BOX, Defaults, Family, TextTower
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sfumato.models.unet import UNetConfig
from sfumato.weights.checkpoint import build, save_checkpoint
from sfumato.weights.files import save_safetensors

TINY = replace(
    BOX,
    name="tiny",
    texts=(TextTower(CLIPTextConfig(vocab_size=1024, width=16, num_layers=2, num_heads=2)),),
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        transformer_depth=(1, 1),
        context_dim=16,
        num_heads=2,
        norm_groups=4,
    ),
    autoencoder=AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4, norm_groups=4),
    size=16,
    latent_scale=0.73793,
    defaults=Defaults(steps=4, guidance=3.0, sampler="dpmpp_2m"),
)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, also where a network starts at zero, so that nothing hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="session")
def tiny_family() -> Family:
    return TINY


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    parts = {name: randomise(module).state_dict() for name, module in build(TINY).items()}
    save_checkpoint(path, TINY, parts, torch.float32)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs are equal bit by bit where sums come in one order, which several threads do not promise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of our own kind with random weights: 16 px, 24 numbers."""
    torch.manual_seed(0)
    own = CLIP(CLIPConfig(CLIPTextConfig(1024, 32, 2, 4), CLIPVisionConfig(16, 8, 32, 2, 4), embed_dim=24))
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_safetensors(path, own.state_dict(), {})
    return path
