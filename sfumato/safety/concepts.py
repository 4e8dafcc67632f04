"""The checker that was published with SD 1: CLIP's image tower against 17 concepts, and 3 that need special care.

CompVis/stable-diffusion-safety-checker; its rule is described by Rando et al. 2022. The concepts' names are not
published. Letters: B pictures, E width of embeddings, S side in px.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.clip import CLIPVisionConfig, VisionModel
from sfumato.safety.checking import Verdict
from sfumato.weights import towers
from sfumato.weights.files import TensorFile, open_tensors

HEAD_WIDTH = 64  # of CLIP's attention, where no config.json tells
CARE = 0.01  # what a match of special care adds to all scores after it
FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin")
PATCH, PLACES = (f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position"))
MARK = "special_care_embeds_weights"  # the tensor whose name tells where the checker is in a file


class Concepts(nn.Module):
    """images (B, 3, S, S), normalised -> cosines to the special (B, 3) and to the other concepts (B, 17)."""

    def __init__(self, config: CLIPVisionConfig, embed_dim: int, num_concepts: int = 17, num_special: int = 3) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, embed_dim, bias=False)
        for name, count in (("concept", num_concepts), ("special_care", num_special)):
            self.register_buffer(f"{name}_embeds", torch.ones(count, embed_dim))
            self.register_buffer(f"{name}_embeds_weights", torch.ones(count))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.normalize(self.visual_projection(self.vision_model(images)))
        special, concepts = self.get_buffer("special_care_embeds"), self.get_buffer("concept_embeds")
        return seen @ F.normalize(special).T, seen @ F.normalize(concepts).T


class ConceptChecker:
    """Flags pictures whose embedding is nearer to a concept than the concept's own threshold."""

    name = "stable-diffusion-safety-checker"

    def __init__(self, network: Concepts) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def check(self, pixels: np.ndarray) -> list[Verdict]:
        """pixels (B, H, W, 3) uint8; scores are cosines over thresholds, rounded to three digits as published."""
        device = self.network.visual_projection.weight.device
        images = prepared(pixels, self.network.config.image_size).to(device)
        special, concepts = (cosines.float().cpu().numpy() for cosines in self.network(images))
        return [self._verdict(*row) for row in zip(special, concepts, strict=True)]

    def _verdict(self, special: np.ndarray, concepts: np.ndarray) -> Verdict:
        """One picture's; a special match lowers the bar for what comes after it, other special ones too."""
        scores, care, flagged = {}, np.float32(0), False
        for name, cosines in (("special_care", special), ("concept", concepts)):
            thresholds = self.network.get_buffer(f"{name}_embeds_weights").float().cpu().numpy()
            for number, (cosine, threshold) in enumerate(zip(cosines, thresholds, strict=True)):
                score = scores[f"{name} {number}"] = round(float(cosine - threshold + care), 3)
                if score > 0 and name == "special_care":
                    care = np.float32(CARE)
                flagged = flagged or (score > 0 and name == "concept")
        return Verdict(flagged, scores, self.name)


def prepared(pixels: np.ndarray, size: int) -> Tensor:
    """pixels (B, H, W, 3) uint8 -> (B, 3, size, size), each as CLIP's own preparation makes it."""
    return torch.stack([towers.prepared(each, size) for each in pixels])


def open_concepts(path: str | Path) -> ConceptChecker:
    """The checker of a file, of a folder, or of the `safety_checker` inside a checkpoint; ValueError where none is."""
    file = _file_of(Path(path))
    with open_tensors(file) as tensors:
        state = _state(tensors)
    config = _config(state, file)
    counts = len(state["concept_embeds"]), len(state["special_care_embeds"])
    network = Concepts(config, state["visual_projection.weight"].shape[0], *counts)
    own = network.state_dict()
    for name, tensor in own.items():
        found = tuple(state[name].shape) if name in state else None
        if found != tuple(tensor.shape):
            told = "no tensor" if found is None else f"{found} is"
            raise ValueError(f"safety_checker={str(file)!r}: {told} {name}; {tuple(tensor.shape)} is needed")
    if unknown := sorted(set(state) - set(own)):
        raise ValueError(f"safety_checker={str(file)!r}: {unknown[0]} is not of this checker")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return ConceptChecker(network)


def holds_concepts(path: str | Path) -> bool:
    """Whether a file or folder carries the checker, from names alone."""
    try:
        with open_tensors(_file_of(Path(path))) as tensors:
            return _prefix(tensors) is not None
    except ValueError:
        return False


def _file_of(path: Path) -> Path:
    """The file of weights in a folder, or the path itself."""
    if not path.is_dir():
        return path
    for folder in (path / "safety_checker", path):
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    raise ValueError(f"safety_checker={str(path)!r}: no {' or '.join(FILES[::2])} in it or in its safety_checker/")


def _prefix(tensors: TensorFile) -> str | None:
    """What stands before the checker's names in a file."""
    found = [name.removesuffix(MARK) for name in tensors.names() if name.endswith(MARK)]
    return min(found, key=len) if found else None


def _state(tensors: TensorFile) -> dict[str, Tensor]:
    """The checker's tensors by our names."""
    prefix = _prefix(tensors)
    if prefix is None:
        raise ValueError(f"safety_checker={str(tensors.path)!r}: no tensor {MARK}; it holds no safety checker")
    state = {}
    for name in tensors.names():
        own = name.removeprefix(prefix).replace("vision_model.vision_model.", "vision_model.", 1)
        is_ours = own.startswith(("vision_model.", "visual_projection.", "concept_embeds", "special_care_embeds"))
        if name.startswith(prefix) and is_ours and not own.endswith("position_ids"):
            state[own] = tensors.read(name).clone()
    for needed in ("concept_embeds", "special_care_embeds", "visual_projection.weight", PATCH, PLACES):
        if needed not in state:
            raise ValueError(f"safety_checker={str(tensors.path)!r}: no tensor {needed}")
    return state


def _config(state: Mapping[str, Tensor], file: Path) -> CLIPVisionConfig:
    """The tower's shape, from its tensors; the heads are in no tensor, but in config.json where there is one."""
    patches = state[PATCH].shape
    width, patch = int(patches[0]), int(patches[2])
    side = round((len(state[PLACES]) - 1) ** 0.5) * patch
    layers = len({found[1] for name in state if (found := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name))})
    beside: dict[str, Any] = {}
    if (file.parent / "config.json").is_file():
        beside = json.loads((file.parent / "config.json").read_text(encoding="utf-8")).get("vision_config") or {}
    heads = int(beside.get("num_attention_heads", max(1, width // HEAD_WIDTH)))
    return CLIPVisionConfig(side, patch, width, layers, heads, beside.get("hidden_act", "quick_gelu") == "quick_gelu")
