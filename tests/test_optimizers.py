"""The trainers' AdamW against PyTorch's own."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sfumato.train.config import LoopConfig
from sfumato.train.optimizers import AdamW, make_optimizer


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
    assert isinstance(make_optimizer(weights(), LoopConfig(1, 1), 1e-3), AdamW)
