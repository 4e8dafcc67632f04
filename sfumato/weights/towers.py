"""CLIP's image tower by itself, as files: what scorers and IP-Adapters look at pictures with.

Letters: B pictures, S side in pixels, E width of an embedding, D width of the tower, M tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato.models.clip import CLIPVisionConfig, VisionModel, image_heads
from sfumato.weights.files import open_tensors

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that CLIP was trained with, Radford et al. 2021, its code
STD = (0.26862954, 0.26130258, 0.27577711)
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.safetensors")


class ImageTower(nn.Module):
    """CLIP's image side alone, with the names of its published weights: images (B, 3, S, S) -> (B, E), unit vectors."""

    def __init__(self, config: CLIPVisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, embed_dim, bias=False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.embedding(images), dim=-1)

    def embedding(self, images: Tensor) -> Tensor:
        """(B, E) as the projection gives it."""
        return self.visual_projection(self.vision_model(images))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, M, D): what the last layer but one says of the picture and its patches."""
        model = self.vision_model
        return model.encoder(model.pre_layrnorm(model.embeddings(images)), causal=False, stop=-1)


def load_tower(path: str | Path, quick_gelu: bool | None = None) -> ImageTower:
    """The image tower of a CLIP file (names of CLIPModel: vision_model.*, visual_projection.weight); its shape is read.

    A folder may say its heads and activation in config.json. `quick_gelu` None: as there, else OpenAI's for towers of
    768 and 1024, the exact one, OpenCLIP's, for wider ones. ValueError names what lacks.
    """
    path = Path(path)
    told: dict[str, Any] = {}
    if path.is_dir():
        config_file = path / "config.json"
        told = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        told = told.get("vision_config", told)
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise ValueError(f"clip={str(path)!r}: none of {', '.join(FILES)} is in it")
        path = there[0]
    with open_tensors(path) as file:
        names = [name for name in file.names() if name.startswith(("vision_model.", "visual_projection."))]
        wanted = {"visual_projection.weight", "vision_model.embeddings.patch_embedding.weight"}
        if lacking := sorted(wanted - set(names)):
            raise ValueError(f"clip={str(path)!r}: no tensor {lacking[0]}; the weights of a CLIPModel are needed")
        patches = file.shape("vision_model.embeddings.patch_embedding.weight")
        places = file.shape("vision_model.embeddings.position_embedding.weight")[0] - 1
        layers = {int(name.split(".")[3]) for name in names if name.startswith("vision_model.encoder.layers.")}
        config = CLIPVisionConfig(
            image_size=round(places**0.5) * patches[2],
            patch_size=patches[2],
            width=patches[0],
            num_layers=len(layers),
            num_heads=told.get("num_attention_heads", image_heads(patches[0])),
            quick_gelu=_quick(patches[0], told.get("hidden_act")) if quick_gelu is None else quick_gelu,
        )
        tower = ImageTower(config, file.shape("visual_projection.weight")[0])
        state = {name: file.read(name).float() for name in names if not name.endswith("position_ids")}
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"clip={str(path)!r}: not a CLIP of a known shape ({' '.join(str(error).split())})") from error
    return tower.eval()


def _quick(width: int, activation: str | None) -> bool:
    return width <= 1024 if activation is None else activation == "quick_gelu"


def prepared(pixels: np.ndarray, size: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, size, size): the shorter side resized (bicubic), the middle, normalised, as CLIP's own.

    The longer side is rounded down as CLIP's and transformers' code do it: the product first, then the division.
    """
    tall, wide = pixels.shape[:2]
    shorter = min(tall, wide)
    new = (int(size * wide / shorter), int(size * tall / shorter))
    image = Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    cut = np.array(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    normal = (cut - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1)
