"""Adapters out of weights: the nearest of a rank, exact where the rank is enough, and merging as wearing does it."""

from __future__ import annotations

import pytest
import torch

from sfumato.models.deltas import IA3, Difference, DoRA, LoHa, LoRA
from sfumato.weights.adapters.adapter import Adapter
from sfumato.weights.adapters.extracting import Ranks, extract, factors, merged, resized
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.checkpoint import open_whole
from sfumato.weights.writing import parts_of
from tests.adapters import checkpoint_of, model_of, random_lora, weights_of
from tests.tiny import TINIES

SD1 = TINIES["sd1"]
CONV = ("unet", "input_blocks.2.0.op.weight")


def adapter(seed: int = 0) -> Adapter:
    changes = random_lora(SD1, seed=seed)
    changes[CONV] = (LoRA(torch.randn(8, 2), torch.randn(2, 8, 3, 3)),)
    changes["unet", "out.0.bias"] = (Difference(torch.ones(8)),)
    return Adapter("a", "", changes, 1, 1)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_factors_are_the_nearest_of_a_rank(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 3, 6, 9):
        up, down = factors(matrix, rank)
        best = left[:, :rank] @ values[:rank].diag() @ right[:rank]
        assert up.shape[1] == down.shape[0] == min(rank, 6)
        torch.testing.assert_close(up @ down, best, atol=1e-5, rtol=1e-5)
    up, down = factors(matrix, 6, share=0.5)
    energy = values.square().cumsum(0) / values.square().sum()
    assert up.shape[1] == int((energy < 0.5).sum()) + 1 < 6


def test_factors_have_no_more_than_the_rank_that_is_there():
    up, down = factors(torch.randn(8, 2) @ torch.randn(2, 8), 8)
    assert up.shape[1] == 2
    up, down = factors(torch.zeros(4, 4), 4)
    assert torch.equal(up @ down, torch.zeros(4, 4)) and up.isfinite().all() and down.isfinite().all()


def test_what_was_worn_is_extracted_again():
    base, tuned = model_of("sd1"), model_of("sd1")
    worn = adapter()
    Wardrobe(tuned).wear([Worn(worn)])
    changes = extract(tuned, base, Ranks(8), rest=True)
    assert set(changes) == set(worn.changes)
    assert isinstance(changes["unet", "out.0.bias"][0], Difference)
    assert {c.rank for made in changes.values() for c in made if isinstance(c, LoRA)} == {2, 4}
    again = model_of("sd1")
    Wardrobe(again).wear([Worn(Adapter("b", "", changes, 1, 1))])
    ours = weights_of(again)
    for key, tensor in weights_of(tuned).items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=1e-5)


def test_what_is_asked_for_alone():
    base, tuned = model_of("sd1"), model_of("sd1")
    Wardrobe(tuned).wear([Worn(adapter())])
    assert {part for part, _ in extract(tuned, base, Ranks(2), parts=["text"])} == {"text"}
    plain = extract(tuned, base, Ranks(2, conv=0))
    assert CONV not in plain and ("unet", "out.0.bias") not in plain
    assert max(change.rank for (change,) in plain.values()) == 2
    with pytest.raises(ValueError, match="nothing to extract"):
        extract(base, base, Ranks(2))
    with pytest.raises(ValueError, match="parts='vae': one of unet, text"):
        extract(tuned, base, Ranks(2), parts=["vae"])
    with pytest.raises(ValueError, match="not like the base's"):
        extract(model_of("sd2"), base, Ranks(2))


@pytest.mark.parametrize("given", [{"rank": 0}, {"rank": 1, "conv": -1}, {"rank": 1, "share": 0.0}], ids=str)
def test_bad_ranks_are_refused(given):
    with pytest.raises(ValueError, match="is needed|are needed"):
        Ranks(**given)


def test_resizing_up_keeps_the_change_and_down_is_the_nearest():
    worn = adapter()
    for rank, close in ((8, True), (2, False)):
        smaller = resized(worn, SD1, Ranks(rank))
        for key, (change,) in smaller.items():
            if isinstance(change, LoRA):
                weight = torch.zeros(change.up.shape[0], *change.down.shape[1:])
                (before,) = worn.changes[key]
                whole = before.changed(weight, 1.0)
                up, down = factors(whole.flatten(1), rank)
                new = change.changed(weight, 1.0)
                torch.testing.assert_close(new, (up @ down).reshape(new.shape), atol=1e-4, rtol=1e-4)
                if close:
                    torch.testing.assert_close(new, whole, atol=1e-4, rtol=1e-4)
                assert change.rank <= rank


def test_resizing_other_kinds():
    key = ("unet", "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight")
    loha = LoHa(torch.randn(8, 2), torch.randn(2, 8), torch.randn(8, 2), torch.randn(2, 8))
    scale, weight = IA3(torch.randn(8)), torch.zeros(8, 8)
    lora = LoRA(torch.randn(8, 4), torch.randn(4, 8))
    for change in (loha, DoRA(lora, torch.ones(8)), scale):
        (new,) = resized({key: (change,)}, SD1, Ranks(8))[key]
        assert type(new) is (LoRA if change is loha else type(change))
        torch.testing.assert_close(
            new.changed(weight + torch.eye(8), 1.0), change.changed(weight + torch.eye(8), 1.0), atol=1e-4, rtol=1e-4
        )


def test_merging_is_wearing():
    model, worn = model_of("sd1"), [Worn(adapter(1), 0.5, 0.8), Worn(adapter(2), -0.3, 1.0)]
    Wardrobe(model).wear(worn)
    parts = merged(parts_of(open_whole(checkpoint_of("sd1"))), worn)
    for (part, name), tensor in weights_of(model).items():
        assert torch.equal(parts[part][name].read(), tensor)
    with pytest.raises(ValueError, match="another model"):
        merged({"unet": {}}, worn)
