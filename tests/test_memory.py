"""The memory plan: estimates against what is alive, ever thriftier settings, slices, tiles, decoding anew, moving."""

import logging
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato import memory
from sfumato.families import BOX, SD1, XL, Family, Model
from sfumato.memory import GIB, Bounds, Plan, bounds_of, moving
from sfumato.memory.estimate import (
    Kernels,
    decoder_room,
    decoder_tensors,
    most_kept,
    network_numbers,
    unet_room,
    unet_tensors,
)
from sfumato.memory.moving import Unit, units_of
from sfumato.models import inference, tiling
from sfumato.models.autoencoder import AttnBlock, Autoencoder
from sfumato.models.clip import CLIPText, CLIPTextConfig
from sfumato.models.inference import KEPT
from sfumato.models.layers import attend, hasten, slice_attention
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.pipeline import Memory, Pipeline
from sfumato.tasks import decoding
from sfumato.weights.parts import build
from sfumato.weights.placing import fill, place
from tests.conftest import TINY, randomise

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
BOX_FILE = Path(__file__).parents[1] / "sfumato" / "box.safetensors"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_of(family: Family = TINY, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    parts = {name: place(randomise(network), CPU, dtype).eval() for name, network in build(family).items()}
    texts = tuple(parts[name] for name in family.text_parts)
    tokenizers = tuple(ClipTokenizer(tower.config.vocab_size) for tower in family.texts)
    return Model(family, texts, parts["unet"], parts["autoencoder"], tokenizers, CPU, dtype, "tiny", lambda: "0" * 10)


# attention in slices


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 20, 21])
def test_sliced_attention_is_the_same(causal: bool, rows: int) -> None:
    q, k, v = (noise(2, 20, 12, seed=seed) for seed in range(3))
    whole = attend(q, k, v, 3, causal)
    assert torch.allclose(attend(q, k, v, 3, causal, query_rows=rows), whole, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_half_precision_is_trained_in_float32(causal: bool) -> None:
    torch.manual_seed(0)
    halves = [torch.randn(2, 9, 12).bfloat16().requires_grad_() for _ in range(3)]
    wholes = [half.detach().float().requires_grad_() for half in halves]
    out, exact = attend(*halves, 3, causal), attend(*wholes, 3, causal)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())  # rounded once, at the end
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*halves, 3, causal), out)
    out.float().square().sum().backward()
    exact.bfloat16().float().square().sum().backward()
    for half, whole in zip(halves, wholes, strict=True):
        assert half.grad is not None and whole.grad is not None
        assert torch.allclose(half.grad.float(), whole.grad, rtol=1e-2, atol=1e-3)


def test_slices_bound_the_scores_of_one_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    x, t, context, z = noise(2, 4, 8, 8), torch.tensor([3.0, 500.0]), noise(2, 7, 16), noise(2, 4, 8, 8)
    seen: list[int] = []
    fused = F.scaled_dot_product_attention

    def watched(q: Tensor, *args: Tensor, **kwargs: bool) -> Tensor:
        seen.append(q.shape[2])
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.inference_mode():
        drawn, decoded = model.unet(x, t, context), model.autoencoder.decode(z)
        assert max(seen) == 64
        slice_attention(model.unet, 10)
        seen.clear()
        assert torch.allclose(model.unet(x, t, context), drawn, atol=1e-5)
        assert max(seen) == 10
        seen.clear()
        model.autoencoder.decode(z)
        assert max(seen) == 64, "the other network is left alone"
        slice_attention(model.autoencoder, 5)
        seen.clear()
        assert torch.allclose(model.autoencoder.decode(z), decoded, atol=1e-5)
        assert max(seen) == 5
        slice_attention(model.autoencoder, None)
        assert torch.equal(model.autoencoder.decode(z), decoded)
    with pytest.raises(ValueError, match="query_rows=0"):
        slice_attention(model.unet, 0)


def test_a_sliced_block_can_be_trained() -> None:
    block, x = AttnBlock(8, 4), noise(1, 8, 4, 4)
    block(x).sum().backward()
    whole = block.q.weight.grad.clone()
    block.zero_grad()
    slice_attention(block, 3)
    block(x).sum().backward()
    assert torch.allclose(block.q.weight.grad, whole, atol=1e-6)


# tiles


@pytest.fixture(scope="module")
def random_decoder() -> Autoencoder:
    torch.manual_seed(1)
    return Autoencoder(replace(BOX.autoencoder, latent_channels=16)).eval()


@pytest.fixture(scope="module")
def box_decoder() -> Autoencoder:
    tensors, prefix = load_file(BOX_FILE), "first_stage_model."
    network = Autoencoder(BOX.autoencoder).eval()
    state = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
    network.load_state_dict(state)
    return network


def smooth_pictures(side: int) -> Tensor:
    """(3, 3, side, side) in [-1, 1] without an edge."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    waves = torch.stack([torch.sin(3 * x), torch.cos(2 * y), torch.sin(4 * x * y)])
    blurred = F.interpolate(noise(1, 3, 4, 4), size=(side, side), mode="bicubic").clamp(-1, 1)
    return torch.cat([torch.stack([torch.stack([x, y, -x]), waves]), blurred])


def step_at(images: Tensor, columns: list[int]) -> float:
    """The mean step into each of the columns, multiples of 8, over the median one at other multiples: the largest."""
    steps = images.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    others = sorted(set(range(8, images.shape[-1], 8)) - set(columns))
    return float(steps[torch.tensor(columns) - 1].max() / steps[torch.tensor(others) - 1].median())


def borders_of(size: int, cells: int, overlap: int, factor: int) -> list[int]:
    """Columns of the result where a tile begins or ends inside the picture."""
    places = tiling.starts(size, cells, overlap)
    return [place * factor for place in places[1:]] + [(place + cells) * factor for place in places[:-1]]


@pytest.mark.parametrize("which", ["random_decoder", "box_decoder"])
def test_tiles_have_no_seam(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps at tiles' borders and between are about as large as elsewhere; without fading they would be seen here."""
    network: Autoencoder = request.getfixturevalue(which)
    borders = borders_of(20, 12, 4, 8)
    assert borders == [64, 96]
    with torch.inference_mode():
        z = network.encode(smooth_pictures(160)).mean
        tiled = tiling.decode(network, z, tile=96, overlap=32)
        monkeypatch.setattr(tiling, "_fade", lambda x: (x > 0.5).double())
        switched = tiling.decode(network, z, tile=96, overlap=32)
        plain = network.decode(z)
    columns = [64, 72, 80, 88, 96]
    limit = max(2.0, 1.2 * step_at(plain, columns))
    assert step_at(tiled, columns) < limit and step_at(switched, columns) > 1.5 * limit


def test_tiles_of_the_box_are_close_to_the_whole(box_decoder: Autoencoder) -> None:
    with torch.inference_mode():
        pictures = smooth_pictures(192)
        z = box_decoder.encode(pictures).mean
        whole, tiled = box_decoder.decode(z), tiling.decode(box_decoder, z, tile=128)
        assert tiled.shape == whole.shape
        assert float((tiled - whole).square().mean().sqrt()) < 0.05  # of 2; the box's own error is 0.08 here
        posterior = tiling.encode(box_decoder, pictures, tile=128)
        assert float((posterior.mean - z).square().mean().sqrt()) < 0.15 * float(z.std())
        assert posterior.logvar.shape == z.shape


def test_one_tile_is_the_plain_decode_bit_for_bit(random_decoder: Autoencoder) -> None:
    with torch.inference_mode():
        z, images = noise(2, 16, 5, 8), noise(2, 3, 40, 64)
        assert torch.equal(tiling.decode(random_decoder, z, tile=64), random_decoder.decode(z))
        ours, plain = tiling.encode(random_decoder, images, tile=64), random_decoder.encode(images)
        assert torch.equal(ours.mean, plain.mean)
        assert torch.equal(ours.logvar, plain.logvar)


@pytest.mark.parametrize("shape", [(9, 9), (5, 23), (23, 5), (16, 17)])
def test_tiles_fit_any_size_and_none_is_larger(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that works cell by cell is the same in tiles; every call sees one tile at most."""
    network = Autoencoder(TINY.autoencoder)
    seen: list[tuple[int, ...]] = []

    def cell_by_cell(z: Tensor) -> Tensor:
        seen.append(tuple(z.shape[-2:]))
        return z[:, :3].repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)

    monkeypatch.setattr(network, "decode", cell_by_cell)
    z = noise(2, 4, *shape)
    whole = cell_by_cell(z)
    seen.clear()
    for overlap in (2, 4, 8):
        assert torch.allclose(tiling.decode(network, z, tile=16, overlap=overlap), whole, atol=1e-6)
    assert {max(cells) for cells in seen} == {8}


@pytest.mark.parametrize("size, cells, overlap", [(8, 8, 2), (9, 8, 4), (100, 8, 4), (33, 16, 1), (5, 8, 2)])
def test_tiles_cover_everything_and_their_weights_sum_to_one(size: int, cells: int, overlap: int) -> None:
    places = tiling.starts(size, cells, overlap)
    cells = min(cells, size)
    assert places[0] == 0
    assert places[-1] + cells == size
    assert all(first + cells - second >= overlap for first, second in pairwise(places))
    total = torch.zeros(size * 2)
    for start, weight in zip(places, tiling.ramps(places, cells, 2, CPU), strict=True):
        assert (weight >= 0).all()
        total[start * 2 : (start + cells) * 2] += weight
    assert torch.allclose(total, torch.ones(size * 2), atol=1e-6)


def test_tiles_fade_smoothly() -> None:
    """From 0 to 1 over the whole overlap, nowhere in a jump."""
    for weight in tiling.ramps([0, 6, 12], 8, 8, CPU):
        assert float(weight.diff().abs().max()) < 1.6 / 16
    first, middle, last = tiling.ramps([0, 6, 12], 8, 8, CPU)
    assert (first[0], last[-1]) == (1, 1), "the picture's own border does not fade"
    for edge in (first[-1], middle[0], middle[-1], last[0]):
        assert edge < 0.01


@pytest.mark.parametrize(
    "tile, overlap, words", [(8, None, "tile=8"), (60, None, "tile=60"), (64, 40, "overlap=40"), (64, 4, "overlap=4")]
)
def test_tiles_of_a_wrong_size_are_refused(
    random_decoder: Autoencoder, tile: int, overlap: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=f"{words}: a multiple of 8"):
        tiling.decode(random_decoder, noise(1, 16, 9, 9), tile, overlap)


# decoding


def overflowing(dtype: torch.dtype = torch.float16) -> tuple[Model, Tensor]:
    """A decoder whose last norm takes float16 beyond its range, and latents of which the first are too plain for it."""
    model = model_of(dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.autoencoder.decoder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        model.autoencoder.post_quant_conv.bias.zero_()
        model.autoencoder.decoder.norm_out.weight.fill_(5e4)
        model.autoencoder.decoder.conv_out.weight.mul_(1e-3)
    return model, torch.stack([torch.zeros(4, 8, 8), noise(4, 8, 8), torch.zeros(4, 8, 8)])


@pytest.mark.parametrize("tile", [None, 8])
def test_only_the_picture_that_overflows_is_decoded_again(caplog: pytest.LogCaptureFixture, tile: int | None) -> None:
    model, latents = overflowing()
    tensors = [(p.data_ptr(), p.detach().clone()) for p in model.autoencoder.parameters()]
    with torch.inference_mode():
        assert decoding.finite(model.autoencoder.decode(latents.half())).tolist() == [True, False, True]
    calls: list[tuple[int, torch.dtype]] = []
    model.autoencoder.decoder.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), args[0].dtype)))
    with caplog.at_level(logging.INFO, "sfumato"):
        images = decoding.decode(latents, 0.0, model, tile=tile)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert set(calls) == {(3, torch.float16), (1, torch.bfloat16)}
    assert [record.getMessage() for record in caplog.records] == [
        "picture 2 overflowed when decoded in float16; decoded again in bfloat16"
    ]
    exact, _ = overflowing(torch.float32)
    expected = decoding.decode(latents, 0.0, exact, tile=tile)
    assert float((images - expected).abs().max()) < 0.05 * float(expected.abs().max())
    for parameter, (place_before, before) in zip(model.autoencoder.parameters(), tensors, strict=True):
        assert parameter.data_ptr() == place_before, "no second copy stays"
        assert torch.equal(parameter, before)


class Narrow(nn.Module):
    """A stand-in for an autoencoder that is finite in some formats alone."""

    def __init__(self, finite_in: set[torch.dtype]) -> None:
        super().__init__()
        self.config = TINY.autoencoder
        self.decoder, self.post_quant_conv = nn.Linear(2, 2), nn.Linear(2, 2)
        self.finite_in = finite_in

    def decode(self, z: Tensor) -> Tensor:
        assert self.decoder.weight.dtype == z.dtype
        images = z[:, :3].repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        return images if z.dtype in self.finite_in else images + math.inf


@pytest.mark.parametrize(
    "own, finite_in, words",
    [
        (torch.float16, {torch.float32}, "in float16; decoded again in float32"),
        (torch.bfloat16, {torch.float32}, "in bfloat16; decoded again in float32"),
        (torch.float16, set(), "decoded in float16, bfloat16, float32, is not finite though its latents are"),
        (torch.float32, set(), "decoded in float32, is not finite though its latents are"),
    ],
)
def test_formats_are_tried_in_order(
    own: torch.dtype, finite_in: set[torch.dtype], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = replace(model_of(), autoencoder=Narrow(finite_in).to(own), dtype=own)  # type: ignore[arg-type]
    if not finite_in:
        with pytest.raises(ValueError, match=f"autoencoder: picture 1, {words}"):
            decoding.decode(noise(1, 4, 8, 8), 0.0, model)
        return
    with caplog.at_level(logging.INFO, "sfumato"):
        decoding.decode(noise(1, 4, 8, 8), 0.0, model)
    assert words in caplog.text
    assert next(model.autoencoder.parameters()).dtype == own


def test_latents_that_are_not_finite_are_named_before_decoding() -> None:
    latents = noise(3, 4, 8, 8)
    latents[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="latents: picture 2 of 3 is not finite before decoding"):
        decoding.decode(latents, 0.0, model_of())


def test_decoding_is_the_autoencoders_in_parts_and_in_scale() -> None:
    model, latents = model_of(), noise(5, 4, 8, 6)
    counts: list[int] = []
    model.autoencoder.decoder.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    images = decoding.decode(latents, 0.5, model, max_pictures=2)
    assert counts == [2, 2, 1]
    with torch.inference_mode():
        plain = model.autoencoder.decode(latents * (1 + 0.5**2) ** -0.5 / TINY.latent_scale)
    assert torch.allclose(images, plain, atol=1e-5)


# moving networks


def watch_moves(monkeypatch: pytest.MonkeyPatch, units: list[Unit]) -> list[str]:
    """The log of moves; at every arrival all others must be at home."""
    log: list[str] = []
    leave, return_home = Unit.leave, Unit.return_home

    def watched_leave(unit: Unit, device: torch.device) -> None:
        assert not any(other.away for other in units), "two networks on the device"
        log.append(f"+{unit.name}")
        leave(unit, device)

    def watched_return(unit: Unit) -> None:
        log.append(f"-{unit.name}")
        return_home(unit)

    monkeypatch.setattr(Unit, "leave", watched_leave)
    monkeypatch.setattr(Unit, "return_home", watched_return)
    return log


TWO_TOWERS = replace(
    TINY,
    name="two",
    texts=(*TINY.texts, replace(TINY.texts[0], config=replace(TINY.texts[0].config, projection=8), skip_last=1)),
    unet=replace(TINY.unet, context_dim=32),
)


def draw(model: Model) -> Tensor:
    """Both text encoders, two U-Net calls, a decode and an encode, as a picture to picture job would call them."""
    ids = torch.arange(6)[None] % 5
    first, second = model.texts
    with torch.inference_mode():
        states, pooled = second.forward_pooled(ids, skip_last=1)
        context = torch.cat([first(ids), states], dim=-1)
        x = noise(1, 4, 8, 8)
        for t in (900.0, 100.0):
            x = x - 0.5 * model.unet(x, torch.tensor([t]), context)
        images = decoding.decode(x, 0.0, model)
        return torch.cat([images.flatten(), model.autoencoder.encode(images).mean.flatten(), pooled.flatten()])


def test_at_most_one_network_is_on_the_device_and_the_results_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device here is the CPU: going on it is a copy all the same, so what is away is told by its address."""
    model = model_of(TWO_TOWERS)
    expected = draw(model)
    homes = {name: p.data_ptr() for network in model.networks.values() for name, p in network.named_parameters()}
    moved = memory.offload(model.networks, CPU)
    log = watch_moves(monkeypatch, moved.units)
    for _ in range(2):
        assert torch.equal(draw(model), expected)
    once = ["text2", "text", "unet", "autoencoder.decoder", "autoencoder.encoder"]
    assert [move[1:] for move in log if move[0] == "+"] == once * 2
    assert [move[1:] for move in log if move[0] == "-"] == (once * 2)[:-1]
    assert [unit.name for unit in moved.units if unit.away] == ["autoencoder.encoder"]
    moved.remove()
    assert not any(unit.away for unit in moved.units)
    assert homes == {
        name: p.data_ptr() for network in model.networks.values() for name, p in network.named_parameters()
    }
    log.clear()
    assert torch.equal(draw(model), expected)
    assert log == [], "moves nothing any more"


class Where(nn.Module):
    """A network without weights that says where its inputs are."""

    def forward(self, x: Tensor, *, context: Tensor | None = None) -> tuple[torch.device, object]:
        return x.device, context if context is None else context.device


def test_inputs_go_to_the_device() -> None:
    """By place and by name; "meta" is a device that the CPU's tensors cannot be mixed with."""
    where = Where()
    moved = memory.offload({"where": where}, META)
    assert where(noise(2), context=noise(3)) == (META, META)
    assert where(noise(2), context=None) == (META, None)
    moved.remove()
    assert where(noise(2), context=noise(3)) == (CPU, CPU)


def test_what_is_changed_on_the_device_comes_home_changed() -> None:
    """An adapter may add to the weights of a network that happens to be on the device."""
    model = model_of(TWO_TOWERS)
    with torch.no_grad():
        model.unet.out[2].bias.zero_()
    moved = memory.offload(model.networks, CPU)
    draw(model)
    moved.use(next(unit for unit in moved.units if unit.name == "unet"))
    with torch.no_grad():
        model.unet.out[2].bias.add_(1.0)
    moved.use(None)
    assert model.unet.out[2].bias.tolist() == [1.0] * 4


def test_a_decode_in_a_wider_format_leaves_moved_weights_alone() -> None:
    model, latents = overflowing()
    expected = decoding.decode(latents, 0.0, model)
    before = [(p.data_ptr(), p.detach().clone()) for p in model.autoencoder.parameters()]
    moved = memory.offload(model.networks, CPU)
    assert torch.equal(decoding.decode(latents, 0.0, model), expected)
    moved.remove()
    for parameter, (address, then) in zip(model.autoencoder.parameters(), before, strict=True):
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, then)


class Mapped:
    """A tensor on disk, as `weights.placing.fill` reads it; counts how often its pages are handed back."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.released = tensor, 0

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor

    def release(self) -> None:
        self.released += 1


def test_mapped_weights_stay_mapped_at_home() -> None:
    """Convolutions are turned by their copy: nothing is left to do for what turns them at the first use."""
    model = model_of()
    x, t, context, z = noise(1, 4, 8, 8), torch.tensor([3.0]), noise(1, 7, 16), noise(1, 4, 8, 8)
    with torch.inference_mode():
        expected = model.unet(x, t, context), model.autoencoder.decode(z)
    lazy: dict[str, nn.Module] = {}
    sources = {}
    for part in ("unet", "autoencoder"):
        state = model.networks[part].state_dict()
        sources[part] = {name: Mapped(tensor.contiguous()) for name, tensor in state.items()}
        with torch.device("meta"):
            lazy[part] = build(TINY)[part]
        fill(lazy[part], sources[part], CPU, torch.float32)
    memory.offload(lazy, CPU)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(lazy["unet"](x, t, context), expected[0])
            assert lazy["unet"].out[2].weight.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(lazy["autoencoder"].decode(z), expected[1])
            assert lazy["autoencoder"].decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    for name, parameter in lazy["unet"].named_parameters():
        assert parameter.data_ptr() == sources["unet"][name].tensor.data_ptr()
    assert not any(source.released for part in sources.values() for source in part.values())


def test_an_autoencoder_is_two_units_and_a_text_encoder_is_entered_anywhere() -> None:
    text = CLIPText(CLIPTextConfig(vocab_size=32, width=8, num_layers=1, num_heads=2))
    names = [unit.name for unit in units_of({"autoencoder": Autoencoder(TINY.autoencoder), "text": text})]
    assert names == ["autoencoder.encoder", "autoencoder.decoder", "text"]
    moved = memory.offload({"text": text}, CPU)
    assert moved.current is None
    text.text_model.embeddings.token_embedding(torch.tensor([1]))
    assert moved.current is moved.units[0]
    assert moved.current.away


# estimates


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that a call makes, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def live_peak(call: Callable[[], Tensor]) -> int:
    with torch.inference_mode(), Live() as live:
        call()
    return live.peak


def on_meta(*shape: int) -> Tensor:
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(*shape, device="meta").to(memory_format=order)


SHAPED_LIKE_XL = replace(XL, unet=replace(XL.unet, channels=64, transformer_depth=(0, 1, 2), middle_depth=1))
LIKE_SD2_UPSCALER = replace(SD1, autoencoder=replace(SD1.autoencoder, channel_mult=(1, 2, 4)))


@pytest.mark.parametrize(
    "family, side", [(TINY, 16), (BOX, 64), (BOX, 512), (SD1, 512), (SHAPED_LIKE_XL, 1024), (LIKE_SD2_UPSCALER, 512)]
)
def test_estimates_are_what_is_alive_at_the_fullest_moment(family: Family, side: int) -> None:
    """On "meta" the true networks at their true size; what kernels take beside tensors is the benchmark's to show."""
    with torch.device("meta"):
        unet = UNet(family.unet).to(memory_format=torch.channels_last)
        autoencoder = Autoencoder(family.autoencoder).to(memory_format=torch.channels_last)
    h, config, rows = side // family.autoencoder.factor, family.unet, 2
    x, context = on_meta(rows, config.in_channels, h, h), on_meta(rows, 77, config.context_dim)
    vector = None if config.vector_dim is None else on_meta(rows, config.vector_dim)
    alive = live_peak(lambda: unet(x, torch.empty(rows, device="meta"), context, vector))
    assert alive <= 1.02 * unet_tensors(config, h, h, rows, torch.float32, Kernels(CPU)) <= 1.1 * alive
    z = on_meta(3, family.autoencoder.latent_channels, h, h)
    decoder = decoder_tensors(family.autoencoder, h, h, 3, torch.float32, Kernels(CPU))
    alive = live_peak(lambda: autoencoder.decode(z))
    assert alive <= 1.05 * decoder <= 1.15 * alive
    assert live_peak(lambda: autoencoder.encode(on_meta(3, 3, side, side)).mean) <= decoder, "an encode takes no more"


def test_tiled_memory_is_flat() -> None:
    """What grows is the picture itself, and the band of it that a row of tiles is: the tiles' own memory stays."""
    with torch.device("meta"):
        network = Autoencoder(TINY.autoencoder)

    def beside_the_picture(side: int) -> int:
        z = torch.empty(1, 4, side // 2, side // 2, device="meta")
        return live_peak(lambda: tiling.decode(network, z, tile=32)) - 4 * 3 * side * (side + 2 * 32)

    small, large = beside_the_picture(48), beside_the_picture(128)
    assert large <= 1.05 * small


def test_scores_are_counted_where_they_are_kept() -> None:
    config, mps = SD1.unet, torch.device("mps")
    fused = unet_tensors(config, 64, 64, 1, torch.float16, Kernels(CUDA))
    kept = unet_tensors(config, 64, 64, 1, torch.float16, Kernels(mps))
    assert kept - fused > 8 * 4096**2 * 4  # one map of 8 heads
    assert unet_tensors(config, 64, 64, 1, torch.float16, Kernels(mps, 256)) < 1.6 * fused
    wide = decoder_tensors(SD1.autoencoder, 128, 128, 1, torch.float16, Kernels(CUDA))
    assert decoder_tensors(SD1.autoencoder, 128, 128, 1, torch.float16, Kernels(CUDA, 1024)) < wide


def test_numbers_are_those_of_the_published_networks() -> None:
    numbers = network_numbers(SD1)
    assert numbers["unet"] == 859_520_964
    assert numbers["encoder"] + numbers["decoder"] == 83_653_863
    assert numbers["text"] == 123_060_480


# the plan


def planned(family: Family, gib: float, device: torch.device = CUDA, count: int = 1, **options) -> Plan:
    return memory.plan(family, family.size, family.size, count, int(gib * GIB), device, **options)


def test_plans_get_thriftier_as_memory_gets_scarce() -> None:
    def thrift(plan: Plan) -> tuple[float, ...]:
        sizes = (plan.tile, plan.attention_slice)
        tile, rows = (math.inf if size is None else size for size in sizes)
        return (-plan.dtype.itemsize, -tile, plan.offload, -rows)

    for device, low, high in ((CUDA, 2.0, 24.0), (CPU, 2.4, 24.0), (torch.device("mps"), 2.0, 24.0)):
        plans = [planned(SD1, low + (high - low) * step / 40, device, count=8) for step in range(41)]
        assert all(plan.estimate <= plan.budget for plan in plans)
        assert [thrift(plan) for plan in plans] == sorted((thrift(plan) for plan in plans), reverse=True)
        assert plans[-1].dtype == (torch.float32 if device == CPU else torch.float16)
        assert (plans[-1].max_rows, plans[-1].max_pictures) == (16, 4)
        assert (plans[-1].tile, plans[-1].attention_slice, plans[-1].offload) == (None, None, False)
        assert plans[0].max_rows <= 2
        assert plans[0].max_pictures < 4
        assert plans[0].offload == (device != CPU)


def test_what_people_have() -> None:
    """Cards of 4, 6, 8 and 24 GiB, less half a GiB of context; the native sizes."""
    card = {gib: planned(SD1, gib - 0.5) for gib in (4, 8)} | {-gib: planned(XL, gib - 0.5) for gib in (6, 8, 24)}
    assert not card[4].offload
    assert card[4].max_rows == 2
    assert card[4].tile is None
    assert card[-6].offload
    assert card[-8].offload
    assert not card[-24].offload
    assert card[-24].weights > 2 * 3.4e9
    with pytest.raises(ValueError, match=r"vram=3.5: xl at 1024 x 1024 px takes 5\.\d GiB at least \(fp16, networks"):
        planned(XL, 3.5)


def test_a_given_precision_is_kept_and_the_box_always_fits() -> None:
    assert planned(SD1, 12, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="fp32"):
        planned(SD1, 2.0, dtype=torch.float32)
    plan = planned(BOX, 1.0, CPU)
    assert (plan.dtype, plan.tile, plan.offload) == (torch.float32, None, False)


def test_estimates_grow_with_what_is_asked() -> None:
    sizes = [memory.plan(SD1, side, side, 1, 100 * GIB, CUDA).estimate for side in (256, 512, 1024)]
    counts = [planned(SD1, 100, count=count).estimate for count in (1, 4, 16)]
    assert sizes == sorted(set(sizes))
    assert counts == sorted(set(counts))


def test_a_plan_is_said_in_one_line() -> None:
    plan = Plan(4 * GIB, torch.float16, 1, 1, 1024, 512, True, 17 * GIB // 10, GIB // 2, GIB, 29 * GIB // 10)
    assert memory.describe(plan) == (
        "plan for 4.0 GiB: fp16, networks moved on and off, attention in slices of 1024 rows, decoding in tiles of "
        "512 px, 1 row a call; estimate 2.9 GiB (weights 1.7, then U-Net 0.5 or decoder 1.0)"
    )


def test_applying_a_plan() -> None:
    model = model_of(TWO_TOWERS)
    expected = draw(model)
    plain = memory.plan(TWO_TOWERS, 16, 16, 1, GIB, CPU)
    thrifty = replace(plain, attention_slice=8, offload=True)
    moved = memory.apply(thrifty, model)
    assert isinstance(moved, moving.Offload)
    assert torch.allclose(draw(model), expected, atol=1e-5)
    assert {m.query_rows for m in model.unet.modules() if hasattr(m, "query_rows")} == {8}
    assert {m.query_rows for m in model.autoencoder.modules() if hasattr(m, "query_rows")} == {8}
    moved.remove()
    assert memory.apply(plain, model) is None
    assert torch.equal(draw(model), expected)


def test_bounds_and_what_a_recipe_says_of_them() -> None:
    bounds, usual = Bounds(max_rows=2, query_rows=256, tile=512), Bounds()
    assert usual.facts == {} and bounds_of({"sfumato": "1", "device": "cpu"}) == usual
    assert bounds.facts == {"max_rows": "2", "query_rows": "256", "tile": "512"}
    assert bounds_of(bounds.facts) == bounds
    kept = Bounds(max_rows=64, tile=256, fast_bytes=0)
    assert bounds_of(kept.facts) == kept
    assert bounds.within(kept) == kept.within(bounds) == Bounds(2, 4, 256, 256, 0)
    assert usual.within(usual) == usual
    for name, told in (("tile", "0"), ("max_rows", "two"), ("fast_bytes", "-1"), ("query_rows", "")):
        with pytest.raises(ValueError, match=re.escape(f"{name}={told!r}: a whole number")):
            bounds_of({name: told})


def go(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """See that hastened layers go one way, whatever is quickest here; columns where the weight is the larger part."""

    def chosen(shape: tuple[int, ...], outs: int, stride: int, *_: object) -> str:
        if way == "ordered" or (way != "columns" and stride == 1):
            return way
        results = shape[0] * -(-shape[2] // stride) * -(-shape[3] // stride)
        return "columns" if results <= 4 * outs else "direct"

    monkeypatch.setattr(inference, "quickest", chosen)


@pytest.mark.parametrize("family", [TINY, BOX])
def test_hastened_networks_keep_no_more_than_is_thought(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all ways, and each of four texts of a guided picture."""
    network = UNet(family.unet).to(memory_format=torch.channels_last).eval()
    hasten(network, keep=1 << 40)
    room, found = network.out[2].room, [0]
    for seed, way in enumerate((*KEPT, "columns", "columns")):
        go(monkeypatch, way)
        with torch.inference_mode():
            context = noise(2, 77, family.unet.context_dim, seed=seed)
            network(noise(2, family.unet.in_channels, 8, 8), torch.tensor([1.0, 500.0]), context)
        found.append(room.num_bytes)
    assert found[:4] == sorted(set(found[:4])), "each way is kept beside the others"
    assert found[-1] <= most_kept(family)


def held(network: nn.Module) -> int:
    """Bytes that hastened layers hold on to after they worked."""
    rooms = {id(each.room): each.room for each in network.modules() if getattr(each, "room", None) is not None}
    return sum(4 * tensor.numel() for room in rooms.values() for tensor in room._held.values())


WIDE = replace(  # as wide as levels of SD 1 are, of one block and without the last
    SD1,
    unet=replace(SD1.unet, channels=192, channel_mult=(1, 2, 3), num_res_blocks=1, transformer_depth=(0, 0, 0)),
    autoencoder=replace(SD1.autoencoder, channels=64, num_res_blocks=1),
)


@pytest.mark.parametrize("way", ["winograd4", "winograd2", "columns"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "family, h, w, rows", [(TINY, 8, 8, 2), (TINY, 40, 24, 5), (BOX, 16, 16, 2), (WIDE, 24, 16, 1)]
)
def test_hastened_layers_hold_no_more_than_is_thought(
    family: Family, h: int, w: int, rows: int, compiled: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(inference, "library", lambda: None, raising=False)
    go(monkeypatch, way)
    with torch.inference_mode():
        for keep in (0, 1 << 40):
            unet = UNet(family.unet).to(memory_format=torch.channels_last).eval()
            hasten(unet, keep=keep)
            context = noise(rows, 77, family.unet.context_dim)
            unet(noise(rows, family.unet.in_channels, h, w), torch.full((rows,), 5.0), context)
            assert held(unet) <= unet_room(family.unet, h, w, rows)
            assert held(unet) > 0 or way == "columns", "which some maps are too large for"
        autoencoder = Autoencoder(family.autoencoder).to(memory_format=torch.channels_last).eval()
        hasten(autoencoder)
        autoencoder.decode(noise(rows, family.autoencoder.latent_channels, h, w))
        assert held(autoencoder) <= decoder_room(autoencoder.config, h, w, rows)


def test_a_plan_has_room_for_what_fast_layers_work_in() -> None:
    """In float32 on a CPU alone; what is left is for their weights, and all of it together is within the budget."""
    plain, fast = planned(SD1, 24, CPU, count=2), planned(SD1, 24, CPU, count=2, fast=True)
    config = SD1.unet, 64, 64
    assert fast.unet == plain.unet + unet_room(*config, 4)
    assert fast.decoder == plain.decoder + decoder_room(SD1.autoencoder, 64, 64, 2)
    assert plain.keep - fast.keep == fast.estimate - plain.estimate > 256 * 2**20
    assert fast.estimate + fast.keep == fast.budget
    half = (planned(SD1, 24, CPU, dtype=torch.bfloat16, fast=each) for each in (False, True))
    cards = (planned(SD1, 24, CUDA, fast=each) for each in (False, True))
    assert len(set(half)) == len(set(cards)) == 1
    small, quick = planned(BOX, 24, CPU), planned(BOX, 24, CPU, fast=True)
    rooms = unet_room(BOX.unet, 16, 16, 2) + decoder_room(BOX.autoencoder, 16, 16, 1)
    assert (quick.unet, quick.decoder) == (small.unet + rooms, small.decoder + rooms), "a small decode leaves its own"
    for step in range(30):
        plan = planned(SD1, 5 + step / 5, CPU, count=8, dtype=torch.float32, fast=True)
        assert plan.estimate + plan.keep <= plan.budget
    enough = plain.estimate / GIB
    assert planned(SD1, enough, CPU, count=2).max_rows == 4
    scarce = planned(SD1, enough, CPU, count=2, fast=True)
    assert scarce.max_rows < 4 or scarce.max_pictures < 2 or scarce.tile is not None


def test_a_fast_pipeline_keeps_what_its_plan_leaves() -> None:
    pipe = Pipeline.from_pretrained(device="cpu", memory=Memory(vram=1), fast=True)
    assert pipe.fast_bytes == memory.plan(BOX, BOX.size, BOX.size, 1, GIB, CPU, fast=True).keep > 0


def test_free_memory_and_budgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert GIB // 16 < memory.free_memory(CPU) < 2**50
    monkeypatch.setattr(memory.planning, "free_memory", lambda device: 10 * GIB)
    assert memory.budget(None, CUDA) == 10 * GIB
    assert memory.budget(4, CUDA) == 3.5 * GIB
    assert memory.budget(4, CPU) == 4 * GIB
    assert memory.budget(40, CPU) == 10 * GIB
    for vram in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=re.escape(f"vram={vram}")):
            memory.budget(vram, CPU)


def test_a_card_is_asked_for_what_is_free_and_what_is_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    assert memory.free_memory(CUDA) == 4 * GIB
    with pytest.raises(ValueError, match="device='meta'"):
        memory.free_memory(META)
    assert memory.budget(2, META) == 2 * GIB, "what a person says is enough"


def test_systems_without_proc_say_their_memory_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "meminfo"
    assert memory.planning._free_ram(nowhere) > 0
    nowhere.write_text("MemTotal: 5 kB\nMemAvailable:    3 kB\n", encoding="ascii")
    assert memory.planning._free_ram(nowhere) == 3072
    monkeypatch.setattr(memory.planning.os, "sysconf_names", {})
    with pytest.raises(ValueError, match="say how many GiB"):
        memory.planning._free_ram(tmp_path / "none")
