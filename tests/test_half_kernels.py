"""The compiled group norm with SiLU, attention and gated GELU against PyTorch's in float64; what they leave alone."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfumato.kernels import attention as attention_module
from sfumato.kernels import build, norm
from sfumato.kernels import gated as gated_module
from sfumato.kernels.attention import MOST, attention
from sfumato.kernels.gated import gated
from sfumato.kernels.norm import group_norm
from sfumato.models import layers
from sfumato.models.layers import GroupNorm, attend, hasten
from sfumato.models.transformer import FeedForward

pytestmark = pytest.mark.skipif(build.library() is None, reason=f"no compiled kernels here: {build.state()}")

NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest number
Function = Callable[..., Tensor | None]


def compare(ours: Function, exact: Function, given: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The answer and the gradients of all that is given, within rounding of those in float64."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in given]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    answer, right = ours(*leaves), exact(*wide)
    assert answer is not None and right is not None and answer.dtype == dtype
    grad = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(answer, leaves, grad)
    wanted = torch.autograd.grad(right, wide, grad.double())
    for one, two in zip([answer, *found], [right, *wanted], strict=True):
        assert (one.double() - two).abs().max() <= NEAR[dtype] * (two.abs().max() + 0.1)
    with torch.inference_mode():
        again = ours(*(tensor.detach() for tensor in leaves))
        assert again is not None and torch.equal(again, answer), "without gradients, the same"


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int, silu: bool) -> Tensor:
    found = F.group_norm(x + shift[:, :, None, None], groups, weight, bias, 1e-5)
    return F.silu(found) if silu else found


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "height", "width"),
    [(2, 48, 8, 1, 1), (3, 40, 5, 3, 5), (2, 7, 7, 4, 4), (1, 96, 32, 9, 11), (1, 64, 1, 16, 16)],
)
def test_group_norm(batch, channels, groups, height, width, silu, dtype):
    """Also of one cell, odd sizes, one channel a group, one group; of maps in any order, whose mean is not small."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(batch, channels, height, width, generator=generator) * 2 + 5).to(dtype)
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    shift = torch.randn(batch, channels, generator=generator)
    for each in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        compare(
            lambda x, *rest: group_norm(x, groups, rest[0], rest[1], 1e-5, silu, rest[2]),
            lambda x, *rest: plain_norm(x, *rest, groups=groups, silu=silu),
            (each, weight, bias, shift),
            dtype,
        )


def test_group_norm_of_a_mean_far_from_zero_keeps_its_digits():
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000.0
    one, nothing = torch.ones(32), torch.zeros(32)
    found = group_norm(x, 4, one, nothing, 1e-5)
    wanted = F.group_norm(x.double(), 4, one.double(), nothing.double(), 1e-5)
    assert found is not None and (found - wanted).abs().max() < 1e-3  # x itself is known to 6e-5


def test_what_is_not_finite_stays_so():
    x = torch.randn(2, 8, 3, 3)
    x[0, 0, 0, 0] = torch.nan
    for dtype in NEAR:
        found = group_norm(x.to(dtype), 2, torch.ones(8), torch.zeros(8), 1e-5, silu=True)
        assert found is not None and found[0, :4].isnan().all() and found[0, 4:].isfinite().all()
        assert found[1].isfinite().all()


def split(z: Tensor, heads: int) -> Tensor:
    return z.unflatten(2, (heads, -1)).transpose(1, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    found = F.scaled_dot_product_attention(*(split(z, heads) for z in (q, k, v)))
    return found.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "size"),
    [(2, 3, 5, 7, 4), (1, 1, 1, 1, 1), (2, 2, 100, 77, 24), (1, 2, 49, 16, 48), (1, 2, 7, 33, 64), (1, 1, 3, 256, 17)],
)
def test_attention(batch, heads, queries, keys, size, dtype):
    generator = torch.Generator().manual_seed(0)
    given = [
        2 * torch.randn(batch, count, heads * size, generator=generator).to(dtype) for count in (queries, keys, keys)
    ]
    compare(lambda q, k, v: attention(q, k, v, heads), lambda q, k, v: plain_attention(q, k, v, heads), given, dtype)


def test_attention_of_large_scores_does_not_overflow():
    q, k, v = (100 * torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found = attention(q, k, v, 2)
    assert found is not None
    torch.testing.assert_close(found, plain_attention(q, k, v, 2), rtol=1e-4, atol=1e-3)


def test_attention_leaves_many_keys_to_pytorch():
    q, wide = torch.randn(1, 2, 64), torch.randn(1, MOST // 64 + 1, 64)
    assert attention(q, wide, wide, 1) is None and attention(q, wide, wide, 2) is not None
    assert torch.equal(attend(q, wide, wide, 1, quick=True), attend(q, wide, wide, 1))
    few = torch.randn(1, 4, 64)
    causal = attend(few, few, few, 2, causal=True)
    assert torch.equal(attend(few, few, few, 2, causal=True, quick=True), causal)


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 7, 16), (9, 100)])
def test_gated(shape, dtype):
    x = 3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0)).to(dtype)

    def exact(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    compare(gated, exact, [x], dtype)


def hastened(channels: int = 16) -> GroupNorm:
    found = GroupNorm(4, channels)
    hasten(found)
    return found


def test_gradients_of_gradients_are_refused():
    x = torch.randn(1, 16, 2, 2, requires_grad=True)
    for answer in (hastened()(x), attention(x.flatten(2), x.flatten(2), x.flatten(2), 2), gated(x)):
        assert answer is not None
        (grad,) = torch.autograd.grad(answer.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_checkpointing_gives_the_same_gradients():
    layer, x = hastened(), torch.randn(2, 16, 3, 3, requires_grad=True)
    plain = torch.autograd.grad(layer(x, silu=True).square().sum(), [x, *layer.parameters()])
    again = checkpoint(lambda x: layer(x, silu=True), x, use_reentrant=False)
    for one, two in zip(plain, torch.autograd.grad(again.square().sum(), [x, *layer.parameters()]), strict=True):
        assert torch.equal(one, two)


def test_plain_layers_are_pytorchs_to_the_bit():
    layer, x, shift = GroupNorm(4, 16), torch.randn(2, 16, 3, 3), torch.randn(2, 16)
    wanted = F.silu(F.group_norm(x + shift[:, :, None, None], 4, layer.weight, layer.bias, layer.eps))
    assert torch.equal(layer(x, silu=True, shift=shift), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_compiled_code_pytorchs_is_used(dtype, monkeypatch):
    for module in (norm, attention_module, gated_module):
        monkeypatch.setattr(module, "_functions", lambda: None)
    x, shift = torch.randn(2, 16, 3, 3).to(dtype), torch.randn(2, 16).to(dtype)
    quick, layer = hastened().to(dtype), GroupNorm(4, 16).to(dtype)
    assert torch.equal(quick(x, silu=True, shift=shift), layer(x, silu=True, shift=shift))
    rows = torch.randn(2, 5, 16).to(dtype)
    assert torch.equal(attend(rows, rows, rows, 2, quick=True), attend(rows, rows, rows, 2))
    assert gated(rows) is None


def test_float16_and_other_devices_are_left_alone():
    for x in (torch.randn(1, 4, 2, 2).half(), torch.randn(1, 4, 2, 2, device="meta"), torch.randn(1, 4, 2, 2).double()):
        assert group_norm(x, 2, torch.ones(4), torch.zeros(4), 1e-5) is None and gated(x) is None
        assert attention(x.flatten(2), x.flatten(2), x.flatten(2), 2) is None
    assert group_norm(torch.randn(0, 4, 2, 2), 2, torch.ones(4), torch.zeros(4), 1e-5) is None


def test_compiled_networks_go_their_own_way(monkeypatch):
    """What traces a network sees PyTorch's operations: kernels know numbers, not symbols."""
    asked = []
    monkeypatch.setattr(layers.compiled, "_forward", lambda *given: asked.append(given))
    layer, x = hastened(), torch.randn(2, 16, 3, 3)
    with torch.no_grad():
        found = torch.compile(layer, backend="eager")(x)
        traced = torch.jit.trace(layer, x, check_trace=False)(x)
    assert not asked
    wanted = F.group_norm(x, 4, layer.weight, layer.bias, layer.eps)
    assert torch.equal(found, wanted) and torch.equal(traced, wanted)


def test_a_feed_forward_layer_hastened_is_as_it_was():
    layer, x = FeedForward(16), torch.randn(2, 5, 16, requires_grad=True)
    parameters = [x, *layer.parameters()]
    wanted = layer(x)
    right = torch.autograd.grad(wanted.square().sum(), parameters)
    hasten(layer)
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, two in zip(torch.autograd.grad(found.square().sum(), parameters), right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_threads_give_the_same_bits():
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, rows = torch.randn(1, 64, 8, 8, generator=generator), torch.randn(3, 9, 64, generator=generator)
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append((hastened(64)(x, silu=True), attention(rows, rows, rows, 4), gated(rows)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert one is not None and torch.equal(one, three)
