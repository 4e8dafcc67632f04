"""Convolutions as matrix products: the same results and gradients as PyTorch's, in every way, and only where asked."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.models import costs, layers, winograd
from sfumato.models.layers import Conv2d, hasten, wrapped
from sfumato.models.room import Room
from sfumato.models.unet import UNet, UNetConfig
from sfumato.models.winograd import Columns, Winograd, fastest

SHAPES = [(2, 8, 8, 8, 16), (1, 3, 5, 7, 4), (3, 5, 4, 4, 1), (1, 16, 9, 1, 8), (1, 2, 1, 1, 2)]  # B C h w O
TINY = UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 0), context_dim=16)


def _case(shape: tuple[int, ...], stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight and bias that want gradients, in float64 for the reference, and a gradient of the result."""
    batch, channels, height, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, channels, 3, 3, generator=generator, dtype=torch.float64) * (9 * channels) ** -0.5
    bias = torch.randn(out, generator=generator, dtype=torch.float64)
    result = F.conv2d(x, weight, bias, stride, 1)
    return x, weight, bias, torch.randn(result.shape, generator=generator, dtype=torch.float64)


def _run(way: str, case: tuple[Tensor, ...], dtype: torch.dtype, stride: int = 1) -> list[Tensor]:
    """The result and the gradients of x, weight and bias."""
    x, weight, bias = (z.to(dtype).clone().requires_grad_() for z in case[:3])
    if way == "direct":
        out = F.conv2d(x, weight, bias, stride, 1)
    elif way == "columns":
        out = Columns.apply(x, weight, bias, stride, Room())
    else:
        out = Winograd.apply(x, weight, bias, int(way[-1]), Room())
    out.backward(case[3].to(dtype))
    return [out.detach(), *(z.grad for z in (x, weight, bias) if z.grad is not None)]


def _close(found: list[Tensor], exact: list[Tensor], part: float) -> None:
    """Nowhere further apart than a part of the largest number."""
    assert len(found) == len(exact)
    for mine, reference in zip(found, exact, strict=True):
        assert mine.shape == reference.shape
        assert (mine.double() - reference).abs().max() <= part * reference.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("way", "part"), [("columns", 1e-6), ("winograd2", 1e-5), ("winograd4", 1e-4)])
def test_results_and_gradients_are_the_convolutions(way: str, part: float, shape: tuple[int, ...]) -> None:
    case = _case(shape)
    _close(_run(way, case, torch.float32), _run("direct", case, torch.float64), part)


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_of_stride_2(shape: tuple[int, ...]) -> None:
    case = _case(shape, 2)
    _close(_run("columns", case, torch.float32, 2), _run("direct", case, torch.float64, 2), 1e-6)


@pytest.mark.parametrize("m", [2, 4])
def test_pieces_change_nothing_but_rounding(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of rows and of pictures, and parts of the output channels, whatever their size."""
    case = _case((3, 6, 11, 9, 40))
    exact = _run("direct", case, torch.float64)
    for band in (1, 20_000, 100_000):
        monkeypatch.setattr(winograd, "BAND", band)
        _close(_run(f"winograd{m}", case, torch.float32), exact, 1e-4)


@pytest.mark.parametrize("m", [2, 4])
def test_what_a_room_held_before_is_not_seen(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of the room's maps is written before it is read, in one band and in many."""
    case = _case((3, 6, 11, 9, 40))
    for band in (1, 20_000, winograd.BAND):
        monkeypatch.setattr(winograd, "BAND", band)
        room = Room()
        for name in ("padded", "back", "gathered", "tiles", "products", "results", "weight"):
            room.take(name, 100_000).fill_(float("nan"))
        x, weight, bias = (z.float().requires_grad_() for z in case[:3])
        out = Winograd.apply(x, weight, bias, m, room)
        found = torch.autograd.grad(out, (x, weight, bias), case[3].float())
        _close([out.detach(), *found], _run("direct", case, torch.float64), 1e-4)


def test_tiles_are_kept_for_the_gradient_of_weights_alone() -> None:
    """Of a map that is one band its tiles are kept instead of it; with frozen weights the map, which costs nothing."""
    x, weight = (z.float().requires_grad_() for z in _case((2, 8, 8, 8, 16))[:2])
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Winograd.apply(x, weight, None, 4, Room())
        Winograd.apply(x, weight.detach(), None, 4, Room())
    assert saved == [(16, 8, 3, 3), (36, 8, 8), (16, 8, 3, 3), (2, 8, 8, 8)]


def test_frozen_weights_get_no_gradient() -> None:
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        tensors = [z.float().requires_grad_(want) for z, want in zip(_case((2, 4, 8, 8, 4))[:3], wants, strict=True)]
        for function, argument in ((Winograd, 4), (Columns, 1)):
            function.apply(*tensors, argument, Room()).sum().backward()
            assert [z.grad is not None for z in tensors] == list(wants)


def test_a_room_serves_after_inference_and_in_copies() -> None:
    """What inference mode left behind may be written to later; a copied network has a room of its own."""
    network = UNet(TINY)
    hasten(network)
    inputs = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.randn(1, 7, 16)
    with torch.inference_mode():
        before = network(*inputs)
    assert torch.equal(network(*inputs).detach(), before)
    other = copy.deepcopy(network)
    assert other.out[2].room is not network.out[2].room
    assert other.out[2].room is other.input_blocks[0][0].room
    assert torch.equal(other(*inputs).detach(), before)


def test_gradients_memory_comes_back_when_nobody_holds_it() -> None:
    """Kept gradients are never written over; freed ones' memory serves the next."""
    room, generator = Room(), torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradient(x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(Columns.apply(x, weight, None, 1, room).sum(), weight)
        return found

    x, other = torch.randn(2, 1, 3, 6, 6, generator=generator)
    first = gradient(x)
    kept, place = first.clone(), first.data_ptr()
    second = gradient(other)
    assert second.data_ptr() != place and torch.equal(first, kept)
    view = first[0]
    del first
    assert gradient(other).data_ptr() != place and torch.equal(view, kept[0])
    del view
    assert place in {gradient(other).data_ptr(), *(held.data_ptr() for held in [gradient(x), gradient(x)])}
    twice = [(Columns.apply(z, weight, None, 1, room).sum()) for z in (x, other)]
    for loss in twice:
        loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, gradient(x) + gradient(other))


def test_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured winners: tiles on large maps, columns where the weight is the larger part, no tiles for stride 2."""
    monkeypatch.setattr(costs, "capability", lambda: "AVX2")
    costs.cheapest.cache_clear()
    assert fastest((2, 160, 32, 32), 160, 1) == "winograd4"
    assert fastest((2, 320, 32, 32), 320, 1) == "winograd4"
    assert fastest((32, 96, 8, 8), 96, 1) == "winograd4"
    assert fastest((32, 48, 16, 16), 48, 1) == "direct"
    assert fastest((2, 640, 16, 16), 640, 1) == "winograd2"
    assert fastest((2, 640, 4, 4), 640, 1) == "columns"
    assert fastest((32, 96, 8, 8), 96, 2) in ("direct", "columns")
    assert fastest((1, 4, 64, 64), 4, 1) == "direct"
    assert fastest((32, 48, 16, 16), 48, 1, compiled=True) == "winograd4"
    monkeypatch.setattr(costs, "capability", lambda: "AVX512")
    costs.cheapest.cache_clear()
    for shape, outs in (((32, 48, 16, 16), 48), ((32, 192, 8, 8), 192), ((2, 160, 32, 32), 160)):
        assert fastest(shape, outs, 1) == "direct" and fastest(shape, outs, 1, compiled=True) == "winograd4"
    assert fastest((2, 1280, 4, 4), 640, 1, compiled=True) == "winograd2"
    costs.cheapest.cache_clear()


def test_off_unless_asked_and_where_it_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own bits without `hasten`, after it is taken back, in other precisions, and for other sizes."""
    x = torch.randn(1, 160, 32, 32).contiguous(memory_format=torch.channels_last)
    conv = Conv2d(160, 160, 3, padding=1).to(memory_format=torch.channels_last)
    monkeypatch.setattr(layers, "fastest", lambda *_: "winograd4")
    exact = F.conv2d(x, conv.weight, conv.bias, 1, 1)
    assert torch.equal(conv(x), exact)
    hasten(conv)
    assert not torch.equal(conv(x), exact) and torch.allclose(conv(x), exact, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, 1, 1))
    with wrapped(conv, (True, True)):
        round_edges = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)
        assert torch.equal(conv(x), round_edges)
    hasten(conv, on=False)
    assert torch.equal(conv(x), exact)
    wide = Conv2d(8, 8, 5, padding=2)
    hasten(wide)
    assert torch.equal(wide(x[:, :8]), F.conv2d(x[:, :8], wide.weight, wide.bias, 1, 2))


def test_gradients_lie_as_the_weights_do() -> None:
    """Channels last: an optimiser and the average go through memory in one order, and no copy is made."""
    for function, argument in ((Winograd, 2), (Winograd, 4), (Columns, 1), (Columns, 2)):
        weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
        function.apply(torch.randn(1, 6, 8, 8), weight, None, argument, Room()).sum().backward()
        assert weight.grad is not None and weight.grad.stride() == weight.stride()


def test_gradients_of_1_x_1_convolutions_lie_as_the_weights_do() -> None:
    """Otherwise the fused optimiser copies weight, gradient and moments in every step."""
    conv = Conv2d(6, 8, 1).to(memory_format=torch.channels_last)
    hasten(conv)
    conv(torch.randn(1, 6, 4, 4).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.stride() == conv.weight.stride() == (6, 1, 6, 6)


def test_a_network_learns_the_same() -> None:
    """Loss and all gradients of a U-Net, hastened and not, to float32's rounding."""
    torch.manual_seed(0)
    plain = UNet(TINY).to(memory_format=torch.channels_last)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    quick = copy.deepcopy(plain)
    hasten(quick)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 16)
    losses = [network(*inputs).square().mean() for network in (plain, quick)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0].item() - losses[1].item()) <= 1e-4 * losses[0].item()
    for mine, exact in zip(quick.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and exact.grad is not None
        assert (mine.grad - exact.grad).norm() <= 1e-3 * exact.grad.norm() + 1e-7
