"""Weights of 8 bits: near the exact ones, in a half or a quarter of the memory, and refused where they cannot serve."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.families import XL
from sfumato.memory import GIB, plan
from sfumato.models.beside import attach
from sfumato.models.layers import Conv2d, wrapped
from sfumato.models.quantised import (
    KINDS,
    LARGEST,
    CodedConv2d,
    CodedLinear,
    decode,
    encode,
    is_quantised,
    quantise,
    saved_bytes,
)
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipeline import Memory, Pipeline
from sfumato.types import Job
from tests.conftest import randomise

TINY = UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), context_dim=16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def num_bytes(network: nn.Module) -> int:
    """What weights and buffers take."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return randomise(UNet(TINY)).eval().requires_grad_(False)  # type: ignore[return-value]


INPUTS = noise(2, 4, 16, 16), torch.tensor([3.0, 700.0]), noise(2, 7, 16, seed=1)


@pytest.mark.parametrize("shape", [(24, 300), (24, 40, 1, 1), (24, 20, 3, 3)])
def test_codes_of_int8_are_within_half_a_step(shape: tuple[int, ...]) -> None:
    weight = noise(*shape) * torch.logspace(-6, 3, 24).view(-1, *[1] * (len(shape) - 1))
    codes, scale = encode(weight, "int8")
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and scale.shape[0] == 24
    assert ((decode(codes, scale, torch.float32) - weight).abs() <= scale * 0.5001).all()
    assert codes.flatten(1).abs().amax(dim=1).eq(127).all()  # each output uses the whole range


def test_codes_of_fp8_are_within_a_sixteenth() -> None:
    """Three bits behind the point: half a step is 1/16 of the number, and 2^-10 of the scale below the least."""
    weight = noise(24, 300)
    codes, scale = encode(weight, "fp8")
    found = decode(codes, scale, torch.float32)
    assert codes.dtype == torch.uint8
    assert ((found - weight).abs() <= weight.abs() / 16 + scale * 2**-9).all()
    assert torch.allclose(scale[:, 0] * LARGEST["fp8"], weight.abs().amax(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_of_zeros_stays_zero(kind) -> None:
    weight = noise(3, 8)
    weight[1] = 0
    assert decode(*encode(weight, kind), torch.float32)[1].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_computes_with_what_its_codes_stand_for(kind, dtype) -> None:
    """Moved before or after it was quantised; a scale far below half precision's least number loses nothing."""
    weight = noise(80, 64) * 1e-6
    layer = nn.Linear(64, 80).requires_grad_(False)
    layer.weight.copy_(weight)
    exact = decode(*encode(weight, kind), torch.float32)
    quantise(layer_of := nn.Sequential(layer), kind)
    layer_of.to(dtype)
    assert isinstance(layer, CodedLinear) and layer.scale.dtype == torch.float32
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, exact.to(dtype))
    x = noise(5, 64, seed=1).to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, exact.to(dtype), layer.bias))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_network_answers_nearly_the_same(unet: UNet, kind) -> None:
    exact, before = unet(*INPUTS), num_bytes(unet)
    small = copy.deepcopy(unet)
    saved = quantise(small, kind)
    assert saved == before - num_bytes(small) == saved_bytes(unet, torch.float32) and is_quantised(small)
    found = small(*INPUTS)
    assert 0 < (found - exact).norm() / exact.norm() < {"int8": 0.02, "fp8": 0.1}[kind]
    again = copy.deepcopy(small).to(torch.float16).to(torch.float32)  # biases and norms are rounded, codes are not
    assert torch.equal(again.middle_block[0].in_layers[2].weight, small.middle_block[0].in_layers[2].weight)
    assert {type(part) for part in small.middle_block.modules()} >= {CodedLinear, CodedConv2d}


def test_most_of_a_large_network_is_a_quarter() -> None:
    """SD 1.5's U-Net: 859.5 million numbers, of which 3.4 GB become 0.86."""
    with torch.device("meta"):
        network = UNet(UNetConfig())
    whole = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert 0.25 < 1 - saved_bytes(network, torch.float32) / whole < 0.26
    assert 0.5 < 1 - saved_bytes(network, torch.float16) / (whole / 2) < 0.51


@torch.inference_mode()
def test_edges_wrap_and_gradients_pass(unet: UNet) -> None:
    conv = Conv2d(16, 32, 3, padding=1)
    quantise(nn.Sequential(conv), "int8")
    with wrapped(conv, (True, True)):
        x = noise(1, 16, 6, 6)
        rolled = conv(x.roll(2, 3)).roll(-2, 3)
        assert torch.allclose(conv(x), rolled, atol=1e-5)


def test_a_delta_is_trained_beside(unet: UNet) -> None:
    quantise(unet, "int8")
    beside = attach(unet, ["to_q"], 2, 2.0, generator=torch.Generator().manual_seed(0))
    unet(*INPUTS).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in beside.parameters())


def test_what_cannot_be_is_refused(unet: UNet) -> None:
    attach(unet, ["to_q"], 2, 2.0)
    with pytest.raises(ValueError, match=r"^weights: .*to_q has a delta beside it"):
        quantise(unet, "int8")
    linear = nn.Sequential(nn.Linear(64, 64))
    quantise(linear, "fp8")
    with pytest.raises(ValueError, match="0 is of 8 bits already"):
        quantise(linear, "int8")
    with pytest.raises(ValueError, match="weights='int4': one of int8, fp8"):
        quantise(linear, "int4")  # type: ignore[arg-type]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny family's weights are small ones; here they count as large."""
    monkeypatch.setattr("sfumato.models.quantised.LEAST", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_draws_nearly_the_same_and_says_so(tiny_checkpoint: Path, small: None, kind: str) -> None:
    """From a file: none of the exact weights is left, whoever held them."""
    exact = Pipeline.from_pretrained(tiny_checkpoint, "cpu")("a", steps=2)
    pipe = Pipeline.from_pretrained(tiny_checkpoint, "cpu", weights=kind)
    assert is_quantised(pipe.model.unet) and not is_quantised(pipe.model.autoencoder)
    assert all(parameter.ndim < 2 or parameter.numel() < 64 for parameter in pipe.model.unet.parameters())
    found = pipe("a", steps=2)
    assert found.made_with["weights"] == kind and "weights" not in exact.made_with
    apart = np.abs(found.images.astype(float) - exact.images)
    assert 0 < apart.mean() < {"int8": 3, "fp8": 12}[kind]
    pipe.to(dtype=torch.bfloat16)
    assert pipe("a", steps=1).made_with["weights"] == kind


def test_a_lora_is_refused_in_one_line(tiny_checkpoint: Path, small: None, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_checkpoint, "cpu", weights="int8", adapters=tmp_path)
    with pytest.raises(ValueError, match=r"^lora='thing': it changes weights, and the U-Net's are kept in 8 bits"):
        pipe("a <lora:thing:1>", steps=1)
    pipe.to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="^lora='thing'"):
        pipe.draw(Job(prompt="a <lora:thing:1>", steps=1))
    assert pipe("a", steps=1).images.any()


def test_an_unknown_kind_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="^weights='int4': one of full, int8, fp8"):
        Pipeline.from_pretrained("no such file", "cpu", weights="int4")


def test_the_memory_plan_knows_what_is_saved() -> None:
    """SD XL's U-Net in half precision: 5.1 GB, of which nearly the half is saved, all of it on the device."""
    cuda = torch.device("cuda")
    whole, coded = (plan(XL, 1024, 1024, 1, 64 * GIB, cuda, torch.float16, kept) for kept in ("full", "int8"))
    with torch.device("meta"):
        saved = saved_bytes(UNet(XL.unet), torch.float16)
    assert whole.weights - coded.weights == saved > 2.5e9
    assert 0 < coded.unet - whole.unet < 0.2e9  # one layer's weight while it works
    tight = 8 * GIB
    assert plan(XL, 1024, 1024, 1, tight, cuda, torch.float16).offload
    found = plan(XL, 1024, 1024, 1, tight, cuda, torch.float16, "fp8")
    assert found.estimate <= tight and not found.offload


def test_a_plan_is_kept(tiny_checkpoint: Path, small: None) -> None:
    pipe = Pipeline.from_pretrained(tiny_checkpoint, "cpu", weights="fp8", memory=Memory(1.0))
    assert is_quantised(pipe.model.unet) and pipe("a", steps=1).made_with["weights"] == "fp8"
