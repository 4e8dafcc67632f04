"""Every kind of family at tiny size, and checkpoints of them with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato.families import FAMILIES, Family
from sfumato.models.clip import CLIPTextConfig
from sfumato.weights.parts import build

TEXT = CLIPTextConfig(width=8, num_layers=2, num_heads=2)


def tiny(family: Family) -> Family:
    """The same kind of family, thousands of times smaller: all that tells kinds apart is kept."""
    texts = tuple(
        replace(
            tower,
            config=replace(
                tower.config,
                vocab_size=600,
                width=8 * (index + 1),
                num_layers=tower.config.num_layers // 10 + 1,
                num_heads=2,
                projection=tower.config.projection and 12,
            ),
        )
        for index, tower in enumerate(family.texts)
    )
    numbers = sum({"aesthetic": 1}.get(name, 2) for name in family.size_cond)
    unet = replace(
        family.unet,
        channels=8,
        num_res_blocks=1,
        transformer_depth=tuple(min(depth, 2) for depth in family.unet.transformer_depth),
        middle_depth=min(family.unet.middle_depth, 2),
        context_dim=sum(tower.config.width for tower in texts),
        num_heads=family.unet.num_heads if family.unet.head_channels else 2,
        head_channels=family.unet.head_channels and 4,
        vector_dim=family.unet.vector_dim and 12 + 8 * numbers,
        num_classes=family.unet.num_classes and 10,
        norm_groups=4,
    )
    autoencoder = replace(family.autoencoder, channels=8, num_res_blocks=1, norm_groups=4)
    small = replace(family, texts=texts, unet=unet, autoencoder=autoencoder, size_dim=8 if family.size_cond else 256)
    return replace(small, name=f"tiny-{family.name}", size=64)


TINIES = {name: tiny(family) for name, family in FAMILIES.items() if name != "box"}


def random_parts(family: Family, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random weights for every tensor of the family, small enough that nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, dict[str, Tensor]] = {}
    for part, module in build(family).items():
        state = {}
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                state[name] = noise * tensor[0].numel() ** -0.5
            else:
                state[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        parts[part] = state
    return parts


def save_bare(path: Path, family: Family, parts: dict[str, dict[str, Tensor]]) -> Path:
    """A file as others write them: the original layout, nothing in the header."""
    from sfumato.weights.checkpoint import save_checkpoint
    from sfumato.weights.files import load_safetensors, save_safetensors

    save_checkpoint(path, family, parts, torch.float32)
    tensors, _ = load_safetensors(path)
    save_safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, {})
    return path
