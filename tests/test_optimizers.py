"""The trainers' AdamW and Muon against PyTorch's own."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sfumato.train.config import LoopConfig
from sfumato.train.loop import fit
from sfumato.train.optimizers import AdamW, Muon, make_optimizer, orthogonal
from tests.test_train_loop import Points, Regression, assert_same, everything


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(8, 6, 3, 3), (6, 8, 1, 1), (5, 4, 2, 3), (7, 9), (7,)]
    made = [torch.randn(shape) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(weight) for weight in made]


def give_gradients(listed: list[nn.Parameter], seed: int) -> None:
    """Of the weights' own order, but the third's, which lies otherwise than its weight."""
    torch.manual_seed(seed)
    for index, weight in enumerate(listed):
        drawn = torch.randn(weight.shape)
        weight.grad = drawn if index == 2 else torch.empty_like(weight).copy_(drawn)


def test_it_is_pytorchs_to_the_bit_whatever_the_order_of_memory() -> None:
    ours, theirs = weights(), weights()
    one = AdamW(ours, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for seed in range(4):
        for listed, optimizer in ((ours, one), (theirs, other)):
            give_gradients(listed, seed)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(ours, theirs, strict=True):
        for name, value in one.state[a].items():
            assert torch.equal(value, other.state[b][name]) and value.stride() == other.state[b][name].stride(), name


def test_a_step_copies_nothing_where_all_lies_alike() -> None:
    weight = weights()[:1]
    optimizer = AdamW(weight, lr=1e-3, betas=(0.9, 0.999))
    give_gradients(weight, 0)
    optimizer.step()  # makes the moments
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        optimizer.step()
    events = seen.key_averages(group_by_input_shape=True)
    assert any(event.key == "aten::_fused_adamw_" for event in events)
    copied = [event.input_shapes for event in events if event.key in ("aten::copy_", "aten::clone")]
    assert not [shapes for shapes in copied if shapes and len(shapes[0]) == 4]


def test_trainers_have_it() -> None:
    assert isinstance(make_optimizer(dict(zip("abcde", weights(), strict=True)), LoopConfig(1, 1), 1e-3), AdamW)


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (32, 64)])
def test_orthogonal_brings_singular_values_near_one_and_keeps_their_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    turned = orthogonal(matrices)
    for before, after in zip(matrices, turned, strict=True):
        values = torch.linalg.svdvals(after)
        assert values.min() > 0.5 and values.max() < 1.3
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ v.T
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-4


def test_muon_is_pytorchs_on_matrices() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    torch.manual_seed(0)
    start = [torch.randn(24, 60), torch.randn(48, 20), torch.randn(24, 60)]
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    config = LoopConfig(1, 1, optimizer="muon", precision="bf16", weight_decay=0.1)
    one = make_optimizer(dict(zip("abc", ours, strict=True)), config, 1e-2)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    assert isinstance(one, Muon)
    for seed in range(5):
        for listed, optimizer in ((ours, one), (theirs, other)):
            give_gradients(listed, seed)
            optimizer.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.01 * (b - first).norm()  # the products are in bfloat16


def test_muon_takes_matrices_and_leaves_words_edges_and_vectors_to_adamw() -> None:
    torch.manual_seed(0)
    shapes = {"conv.weight": (32, 16, 3, 3), "text.token_embedding.weight": (50, 32), "out.weight": (4, 32, 3, 3),
              "norm.weight": (32,), "attn.to_q.weight": (32, 32), "in.weight": (32, 4, 3, 3),
              "vectors.0": (20, 32)}  # fmt: skip
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    parameters["conv.weight"].data = parameters["conv.weight"].data.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(parameters, LoopConfig(1, 1, optimizer="muon"), 1e-2)
    flat = parameters["conv.weight"].detach().clone().flatten(1)
    give_gradients(list(parameters.values()), 1)
    gradient = parameters["conv.weight"].grad.clone().flatten(1)
    optimizer.step()
    turned = {name for name, p in parameters.items() if "momentum_buffer" in optimizer.state[p]}
    assert turned == {"conv.weight", "attn.to_q.weight"}
    assert all("exp_avg" in optimizer.state[p] for name, p in parameters.items() if name not in turned)
    expected = flat * (1 - 1e-2 * 0.01) - 1e-2 * 0.2 * 144**0.5 * orthogonal(gradient[None])[0]
    torch.testing.assert_close(parameters["conv.weight"].detach().flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_a_muon_run_resumes_bit_for_bit_and_not_sharded(tmp_path) -> None:
    config = LoopConfig(6, batch_size=4, lr=1e-2, warmup=2, checkpoint_every=2, optimizer="muon")
    straight = fit(Wider(), Points(), config, tmp_path / "straight")
    fit(Wider(), Points(), replace(config, steps=4), tmp_path / "stopped")
    resumed = fit(Wider(), Points(), config, tmp_path / "stopped")
    assert any(name.startswith("optimizer.momentum_buffer.") for name in everything(resumed))
    assert_same(everything(straight), everything(resumed))
    with pytest.raises(ValueError, match="optimizer='muon': needs whole matrices"):
        replace(config, shard=True)


class Wider(Regression):
    """With a matrix in the middle that Muon turns."""

    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, nn.Linear(16, 16))
