"""Wearing: the right sum of changes, every bit back, in any order, and nothing half done."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.models.deltas import IA3, Difference, LoRA
from sfumato.weights.adapters import wearing
from sfumato.weights.adapters.adapter import Adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn, applied, steps_of
from tests.adapters import model_of, random_lora, same_bits, text_outputs, unet_output, weights_of
from tests.tiny import TINIES

SD1 = TINIES["sd1"]
Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def adapter(seed: int, parts: tuple[str, ...] = ()) -> Adapter:
    changes = random_lora(SD1, seed=seed, parts=parts)
    return Adapter(f"a{seed}", "0" * 64, changes, len(changes), len(changes))


def mixed() -> Adapter:
    """A plain difference of a bias and a convolution, and scales, which do not commute with additions."""
    changes = {
        ("unet", Q): (IA3(torch.linspace(-0.5, 0.5, 8)),),
        ("unet", "input_blocks.0.0.bias"): (Difference(torch.ones(8)),),
        ("unet", "input_blocks.2.0.op.weight"): (LoRA(torch.ones(8, 1), torch.ones(1, 8, 3, 3), 0.1),),
    }
    return Adapter("mixed", "1" * 64, changes, 3, 3)


@functools.cache
def set_of(dtype: torch.dtype):
    """A model that the examples share, as it was, and its adapters."""
    model = model_of("sd1", dtype)
    return model, Wardrobe(model), weights_of(model), (adapter(1), adapter(2, ("unet",)), mixed())


def expected(before, worn, dtype):
    """From the original weights at once, the order of the adapters kept."""
    out = dict(before)
    for key, steps in steps_of(worn).items():
        out[key] = applied(before[key].float(), steps).to(dtype)
    return out


STRENGTHS = st.sampled_from([0.0, 0.5, 1.0, -0.75, 1.3])
WORN = st.lists(st.tuples(st.integers(0, 2), STRENGTHS, STRENGTHS, st.sampled_from([None, 1, 3])), max_size=3)


@settings(max_examples=12, deadline=None)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), sets=st.lists(WORN, min_size=1, max_size=3))
def test_any_order_gives_exactly_the_set_and_then_every_bit_back(dtype, sets):
    model, wardrobe, before, adapters = set_of(dtype)
    for chosen in sets:
        worn = [Worn(adapters[number], text, unet, dyn) for number, text, unet, dyn in chosen]
        wardrobe.wear(worn)
        assert same_bits(expected(before, worn, dtype), weights_of(model))
        assert wardrobe.worn == tuple(worn)
    wardrobe.wear(())
    assert same_bits(before, weights_of(model)) and wardrobe.num_bytes == 0


def test_strengths_are_of_their_networks():
    model = model_of("sd1")
    before, texts, wardrobe = unet_output(model), text_outputs(model), Wardrobe(model)
    wardrobe.wear([Worn(adapter(1), text=0.0, unet=1.0)])
    assert not torch.equal(unet_output(model), before) and torch.equal(text_outputs(model)[0], texts[0])
    wardrobe.wear([Worn(adapter(1), text=1.0, unet=0.0)])
    assert torch.equal(unet_output(model), before) and not torch.equal(text_outputs(model)[0], texts[0])


def test_strength_0_changes_and_keeps_nothing():
    model = model_of("sd1")
    before, wardrobe = weights_of(model), Wardrobe(model)
    wardrobe.wear([Worn(adapter(1), 0.0, 0.0)])
    assert same_bits(before, weights_of(model)) and wardrobe.num_bytes == 0


def test_the_same_set_twice_writes_nothing_and_one_more_only_its_own(monkeypatch):
    model = model_of("sd1")
    wardrobe, one, other = Wardrobe(model), Worn(adapter(1, ("text",))), Worn(adapter(2, ("unet",)))
    written = []
    write = wearing._write
    monkeypatch.setattr(wearing, "_write", lambda parameter, new: (written.append(parameter), write(parameter, new)))
    wardrobe.wear([one])
    first = len(written)
    wardrobe.wear([one])
    assert len(written) == first == len(one.adapter.changes)
    wardrobe.wear([one, other])
    assert len(written) == first + len(other.adapter.changes)
    assert wardrobe.num_bytes == sum(
        4 * dict(model.networks[part].named_parameters())[name].numel()
        for each in (one, other)
        for part, name in each.adapter.changes
    )


@pytest.mark.parametrize("wearing_before", [False, True])
def test_an_error_half_way_leaves_the_networks_as_they_were(monkeypatch, wearing_before):
    model = model_of("sd1")
    plain, wardrobe = weights_of(model), Wardrobe(model)
    if wearing_before:
        wardrobe.wear([Worn(adapter(1))])
    before, held, changed, calls = weights_of(model), wardrobe.num_bytes, wearing._changed, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return changed(*args)

    monkeypatch.setattr(wearing, "_changed", fails)
    with pytest.raises(KeyboardInterrupt):
        wardrobe.wear([Worn(adapter(2), 0.3, 0.3)])
    monkeypatch.undo()
    assert same_bits(before, weights_of(model)) and wardrobe.num_bytes == held
    wardrobe.wear([Worn(adapter(2))])
    wardrobe.wear(())
    assert same_bits(plain, weights_of(model))


def test_numbers_beyond_the_precision_are_refused():
    model = model_of("sd1", torch.float16)
    before, wardrobe = weights_of(model), Wardrobe(model)
    far = Adapter("far", "", {("unet", Q): (Difference(torch.full((8, 8), 7e4)),)}, 1, 1)
    with pytest.raises(ValueError, match=r"beyond torch.float16"):
        wardrobe.wear([Worn(adapter(1)), Worn(mixed(), 1.0, 9000.0), Worn(far)])
    assert same_bits(before, weights_of(model))


def test_memory_order_and_places_stay():
    model = model_of("sd1")
    unet_output(model)  # turns the convolutions to channels-last
    conv = dict(model.unet.named_parameters())["input_blocks.2.0.op.weight"]
    stride, place = conv.stride(), conv.data_ptr()
    assert conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()
    before, wardrobe = weights_of(model), Wardrobe(model)
    wardrobe.wear([Worn(mixed())])
    assert (conv.stride(), conv.data_ptr()) == (stride, place) and not same_bits(before, weights_of(model))
    wardrobe.wear(())
    assert same_bits(before, weights_of(model))


def test_worn_before_the_first_call_is_the_same():
    """Mapped weights are turned at a network's first call, after which the file's pages are handed back."""
    one, other = model_of("sd1"), model_of("sd1")
    before = weights_of(one)
    Wardrobe(one).wear([Worn(adapter(1)), Worn(mixed())])
    unet_output(other)
    Wardrobe(other).wear([Worn(adapter(1)), Worn(mixed())])
    assert torch.equal(unet_output(one), unet_output(other)) and same_bits(weights_of(one), weights_of(other))
    unworn = model_of("sd1")
    wardrobe = Wardrobe(unworn)
    wardrobe.wear([Worn(adapter(1)), Worn(mixed())])
    unet_output(unworn)
    wardrobe.wear(())
    assert same_bits(before, weights_of(unworn))


@pytest.mark.parametrize("field", [{"text": float("nan")}, {"unet": float("inf")}, {"unet": 1e9}, {"dyn": 0}], ids=str)
def test_bad_strengths_are_refused(field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))}="):
        Worn(mixed(), **field)


def test_an_adapter_of_another_model_is_refused():
    other = Adapter("x", "", {("unet", "no.weight"): (Difference(torch.ones(1)),)}, 1, 1)
    with pytest.raises(ValueError, match="another model"):
        Wardrobe(model_of("sd1")).wear([Worn(other)])
