"""Calls of a U-Net that are recorded and repeated: which are, and when a recording is of no use any more.

The bookkeeping is tested with a recorder that computes anew at each repetition, from the tensors that were recorded;
what CUDA does is tested where there is a card.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.models.beside import attach
from sfumato.models.graphs import CudaRecorder, Graphs, arguments_of, inputs_of
from sfumato.models.hypernetwork import Hypernetwork, HypernetworkConfig, worn
from sfumato.models.layers import slice_attention
from sfumato.models.merging import Merging
from sfumato.models.residuals import Residuals
from sfumato.models.reuse import Deep
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipeline import Pipeline
from sfumato.types import NetState
from tests.conftest import randomise

CONFIG = UNetConfig(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), context_dim=16, num_heads=2,
    norm_groups=4, vector_dim=12,
)  # fmt: skip


class Standing:
    """In the place of CUDA's recorder, on a CPU: a repetition computes from the recorded tensors into the same memory.

    Only that may change them which a graph would see, too. `repeated` counts repetitions.
    """

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        answer = function().fill_(torch.nan)  # what is recorded is not computed yet

        def repeat() -> None:
            self.repeated += 1
            answer.copy_(function())

        return repeat, answer


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return randomise(UNet(CONFIG)).eval().requires_grad_(False)  # type: ignore[return-value]


def inputs(rows: int = 2, side: int = 8, tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, side, side, generator=generator)
    t = 1000 * torch.rand(rows, generator=generator)
    return x, t, torch.randn(rows, tokens, 16, generator=generator), torch.randn(rows, 12, generator=generator)


@torch.inference_mode()
def test_a_call_is_recorded_when_its_shapes_come_again(unet: UNet) -> None:
    plain, recorder = copy.deepcopy(unet), Standing()
    graphs = Graphs(unet, recorder, seen=2)
    answers = []
    for seed in range(6):
        answers.append(unet(*inputs(seed=seed)))
        assert (recorder.recorded, recorder.repeated) == (int(seed >= 2), max(0, seed - 1))
    for seed, answer in enumerate(answers):  # an answer is the caller's own: later calls leave it
        assert torch.equal(answer, plain(*inputs(seed=seed)))
    assert len(graphs) == 1
    graphs.remove()
    assert torch.equal(unet(*inputs()), answers[0]) and recorder.repeated == 4


@pytest.mark.parametrize("other", [{"rows": 3}, {"side": 4}, {"tokens": 9}])
@torch.inference_mode()
def test_each_shape_has_a_recording(unet: UNet, other: dict[str, int]) -> None:
    plain, recorder = copy.deepcopy(unet), Standing()
    graphs = Graphs(unet, recorder, seen=0)
    for seed in range(3):
        for shape in ({}, other):
            given = inputs(seed=seed, **shape)
            assert torch.equal(unet(*given), plain(*given))
    assert recorder.recorded == len(graphs) == 2


@torch.inference_mode()
def test_precision_order_and_slices_are_of_the_key(unet: UNet) -> None:
    plain, recorder = copy.deepcopy(unet), Standing()
    Graphs(unet, recorder, seen=0)
    x, *rest = inputs()
    unet(x, *rest)
    unet(x.contiguous(memory_format=torch.channels_last), *rest)
    assert recorder.recorded == 2
    for network in (unet, plain):
        slice_attention(network, 16)
    assert torch.equal(unet(x, *rest), plain(x, *rest)) and recorder.recorded == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unet(x, *rest), plain(x, *rest)) and recorder.recorded == 4


@torch.inference_mode()
def test_residuals_are_inputs(unet: UNet) -> None:
    plain, recorder = copy.deepcopy(unet), Standing()
    Graphs(unet, recorder, seen=0)
    sizes = [(8, 8), (8, 8), (8, 4), (16, 4)]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        skips = tuple(torch.randn(2, c, n, n, generator=generator) for c, n in sizes)
        inner = {3: torch.randn(2, 16, 4, 4, generator=generator), 1: torch.randn(2, 8, 8, 8, generator=generator)}
        for added in (Residuals(skips, skips[-1]), Residuals(inner=inner), Residuals()):
            given = inputs(seed=seed)
            assert torch.equal(unet(*given, residuals=added), plain(*given, residuals=added))
    assert recorder.recorded == 3


def test_inputs_and_arguments_are_inverses() -> None:
    x, t, context, vector = inputs()
    residuals = Residuals(tuple(torch.randn(11, 1)), torch.ones(1), {10: torch.zeros(2), 2: torch.ones(2)})
    given = {"x": x, "t": t, "context": context, "vector": None, "residuals": residuals, "maps": [], "deep": Deep()}
    found = inputs_of(given)
    assert found is not None and "vector" not in found
    back = arguments_of(found)
    assert back["x"] is x and set(back) == {"x", "t", "context", "residuals"}
    assert all(a is b for a, b in zip(back["residuals"].skips, residuals.skips, strict=True))
    assert back["residuals"].middle is residuals.middle and back["residuals"].inner.keys() == {2, 10}


@torch.inference_mode()
def test_what_asks_for_more_goes_as_before(unet: UNet) -> None:
    """States, reuse, merged cells; hooks; hypernetworks; deltas."""
    recorder = Standing()
    Graphs(unet, recorder, seen=0)
    given = inputs()
    unet(*given, state=NetState(seamless=(True, False)))
    unet(*given, deep=Deep(wanted=frozenset({1})))
    unet(*given, merging=Merging(0.5, [torch.Generator().manual_seed(0)] * 2))
    hyper = randomise(Hypernetwork(HypernetworkConfig(widths=(16,))))
    with worn(unet, [(hyper, 1.0)]):
        unet(*given)
    seen: list[int] = []
    for number, module in enumerate((unet, unet.middle_block[0].in_layers[2])):
        handle = module.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
        unet(*given)
        handle.remove()
    with torch.inference_mode(False):
        beside = attach(unet, ["to_q"], 2, 2.0)
    unet(*given)
    beside.detach()
    assert recorder.recorded == 0 and seen == [0, 1]
    unet(*given)
    assert recorder.recorded == 1
    with torch.inference_mode(False):
        unet(*given)
    assert recorder.repeated == 1


@torch.inference_mode()
def test_weights_that_are_written_to_are_seen_and_weights_elsewhere_recorded_anew(unet: UNet) -> None:
    recorder = Standing()
    graphs = Graphs(unet, recorder, seen=0)
    given = inputs()
    before = unet(*given)
    weight = unet.middle_block[0].in_layers[2].weight
    with torch.inference_mode(False), torch.no_grad():
        weight.mul_(2)  # as an adapter is put on
    changed = unet(*given)
    assert not torch.equal(changed, before) and recorder.recorded == 1
    weight.data = weight.data.clone()
    assert torch.equal(unet(*given), changed) and (recorder.recorded, len(graphs)) == (2, 1)
    unet.to(torch.float64)
    unet(*(part.double() for part in given))
    assert (recorder.recorded, len(graphs)) == (3, 1)
    parameter = torch.nn.Parameter(unet.middle_block[0].in_layers[2].weight.detach() / 2, requires_grad=False)
    unet.middle_block[0].in_layers[2].weight = parameter
    found = unet(*(part.double() for part in given))
    assert torch.allclose(found.float(), before, atol=1e-5) and recorder.recorded == 4


@torch.inference_mode()
def test_recordings_are_bounded_and_the_longest_unused_go_first(unet: UNet) -> None:
    recorder = Standing()
    graphs = Graphs(unet, recorder, most=2, seen=0)
    for rows in (1, 2, 1, 3):  # 2 goes
        unet(*inputs(rows))
    assert (len(graphs), recorder.recorded) == (2, 3)
    unet(*inputs(1))
    assert recorder.recorded == 3
    unet(*inputs(2))
    assert (len(graphs), recorder.recorded) == (2, 4)
    with pytest.raises(ValueError, match="most=0: 1 or more"):
        Graphs(unet, recorder, most=0)


@torch.inference_mode()
def test_shapes_that_came_once_are_forgotten(unet: UNet) -> None:
    graphs = Graphs(unet, Standing(), most=1, seen=2)
    for tokens in range(1, 12):
        unet(*inputs(tokens=tokens))
    assert len(graphs) == 0 and len(graphs._times) == 8


@torch.inference_mode()
def test_a_failed_recording_is_none(unet: UNet) -> None:
    class Failing(Standing):
        def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            raise torch.OutOfMemoryError("no memory")

    graphs = Graphs(unet, Failing(), seen=0)
    with pytest.raises(torch.OutOfMemoryError):
        unet(*inputs())
    assert len(graphs) == 0


def test_a_cpu_is_not_recorded_nor_are_gradients(unet: UNet) -> None:
    graphs = Graphs(unet, seen=0)  # CUDA's own
    with torch.inference_mode():
        unet(*inputs())
    assert len(graphs) == 0 and not CudaRecorder().serves(torch.device("cpu"))
    graphs.remove()
    recorder = Standing()
    Graphs(unet.requires_grad_(True), recorder, seen=0)
    unet(*inputs()).sum().backward()
    assert recorder.recorded == 0 and unet.out[2].weight.grad is not None


def test_a_pipeline_draws_the_same_pictures(tiny_checkpoint: Path) -> None:
    plain, recorder = Pipeline.from_pretrained(tiny_checkpoint, "cpu"), Standing()
    exact = plain("a", steps=4, count=2, seed=3).images
    Graphs(plain.model.unet, recorder)
    assert (plain("a", steps=4, count=2, seed=3).images == exact).all()
    assert recorder.recorded == 1 and recorder.repeated == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@torch.inference_mode()
def test_on_a_card_recorded_calls_are_the_same(unet: UNet) -> None:
    """Also after others were recorded in the same memory, and with weights that were written to."""
    unet = unet.cuda()
    plain, graphs = copy.deepcopy(unet), Graphs(unet, seen=1)
    for turn in range(3):
        for network in (unet, plain):
            network.middle_block[0].in_layers[2].weight.mul_(1 + 0.1 * turn)
        for rows, side in ((2, 8), (1, 16), (3, 8)):
            given = [part.cuda() for part in inputs(rows, side, seed=turn)]
            assert torch.allclose(unet(*given), plain(*given), atol=1e-5)
    assert len(graphs) == 3
