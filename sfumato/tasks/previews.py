"""Previews: what a run believes the picture to be, at every step, quickly and roughly or slowly and exactly.

A preview maps x0 latents in diffusion's scale to pictures. A Recorder watches a run and keeps the way from noise to
picture within bounded memory. Knows no samplers, prompts or flags.
Letters: B batch, C latent channels, h w latent size, f the autoencoder's factor, H = h f and W = w f pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.families import BOX, Family, Model
from sfumato.images import from_uint8, to_uint8
from sfumato.models.tiny_autoencoder import TinyAutoencoderConfig, decoder
from sfumato.tasks.decoding import decode
from sfumato.types import Answer, Query
from sfumato.weights.files import TensorFile, open_tensors

Preview = Callable[[Tensor], np.ndarray]
"""x0 latents (B, C, h, w) in diffusion's scale -> pictures (B, H, W, 3) uint8."""

KINDS = ("linear", "tiny", "full")
DRAWINGS, DRAWING_SEED, DRAWING_SIDE = 32, 0, 128  # how many random drawings fit a map, their seed, their most pixels


@dataclass(frozen=True)
class LinearMap:
    """RGB in [-1, 1] of a latent cell: `bias` (3) + its C values times `factors` (C, 3)."""

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 (B, C, h, w) -> colours (B, 3, h, w) float32, about [-1, 1]. ValueError for other channels."""
        if x0.ndim != 4 or x0.shape[1] != len(self.factors):
            raise ValueError(f"x0: its shape is {tuple(x0.shape)}, (B, {len(self.factors)}, h, w) is needed")
        factors, bias = (torch.tensor(numbers, device=x0.device) for numbers in (self.factors, self.bias))
        return torch.einsum("bchw,cd->bdhw", x0.float(), factors) + bias[:, None, None]


# The maps of SD 1.x, 2.x and of XL are ComfyUI's (latent_formats.py); that of the box is `fitted` to decodes of 256
# pictures of its training set.
SD_MAP = LinearMap(
    ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177))
)
XL_MAP = LinearMap(
    ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
    (0.1084, -0.0175, -0.0011),
)
BOX_MAP = LinearMap(
    ((-0.0226, 0.1887, -0.1786), (0.0030, 0.1590, -0.2050), (-0.1795, 0.3667, 0.4432), (0.4829, 0.2241, 0.2148)),
    (0.2324, 0.1515, -0.0129),
)
# An autoencoder is known by the scale of its latents and their channels.
MAPS: Mapping[tuple[float, int], LinearMap] = {
    (0.18215, 4): SD_MAP,
    (0.13025, 4): XL_MAP,
    (BOX.latent_scale, BOX.autoencoder.latent_channels): BOX_MAP,
}


def linear_map(family: Family) -> LinearMap | None:
    """The known map of a family's latents; None where there is none."""
    return MAPS.get((family.latent_scale, family.autoencoder.latent_channels))


def linear(family: Family, colours: LinearMap | None = None) -> Preview:
    """A preview by a linear map of each latent cell, enlarged by bicubic interpolation; no network is asked.

    `colours` of None is the family's known map; ValueError where it has none.
    """
    found = colours or linear_map(family)
    if found is None:
        raise ValueError(f"preview='linear': no map is known for {family.name}; fit one with fitted(model)")
    factor = family.autoencoder.factor
    return lambda x0: to_uint8(F.interpolate(found(x0), scale_factor=factor, mode="bicubic"))


def drawings(count: int, side: int, seed: int = DRAWING_SEED) -> np.ndarray:
    """Random soft patches of colour, (count, side, side, 3) uint8: noise of five sizes, summed."""
    generator = torch.Generator().manual_seed(seed)
    summed = torch.zeros(count, 3, side, side)
    for cells in (1, 2, 4, 8, 16):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        summed += 0.5 * F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    return to_uint8(summed.tanh())


@torch.inference_mode()
def fitted(model: Model, pictures: np.ndarray | None = None) -> LinearMap:
    """The linear map nearest, by least squares, to the model's own decodes of `pictures` (B, H, W, 3) uint8.

    H and W are multiples of the factor. None takes random drawings: less like real pictures, and for the box 1 dB
    worse. ValueError where there are fewer latent cells than numbers to fit.
    """
    family, factor = model.family, model.family.autoencoder.factor
    if pictures is None:
        pictures = drawings(DRAWINGS, min(family.size, DRAWING_SIDE))
    images = from_uint8(pictures).to(model.device, model.dtype)
    latents = torch.cat([model.autoencoder.encode(one[None]).mean.float() for one in images]) * family.latent_scale
    means = F.avg_pool2d(decode(latents, 0.0, model).clamp(-1, 1), factor)
    cells = latents.movedim(1, -1).flatten(0, 2).double().cpu()
    if len(cells) <= cells.shape[1]:
        raise ValueError(f"pictures: they have {len(cells)} latent cells, more than {cells.shape[1]} are needed")
    known = torch.cat([cells, cells.new_ones(len(cells), 1)], dim=1)
    # gelsd: the smallest solution where some channels are not independent
    solved = torch.linalg.lstsq(known, means.movedim(1, -1).flatten(0, 2).double().cpu(), driver="gelsd").solution
    rows = [(float(red), float(green), float(blue)) for red, green, blue in solved.tolist()]
    return LinearMap(tuple(rows[:-1]), rows[-1])


def full(model: Model, tile: int | None = None) -> Preview:
    """The model's own decoder: the picture as it would be saved if the run ended here."""
    return lambda x0: to_uint8(decode(x0, 0.0, model, tile=tile))


def tiny(path: str | Path, family: Family, device: torch.device | str = "cpu") -> Preview:
    """The tiny decoder of a file: `taesd_decoder` as .pth or .safetensors, or a whole tiny autoencoder.

    ValueError, naming the file, where it is none or is not for the family's latents.
    """
    network = _tiny_decoder(Path(path), family).to(device)

    @torch.inference_mode()
    def preview(x0: Tensor) -> np.ndarray:
        return to_uint8(2 * network(x0.to(device, torch.float32)) - 1)

    return preview


def _tiny_decoder(path: Path, family: Family) -> nn.Module:
    """The tiny decoder of a file in float32. Its numbers of layers are ours, or one lower, as diffusers counts."""
    with open_tensors(path) as file:
        state = {_tiny_name(name): _tensor(file, name) for name in file.names() if not name.startswith("encoder.")}
    channels = family.autoencoder.latent_channels
    config = TinyAutoencoderConfig(latent_channels=channels)
    if config.factor != family.autoencoder.factor:
        raise ValueError(
            f"preview='tiny': {family.name} has {family.autoencoder.factor} px a cell, {config.factor} fit"
        )
    with torch.device("meta"):
        network = decoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        shapes = f"{name} is {found.get(name, 'missing')}, {expected.get(name, 'no such tensor')} is expected"
        raise ValueError(f"preview={str(path)!r}: not a tiny decoder of {channels} latent channels ({shapes})")
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _tiny_name(name: str) -> str:
    """A stored name as ours: `decoder.` goes, and diffusers' `decoder.layers.0` is our layer 1."""
    if not name.startswith("decoder.layers."):
        return name.removeprefix("decoder.")
    layer, dot, rest = name.removeprefix("decoder.layers.").partition(".")
    return f"{int(layer) + 1}{dot}{rest}" if layer.isdecimal() else name


def _tensor(file: TensorFile, name: str) -> Tensor:
    return file.read(name).float().clone()


def previewer(kind: str, model: Model, path: str | Path | None = None, tile: int | None = None) -> Preview:
    """The preview of a name in KINDS: "linear" (fitted now, in seconds, where no map is known), "tiny", "full".

    `path` is the tiny decoder's file; `tile` is the side of decoded tiles in pixels, for "full".
    """
    if kind == "linear":
        return linear(model.family, linear_map(model.family) or fitted(model))
    if kind == "tiny":
        if path is None:
            raise ValueError("preview='tiny': the file of a tiny decoder is needed, such as taesd_decoder.safetensors")
        return tiny(path, model.family, model.device)
    if kind == "full":
        return full(model, tile)
    raise ValueError(f"preview={kind!r}: one of {', '.join(KINDS)}")


class Recorder:
    """A `watch` for one run that keeps previews of its way: of every `every`-th noise level, `most` at most.

    Where there would be more, every second one is dropped and from then on half as many are kept, so that those kept
    are always spread evenly over the way so far. Evaluations back up are not of the way; of several at the lowest level
    the newest counts in the end.
    """

    def __init__(self, preview: Preview, every: int = 1, most: int = 64) -> None:
        for name, value, least in (("every", every, 1), ("most", most, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: {least} or more are needed")
        self.preview, self.every, self.most = preview, every, most
        self.levels: list[float] = []
        self._frames: list[np.ndarray] = []
        self._lowest = float("inf")
        self._seen = 0
        self._last: Tensor | None = None  # the newest x0, where no frame shows it

    def __call__(self, query: Query, answer: Answer) -> None:
        """See a query with its answer; the preview is made only where it is kept."""
        if query.sigma < self._lowest:
            self._lowest = query.sigma
            self._at_new_level(answer.x0)
        elif query.sigma == self._lowest:
            self._last = answer.x0

    def _at_new_level(self, x0: Tensor) -> None:
        if self._seen % self.every == 0 and len(self._frames) == self.most:
            self._frames, self.levels = self._frames[::2], self.levels[::2]
            self.every *= 2
        self._last = x0
        if self._seen % self.every == 0:
            self._frames.append(self.preview(x0))
            self.levels.append(self._lowest)
            self._last = None
        self._seen += 1

    def frames(self) -> list[np.ndarray]:
        """The pictures kept, each (B, H, W, 3) uint8, and the newest of all at their end."""
        if self._last is None:
            return list(self._frames)
        again = self.levels[-1] == self._lowest  # the level was kept, and has been evaluated once more
        return [*self._frames[: -1 if again else None], self.preview(self._last)]
