"""How different two pictures look: distances between the features that frozen networks see in them.

Zhang et al. 2018 (LPIPS), in the public formats of its weights; or the layers of any other network, our own CLIP image
tower among them. Knows nothing of what is trained with it. Letters: B pictures, C channels, h w size of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.models.clip import CLIP
from sfumato.weights.files import open_tensors

Features = Callable[[Tensor], Sequence[Tensor]]

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: a 2 x 2 maximum
VGG16_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pictures in [0, 1]
# LPIPS scales pictures in [-1, 1] itself, with these rounded figures.
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def unit(features: Tensor, eps: float = 1e-10) -> Tensor:
    """features (B, C, h, w) with the C numbers of every place scaled to length 1; 0 stays 0."""
    length = features.float().square().sum(dim=1, keepdim=True)
    # the root has no slope at 0, where whole places of a ReLU are
    return features / (torch.where(length > 0, length, 1.0).sqrt() + eps)


def clip_tower(network: CLIP, layers: Sequence[int] | None = None) -> LayerFeatures:
    """The image tower of a CLIP as features: its patches after each layer (or those given), none of the class token."""
    config = network.config.vision
    chosen = range(config.num_layers) if layers is None else layers
    if unknown := set(chosen) - set(range(config.num_layers)):
        raise ValueError(f"layers={min(unknown)}: the image tower has 0 to {config.num_layers - 1}")
    names = [f"encoder.layers.{index}" for index in chosen]
    return LayerFeatures(network.vision_model, names, size=config.image_size)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or torch file; ValueError, naming the file, where it is neither."""
    file = open_tensors(path)
    return {name: file.read(name) for name in file.names()}


def lpips(vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> Perceptual:
    """LPIPS over VGG16, version 0.1: the distance of the `lpips` package, and of ldm's and taming's losses.

    `vgg` has torchvision's names (`features.0.weight`, ...), `heads` those of the public `vgg.pth` of LPIPS
    (`lin0.model.1.weight` (1, C, 1, 1), ...). A whole saved LPIPS (`net.slice1.0.weight`, ...) holds both.
    ValueError names the first tensor that is missing or of another shape.
    """
    trunk = VGG16Features()
    named = {re.sub(r"^net\.slice\d\.", "features.", name): tensor for name, tensor in vgg.items()}
    heads = named if heads is None else heads
    state = {name: _taken(named, name, like.shape) for name, like in trunk.state_dict().items()}
    trunk.load_state_dict(state)
    widths = [64, 128, 256, 512, 512]
    weights = [
        _taken(heads, f"lin{index}.model.1.weight", torch.Size((1, width, 1, 1))) for index, width in enumerate(widths)
    ]
    return Perceptual(trunk, [weight.flatten() for weight in weights])


def load_lpips(vgg: str | Path, heads: str | Path | None = None) -> Perceptual:
    """`lpips` from files."""
    return lpips(read_tensors(vgg), None if heads is None else read_tensors(heads))


def _taken(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise ValueError(f"perceptual: the tensor {name} is missing")
    if tensors[name].shape != shape:
        raise ValueError(f"perceptual: the tensor {name} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}")
    return tensors[name].float()


def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift = torch.tensor(mean, dtype=images.dtype, device=images.device)[:, None, None]
    return (images - shift) / torch.tensor(std, dtype=images.dtype, device=images.device)[:, None, None]


class VGG16Features(nn.Module):
    """Simonyan & Zisserman 2015, configuration D without its last pooling; parameter names are torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1], H and W >= 16 -> the five layers that LPIPS looks at."""
        x, seen = _normalised(images, LPIPS_SHIFT, LPIPS_SCALE), []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in VGG16_TAPS:
                seen.append(x)
        return seen


class LayerFeatures(nn.Module):
    """What named modules of a frozen network answer, as maps (B, C, h, w), in the order of the names.

    Answers (B, 1 + h w, C) of a transformer become maps of its h w square patches, its first token left out.
    Pictures in [-1, 1] are resized to `size` (None: not) and normalised by `mean` and `std` of pictures in [-1, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        size: int | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        known = dict(network.named_modules())
        if not names or (unknown := [name for name in names if name not in known]):
            raise ValueError(f"layers={list(names)}: names of the network's modules are needed, {unknown[0]!r} is none"
                             if names else "layers=[]: one or more are needed")  # fmt: skip
        self.network, self.names = network, list(names)
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda _module, _given, answer: seen.update({name: answer})

        hooks = [self.network.get_submodule(name).register_forward_hook(keep(name)) for name in self.names]
        try:
            self.network(_normalised(images, self.mean, self.std))
        finally:
            for hook in hooks:
                hook.remove()
        return [_as_map(seen[name]) for name in self.names]


def _as_map(answer: Tensor) -> Tensor:
    if answer.ndim == 4:
        return answer
    patches = answer[:, 1:].transpose(1, 2)
    side = round(patches.shape[2] ** 0.5)
    return patches.unflatten(2, (side, side))


class Perceptual(nn.Module):
    """(images, images) -> (B,): the squared distance of unit features, mean over places, sum over layers.

    `features` maps images (B, 3, H, W) in [-1, 1] to layers (B, C_i, h_i, w_i) and is frozen here. `heads` (C_i,) weigh
    the channels of each layer, as LPIPS has learned them; without them all count 1, which makes a layer's distance
    2 - 2 cos of the angle. Gradients reach the first argument only.
    """

    def __init__(self, features: nn.Module, heads: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.num_heads = 0 if heads is None else len(heads)
        for index, head in enumerate(heads or ()):
            self.register_buffer(f"head{index}", head.detach().clone())

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation: what is frozen has no other mode."""
        return super().train(False)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(truth)
        found = self.features(images)
        if self.num_heads not in (0, len(found)):
            raise ValueError(f"heads: {self.num_heads} for {len(found)} layers, one each is needed")
        total = images.new_zeros(len(images))
        for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            away = (unit(ours) - unit(theirs)).square()
            if self.num_heads:
                away = away * getattr(self, f"head{index}")[:, None, None]
            total = total + away.sum(dim=1).mean(dim=(1, 2))
        return total
