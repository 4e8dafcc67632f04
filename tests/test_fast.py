"""Calls without gradients, hastened: the same answers, and nothing that is kept outlives what it was made of."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.images import save_png
from sfumato.kernels import winograd as kernels
from sfumato.kernels.build import library
from sfumato.memory import GIB, plan
from sfumato.models import costs, inference
from sfumato.models.hypernetwork import Hypernetwork, HypernetworkConfig, worn
from sfumato.models.inference import CONTEXTS, KEPT, Linear, Store, can_order, quickest
from sfumato.models.layers import Conv2d, hasten, wrapped
from sfumato.models.transformer import FeedForward, TransformerBlock
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipeline import Memory, Pipeline
from sfumato.train import personal
from sfumato.train.config import LoopConfig
from sfumato.train.lora import LoRAConfig
from sfumato.train.state import State
from sfumato.types import NetState
from sfumato.weights.adapters.adapter import Adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from tests.adapters import model_of, random_lora, unet_output
from tests.conftest import TINY as FAMILY
from tests.conftest import randomise
from tests.test_ip_adapter import PLAIN, adapter_for
from tests.test_train_adapters import setup as training
from tests.tiny import TINIES

TINY = UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), context_dim=16)
PLENTY = 2**30
KEPT_64 = 4 * (kernels.packed_numbers(64, 64, 4) if library() else 36 * 64 * 64)  # a weight for F(4 x 4) takes so much


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, exact: Tensor, part: float = 1e-4) -> bool:
    """Nowhere further apart than a part of the largest number."""
    return bool((found - exact).abs().max() <= part * exact.abs().max())


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 3 x 3 convolutions of stride 1 go by kept tiles, whatever their size."""
    monkeypatch.setattr(inference, "quickest", lambda _, __, stride, *___: "direct" if stride > 1 else "winograd4")


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The costs of such a processor, whatever this one is."""
    monkeypatch.setattr(costs, "capability", lambda: "AVX2")
    costs.cheapest.cache_clear()
    yield
    costs.cheapest.cache_clear()


@pytest.fixture
def pair(tiles: None) -> tuple[UNet, UNet]:
    """A U-Net as it is and a hastened copy, whose 3 x 3 convolutions all go by kept tiles."""
    torch.manual_seed(0)
    plain = randomise(UNet(TINY)).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    quick = copy.deepcopy(plain)
    hasten(quick, keep=PLENTY)
    return plain, quick  # type: ignore[return-value]


INPUTS = noise(2, 4, 16, 16), torch.tensor([3.0, 700.0]), noise(2, 7, 16, seed=1)


def store_of(network: nn.Module) -> Store:
    return next(module.room for module in network.modules() if isinstance(module, Conv2d) and module.room is not None)


@torch.inference_mode()
def test_a_network_answers_the_same(pair: tuple[UNet, UNet]) -> None:
    plain, quick = pair
    exact = plain(*INPUTS)
    for _ in range(2):  # the second time with what was kept
        assert close(quick(*INPUTS), exact)
    assert store_of(quick).num_bytes > 0
    round_edges = NetState(seamless=(True, False))
    assert close(quick(*INPUTS, state=round_edges), plain(*INPUTS, state=round_edges))
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for network, into in zip(pair, maps, strict=True):
        network(*INPUTS, state=NetState(cross=True), cross=into)
    assert maps[0] and all(close(b, a, 1e-3) for a, b in zip(*maps, strict=True))
    hasten(quick, on=False)
    assert torch.equal(quick(*INPUTS), exact)


def test_with_gradients_nothing_is_kept(pair: tuple[UNet, UNet]) -> None:
    _, quick = pair
    quick.requires_grad_(True)
    quick(*INPUTS).sum().backward()
    assert store_of(quick).num_bytes == 0 and quick.out[2].weight.grad is not None
    assert quick.input_blocks[1][1].transformer_blocks[0].attn2.to_k.weight.grad.any()


@pytest.mark.parametrize("way", ["columns", "winograd2", "winograd4"])
@pytest.mark.parametrize("shape", [(2, 8, 8, 8, 16), (1, 3, 5, 7, 4), (3, 5, 4, 4, 1), (1, 16, 9, 1, 8)])  # B C h w O
@torch.no_grad()
def test_every_way_is_the_convolution(way: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for kept weights and without."""
    monkeypatch.setattr(inference, "quickest", lambda *_: way)
    batch, channels, height, width, out = shape
    x, weight, bias = noise(batch, channels, height, width), noise(out, channels, 3, 3, seed=1), noise(out, seed=2)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), 1, 1).float()
    for store in (Store(PLENTY), Store()):
        for _ in range(2):
            found = store.convolution(x, weight, bias, 1)
            assert found is not None and close(found, exact)
        assert bool(store.num_bytes) == (store.most > 0 and way != "columns")


@pytest.mark.skipif(not can_order(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_ordered_weights_change_no_bit(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept once, for maps of other sizes too, and made anew when the weight changes."""
    monkeypatch.setattr(inference, "quickest", lambda *_: "ordered")
    store, weight, bias = Store(PLENTY), noise(24, 16, 3, 3, seed=1), noise(24, seed=2)
    for shape in ((2, 16, 8, 8), (2, 16, 8, 8), (5, 16, 4, 6)):
        x = noise(*shape).contiguous(memory_format=torch.channels_last)
        found = store.convolution(x, weight, bias, stride)
        assert found is not None and close(found, F.conv2d(x, weight, bias, stride, 1), 1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert store.num_bytes == 4 * weight.numel()
    weight.mul_(2)
    found = store.convolution(x, weight, None, stride)
    assert found is not None and close(found, F.conv2d(x, weight, None, stride, 1), 1e-6)


def test_without_room_nothing_is_ordered(avx2: None) -> None:
    assert quickest((2, 192, 2, 2), 192, 1) == "direct" and "ordered" in KEPT
    x, weight = noise(2, 192, 2, 2), noise(192, 192, 3, 3, seed=1)
    for store in (Store(7), Store()):
        found = store.convolution(x, weight, None, 1)
        assert (found is None) == (library() is None) and store.num_bytes == 0


def _replace(conv: Conv2d, new: Tensor) -> None:
    conv.weight = nn.Parameter(new.clone(), requires_grad=False)


def _point_elsewhere(conv: Conv2d, new: Tensor) -> None:
    conv.weight.data = new.clone()


CHANGES: dict[str, Callable[[Conv2d, Tensor], object]] = {
    "written to": lambda conv, new: conv.weight.copy_(new),
    "one number": lambda conv, new: conv.weight[0, 0, 0, 0].add_(3.0),
    "loaded": lambda conv, new: conv.load_state_dict({"weight": new, "bias": conv.bias}),
    "assigned": lambda conv, new: conv.load_state_dict({"weight": new, "bias": conv.bias}, assign=True),
    "replaced": _replace,
    "data": _point_elsewhere,
    "turned": lambda conv, new: conv.to(memory_format=torch.channels_last),
    "there and back": lambda conv, new: conv.double().float().weight.mul_(2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_no_kept_weight_is_stale(change: str, mode: Callable[[], torch.no_grad], tiles: None) -> None:
    """Whichever way the weight changes, by whomever, inside inference mode too, the next call goes by the new one."""
    conv, x = Conv2d(64, 64, 3, padding=1), noise(1, 64, 8, 8)
    hasten(conv, keep=PLENTY)
    for turn in range(3):
        with mode():
            conv(x)
            assert turn or store_of(conv).num_bytes > 0
        with torch.no_grad() if change in ("replaced", "assigned", "loaded") else mode():
            CHANGES[change](conv, noise(64, 64, 3, 3, seed=turn))
        with mode():
            assert close(conv(x), F.conv2d(x, conv.weight, conv.bias, 1, 1))
    bytes_kept = store_of(conv).num_bytes
    assert bytes_kept <= KEPT_64, "what was made of former weights is gone"


def test_a_trainers_step_is_seen(pair: tuple[UNet, UNet]) -> None:
    """The fused kernel of AdamW writes without being counted; convolutions, keys and values are made anew all the same.

    Also those that were kept under the average, or before it.
    """
    plain, quick = pair
    quick.requires_grad_(True)
    trained = State(quick, LoopConfig(steps=9, batch_size=1, lr=1e-2, warmup=0))
    assert trained.optimizer.param_groups[0]["fused"]

    def fresh() -> bool:
        plain.load_state_dict(quick.state_dict())
        with torch.no_grad():
            return close(quick(*INPUTS), plain(*INPUTS))

    for _ in range(2):
        assert fresh() and store_of(quick).num_bytes > 0
        before = plain(*INPUTS)
        quick(*INPUTS).square().mean().backward()
        trained.optimizer.step()
        trained.update_ema()
        assert fresh() and not close(plain(*INPUTS), before, 1e-2)
        with trained.averaged():
            assert fresh()
        assert fresh()


def test_forget_serves_writes_that_nobody_counts(tiles: None) -> None:
    conv, x = Conv2d(64, 64, 3, padding=1).requires_grad_(False), noise(1, 64, 8, 8)
    hasten(conv, keep=PLENTY)
    with torch.no_grad():
        conv(x)
        conv.weight.data.mul_(2)
        store_of(conv).forget()
        assert close(conv(x), F.conv2d(x, conv.weight, conv.bias, 1, 1))


@torch.no_grad()
def test_kept_weights_go_with_their_network_and_stay_within_bounds(tiles: None) -> None:
    convs = nn.ModuleList(Conv2d(64, 64, 3, padding=1) for _ in range(4)).requires_grad_(False)
    one = KEPT_64
    hasten(convs, keep=2 * one)
    x, store = noise(1, 64, 8, 8), store_of(convs)
    for conv in convs:
        assert close(conv(x), F.conv2d(x, conv.weight, conv.bias, 1, 1))
    assert store.num_bytes == 2 * one
    kept = [weakref.ref(made) for _, ways in store._weights.values() for made in ways.values()]
    del conv, convs
    gc.collect()
    assert store.num_bytes == 0 and all(ref() is None for ref in kept)
    other = copy.deepcopy(nn.ModuleList([Conv2d(8, 8, 3, padding=1)]))
    hasten(other, keep=7)
    assert store_of(copy.deepcopy(other)).most == 7


@torch.no_grad()
def test_adapters_come_and_go(tiles: None) -> None:
    """LoRAs on convolutions, keys and values: each set's own answer, and the model's when they are off."""
    family, exact = TINIES["sd1"], []
    for quick in (False, True):
        model = model_of("sd1")
        hasten(model.unet, on=quick, keep=PLENTY)
        wardrobe, found = Wardrobe(model), []
        sets = [Worn(Adapter(str(seed), "0" * 64, random_lora(family, seed=seed), 1, 1)) for seed in (1, 2)]
        for wanted in ((), sets[:1], sets, sets[1:], ()):
            wardrobe.wear(wanted)
            found += [unet_output(model), unet_output(model)]
        if quick:
            assert store_of(model.unet).num_bytes > 0
            assert all(close(a, b) for a, b in zip(found, exact, strict=True))
            assert torch.equal(found[0], found[-1])
        exact = found
    assert not close(exact[0], exact[2], 1e-2)


# a text's keys and values


@torch.inference_mode()
def test_keys_and_values_are_computed_once_and_no_bit_differs(
    pair: tuple[UNet, UNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, quick = pair
    attention = quick.input_blocks[1][1].transformer_blocks[0].attn2
    first = quick(*INPUTS)
    monkeypatch.setattr(Store, "keys_values", lambda self, context, to_k, to_v: (to_k(context), to_v(context)))
    assert torch.equal(quick(*INPUTS), first)
    monkeypatch.undo()
    store, calls = store_of(quick), []
    of = store.known(INPUTS[2])
    k, v = store.keys_values(of, attention.to_k, attention.to_v)
    assert torch.equal(k, attention.to_k(INPUTS[2])) and torch.equal(v, attention.to_v(INPUTS[2]))
    before = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: calls.append(self) or before(self, x))
    quick(INPUTS[0], INPUTS[1], INPUTS[2].clone())
    assert attention.to_q in calls and attention.to_k not in calls and attention.to_v not in calls


@torch.inference_mode()
def test_each_context_has_its_own(pair: tuple[UNet, UNet]) -> None:
    """Prompts that change from step to step, also in place; and no more of them are kept than were said."""
    plain, quick = pair
    context = INPUTS[2].clone()
    for turn in range(2 * CONTEXTS):
        context[0, turn % 7] += 1.0
        assert close(quick(*INPUTS[:2], context), plain(*INPUTS[:2], context))
        assert close(quick(*INPUTS), plain(*INPUTS))
    assert close(quick(INPUTS[0][:1], INPUTS[1][:1], context[:1]), plain(INPUTS[0][:1], INPUTS[1][:1], context[:1]))
    store = store_of(quick)
    assert len(store._contexts) == CONTEXTS
    stands = weakref.ref(store.known(noise(1, 3, 16)))
    store.forget()
    assert stands() is None
    broken = torch.full((2, 7, 16), torch.nan)
    assert quick(*INPUTS[:2], broken).isnan().any() and len(store._contexts) <= CONTEXTS


@torch.inference_mode()
def test_texts_are_within_the_budget(pair: tuple[UNet, UNet]) -> None:
    """The oldest make way; where there is no room for one, or none at all, the answer is the same, and nothing held."""
    plain, quick = pair
    contexts = [noise(2, 7, 16, seed=seed) for seed in range(CONTEXTS)]
    attentions = [part.attn2 for part in quick.modules() if isinstance(part, TransformerBlock)]
    one = 4 * 2 * 7 * (16 + sum(2 * each.to_k.out_features for each in attentions))
    hasten(quick, keep=PLENTY)
    quick(*INPUTS)
    store_of(quick).forget_texts()
    weights = store_of(quick).num_bytes
    for most, texts in ((weights + CONTEXTS * one, CONTEXTS), (weights + 2 * one + 99, 2), (weights + one - 4, 1)):
        hasten(quick, keep=most)
        store = store_of(quick)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "known", lambda context: context)
            quick(*INPUTS)  # the weights come first
        assert store.num_bytes == weights
        for context in contexts:
            assert close(quick(*INPUTS[:2], context), plain(*INPUTS[:2], context))
            assert store.num_bytes <= most
        assert len(store._contexts) == texts
        assert (store.num_bytes == weights + texts * one) == (most >= weights + one)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Linear, "forward", _counting(calls := []))
            quick(*INPUTS[:2], contexts[-1])
        assert sum(each.to_k in calls for each in attentions) == (most < weights + one), "the newest is known"
    for keep in (0, 4):
        hasten(quick, keep=keep)
        assert close(quick(*INPUTS), plain(*INPUTS))
        assert store_of(quick).num_bytes == 0 and not store_of(quick)._contexts


def _counting(calls: list[nn.Module]) -> Callable[[nn.Linear, Tensor], Tensor]:
    """A linear layer's forward pass that tells whose it was."""
    before = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(self)
        return before(self, x)

    return forward


def test_texts_go_when_nothing_is_drawn(tiny_checkpoint: Path) -> None:
    """They are there while some run asks, and weights stay for the next drawing."""
    pipe = Pipeline.from_pretrained(tiny_checkpoint, "cpu", fast=True)
    store, texts = store_of(pipe.model.unet), []
    pipe("a red apple", steps=3, progress=lambda *_: texts.append(len(store._contexts)))
    assert texts and min(texts) > 0
    assert not store._contexts


@torch.no_grad()
def test_what_changes_keys_and_values_is_seen(pair: tuple[UNet, UNet]) -> None:
    """Hypernetworks, IP-Adapters, weights written to, and hooks, put on after the text's were kept."""
    plain, quick = pair
    quick(*INPUTS)
    network = randomise(Hypernetwork(HypernetworkConfig(widths=(16,))), 3)
    with worn(plain, [(network, 0.8)]), worn(quick, [(network, 0.8)]):  # type: ignore[list-item]
        changed = plain(*INPUTS)
        assert close(quick(*INPUTS), changed)
    assert not torch.equal(changed, plain(*INPUTS))
    adapter = adapter_for(plain, type(PLAIN)(image_dim=20, context_dim=16))
    tokens = adapter(noise(2, 20, seed=5))
    with adapter.steering(plain, tokens, 0.7), adapter.steering(quick, tokens, 0.7):
        assert close(quick(*INPUTS), plain(*INPUTS))
    for unet in pair:
        unet.input_blocks[1][1].transformer_blocks[0].attn2.to_v.weight.mul_(3)
    assert close(quick(*INPUTS), plain(*INPUTS))
    handles = [
        unet.middle_block[1].transformer_blocks[0].attn2.to_k.register_forward_hook(lambda _, __, out: 2 * out)
        for unet in pair
    ]
    assert close(quick(*INPUTS), plain(*INPUTS))
    for handle in handles:
        handle.remove()
    assert close(quick(*INPUTS), plain(*INPUTS))


# feed-forward layers, and where nothing applies


@pytest.mark.parametrize("rows", [1, 300, 2500])
@torch.no_grad()
def test_feed_forward_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FeedForward(24), noise(2, rows, 24)
    exact = layer(x)
    hasten(layer)
    monkeypatch.setattr(inference, "BAND", 2**18)
    assert layer(x).shape == exact.shape and close(layer(x), exact, 1e-5)
    assert close(layer(x.transpose(0, 1)), exact.transpose(0, 1), 1e-5)


@torch.no_grad()
def test_other_precisions_are_left_alone(tiles: None) -> None:
    """float64: PyTorch's own bits. bfloat16 and autocast have the kernels: near, and nothing of float32 is kept."""
    plain = randomise(UNet(TINY)).eval().requires_grad_(False)
    quick = copy.deepcopy(plain)
    hasten(quick, keep=PLENTY)
    for dtype in (torch.bfloat16, torch.float64):
        x, t, context = (part.to(dtype) for part in INPUTS)
        found, exact = quick.to(dtype)(x, t, context), plain.to(dtype)(x, t, context)
        assert torch.equal(found, exact) if dtype == torch.float64 else close(found.float(), exact.float(), 5e-2)
    plain, quick = plain.float(), quick.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(quick(*INPUTS).float(), plain(*INPUTS).float(), 5e-2)
    assert not store_of(quick)._weights
    conv, x = Conv2d(64, 64, 3, padding=1), noise(1, 64, 8, 8)
    hasten(conv, keep=PLENTY)
    with wrapped(conv, (True, True)):
        exact = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)
        assert torch.equal(conv(x), exact)


def test_which_way_without_gradients(avx2: None) -> None:
    """Measured winners: large tiles at SD's sizes, small ones or columns at 8 x 8, the box's largest map direct."""
    assert quickest((2, 320, 64, 64), 320, 1) == quickest((2, 320, 64, 64), 320, 1, KEPT) == "winograd4"
    assert quickest((2, 640, 32, 32), 640, 1, KEPT) == "winograd4"
    assert quickest((2, 1280, 16, 16), 1280, 1, KEPT) == "winograd4"
    assert quickest((2, 1280, 8, 8), 1280, 1, KEPT) == "winograd2"
    assert quickest((2, 1280, 16, 16), 1280, 2) in ("direct", "columns")
    assert quickest((32, 48, 16, 16), 48, 1, KEPT[1:]) == "direct"
    assert quickest((32, 192, 4, 4), 192, 1, KEPT) == "winograd4"
    assert quickest((1, 192, 4, 4), 192, 1, KEPT[1:]) == "direct"
    assert quickest((1, 192, 4, 4), 192, 1, KEPT) == quickest((2, 192, 2, 2), 192, 2, KEPT) == "ordered"
    assert quickest((2, 4, 64, 64), 320, 1, KEPT) in ("direct", "columns", "ordered")


# the pipeline's flag


def test_a_fast_pipeline_draws_the_same(tiny_checkpoint: Path, tiles: None) -> None:
    """To rounding; it says so in the recipe, also after a move; without the flag nothing is hastened."""
    plain = Pipeline.from_pretrained(tiny_checkpoint, "cpu")
    quick = Pipeline.from_pretrained(tiny_checkpoint, "cpu", fast=True)
    exact, found = (pipe("a red apple", seed=3, count=2) for pipe in (plain, quick))
    assert abs(found.images.astype(int) - exact.images).max() <= 1
    compiled = {} if library() is None else {"kernels": "compiled"}
    assert found.made_with == {**exact.made_with, "fast": "yes", **compiled}
    store = store_of(quick.model.unet)
    assert store.num_bytes > 0
    compiled = library() is not None  # in bfloat16 it is the kernels that are fast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ("fast" in quick("a red apple", steps=1).made_with) == compiled
    assert ("fast" in quick.to(dtype=torch.bfloat16)("a red apple", steps=1).made_with) == compiled
    assert "fast" not in quick.to(dtype=torch.float16)("a red apple", steps=1).made_with, "nothing is fast there"
    assert quick.to(dtype=torch.float32)("a red apple", steps=1).made_with["fast"] == "yes"
    assert store_of(quick.model.unet) is not store, "what was kept is dropped"
    assert all(module.room is None for module in plain.model.unet.modules() if isinstance(module, Conv2d))


def test_a_trainer_that_fails_leaves_nothing_hastened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first step, while it measures what a step takes."""
    save_png(tmp_path / "0.png", np.full((64, 64, 3), 90, np.uint8))
    model, rooms = model_of("sd1"), []
    given = training(model, tmp_path, tmp_path / "run", batch_size=1)
    ready = personal.lora(given, LoRAConfig(rank=2))

    def fail(*_: object) -> None:
        rooms.extend(module.room for module in model.unet.modules() if isinstance(module, Conv2d))
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(personal, "measure", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        personal.run(ready, given)
    assert rooms and all(rooms)
    assert all(getattr(module, "room", None) is None for module in model.unet.modules())


def test_a_plain_plan_keeps_what_is_left_and_a_thrifty_one_nothing(tiny_checkpoint: Path) -> None:
    device = torch.device("cpu")
    rich = plan(FAMILY, 16, 16, 1, 4 * GIB, device)
    assert rich.keep == 4 * GIB - rich.estimate > 0
    assert plan(FAMILY, 16, 16, 1, 4 * GIB, device, torch.bfloat16).keep == 0
    whole = plan(FAMILY, 1024, 1024, 1, 64 * GIB, device)
    tiled = plan(FAMILY, 1024, 1024, 1, whole.estimate // 2, device)
    assert whole.keep > 0 and tiled.tile is not None and tiled.keep == 0 < tiled.budget - tiled.estimate
    pipe = Pipeline.from_pretrained(tiny_checkpoint, "cpu", fast=True, memory=Memory(vram=0.5))
    assert 0 < store_of(pipe.model.unet).most < GIB // 2
