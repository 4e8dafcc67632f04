"""Trainable deltas: no change at the start, gradients in them alone, and what they learn is what a file would do."""

from __future__ import annotations

import pytest
import torch

from sfumato.models.beside import attach, tensors_of
from sfumato.models.deltas import DoRA, LoHa, LoKr, LoRA
from sfumato.weights.adapters.adapter import Adapter
from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.adapters.writing import save_adapter
from tests.adapters import model_of, same_bits, unet_output, weights_of
from tests.tiny import TINIES

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]
ALL = [*LINEAR, "in_layers.2", "input_blocks.2.0.op"]
CASES = {
    "lora": ("lora", LINEAR, {}, LoRA),
    "locon": ("locon", ALL, {}, LoRA),
    "locon-tucker": ("locon", ALL, {"tucker": True}, LoRA),
    "loha": ("loha", ALL, {}, LoHa),
    "loha-tucker": ("loha", ALL, {"tucker": True}, LoHa),
    "lokr": ("lokr", ALL, {}, LoKr),
    "lokr-tucker": ("lokr", ALL, {"tucker": True, "factor": 2}, LoKr),
    "dora": ("dora", LINEAR, {}, DoRA),
}


def trained(beside, model):
    """Some steps of plain descent on the output's square."""
    from tests.adapters import inputs

    given = inputs(model.family)
    rate = torch.optim.Adam(beside.parameters(), lr=0.02)
    for _ in range(3):
        loss = model.unet(given["x"], given["t"], given["context"]).square().mean()
        rate.zero_grad()
        loss.backward()
        rate.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", CASES)
def test_life_of_a_delta(tmp_path, name):
    kind, targets, options, made = CASES[name]
    model = model_of("sd1")
    before, weights = unet_output(model), weights_of(model)
    beside = attach(model.unet, targets, 2, 1.0, kind, generator=torch.Generator().manual_seed(1), **options)
    torch.testing.assert_close(unet_output(model), before, atol=1e-5, rtol=1e-5)
    assert set(model.unet.state_dict()) == {key for part, key in weights if part == "unet"}  # names as before

    trained(beside, model)
    assert all(parameter.grad is None for parameter in model.unet.parameters())
    assert any(parameter.grad.any() for parameter in beside.parameters())
    assert same_bits(weights, weights_of(model))
    learned = unet_output(model)
    assert (learned - before).abs().max() > 1e-3

    changes = {("unet", key): (change,) for key, change in tensors_of(beside).items()}
    assert all(isinstance(change, made) for (change,) in changes.values())
    beside.detach()
    beside.detach()
    assert torch.equal(unet_output(model), before)
    save_adapter(tmp_path / "a.safetensors", changes, TINIES["sd1"])
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    assert adapter.matched == adapter.total == len(changes) == len(beside.names)
    Wardrobe(model).wear([Worn(adapter)])
    torch.testing.assert_close(unet_output(model), learned, atol=1e-4, rtol=1e-4)


def test_training_makes_the_loss_less():
    model = model_of("sd1")
    beside = attach(model.unet, LINEAR, 4, 4.0)
    start = float(unet_output(model).square().mean())
    assert trained(beside, model) < start


def test_the_generator_decides():
    first, again, other = (
        tensors_of(attach(model_of("sd1").unet, ["to_q"], 2, 1.0, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key].down, again[key].down) for key in first)
    assert not any(torch.equal(first[key].down, other[key].down) for key in first)


def test_half_precision_networks_are_trained_in_full():
    model = model_of("sd1", torch.bfloat16)
    for kind in ("lora", "loha", "dora"):
        beside = attach(model.unet, LINEAR, 2, 1.0, kind)
        assert {parameter.dtype for parameter in beside.parameters()} == {torch.float32}
        assert unet_output(model).dtype == torch.bfloat16
        beside.detach()


def test_gradients_asked_for_come_back():
    model = model_of("sd1")
    model.unet.requires_grad_(True)
    beside = attach(model.unet, ["to_q"], 2, 1.0)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    beside.detach()
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"targets": ["nothing"]}, "targets: no linear layer or convolution .* 'nothing'"),
        ({"targets": []}, "targets: one or more"),
        ({"targets": ["in_layers.2"]}, "targets: .* large kernel; kind 'locon'"),
        ({"rank": 0}, "rank=0: 1 or more"),
        ({"alpha": 0.0}, "alpha=0.0: above 0"),
        ({"kind": "x"}, "kind='x': one of lora, locon"),
        ({"dropout": 1.0}, "dropout=1.0: 0 to below 1"),
        ({"kind": "lokr", "factor": 0}, "factor=0: 1 or more"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(given, why):
    model = model_of("sd1")
    with pytest.raises(ValueError, match=f"^{why}"):
        attach(model.unet, **{"targets": ["to_q"], "rank": 2, "alpha": 1.0, **given})
    attach(model.unet, ["to_q"], 2, 1.0)
    with pytest.raises(ValueError, match="has a delta already"):
        attach(model.unet, ["to_q"], 2, 1.0)


def test_an_adapter_of_tensors_describes_itself():
    changes = {("unet", k): (c,) for k, c in tensors_of(attach(model_of("sd1").unet, ["to_q"], 3, 1.0)).items()}
    assert Adapter("x", "", changes, 1, 1).describe() == "lora x: LoRA, rank 3, 1 of 1 keys matched"
