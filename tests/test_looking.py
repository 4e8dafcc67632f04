"""Where words look: the maps are the attentions, who looks changes nothing, and what was planted is found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.guidance import (
    Ask,
    ClassifierFree,
    Guidance,
    Looker,
    Looking,
    Moment,
    Options,
    Reply,
    Weighted,
    heat,
    plan,
)
from sfumato.diffusion.noise import SeededNoise
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.samplers.tiled import tiled
from sfumato.engine import Engine, Run
from sfumato.models.transformer import TransformerBlock
from sfumato.models.unet import UNet
from sfumato.types import Cond, NetState
from sfumato.weights.checkpoint import Model, load_model
from tests.conftest import TINY, randomise

SIGMAS = [8.0, 3.0, 1.0, 0.0]
TOKENS = 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


def cond_of(seed: int, tokens: int = TOKENS) -> Cond:
    return Cond(randn(1, tokens, 16, seed=seed))


def run_of(guidance: Guidance, pictures: int = 1, size: tuple[int, int] = (8, 12), tile: int | None = None) -> Run:
    steps = SAMPLERS["dpmpp_2m"].run(
        SIGMAS[0] * randn(pictures, 4, *size), SIGMAS, SeededNoise(range(pictures), (4, *size))
    )
    return Run(steps if tile is None else tiled(steps, tile, 2), guidance, SIGMAS)


def latents(model: Model, *runs: Run) -> list[Tensor]:
    results = Engine(model).drive(runs)
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def blocks_of(unet: UNet) -> list[TransformerBlock]:
    return [module for module in unet.modules() if isinstance(module, TransformerBlock)]


def at(window: tuple[int, int, int, int] | None = None) -> Moment:
    return Moment(0, 1.0, 0.0, torch.zeros(1), window)


# -- the maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_only", [(), (True, False)])
def test_the_maps_are_the_attentions_to_the_context(cross_only: tuple[bool, ...]) -> None:
    """Each is computed here from the queries and keys of its attention, and none is of a first attention."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = randomise(UNet(replace(TINY.unet, cross_only=cross_only)))
    assert isinstance(unet, UNet)
    blocks, seen = blocks_of(unet), []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
        for block in blocks
        for layer in (block.attn2.to_q, block.attn2.to_k)
    ]
    maps: list[Tensor] = []
    args = randn(2, 4, 8, 12), torch.tensor([5.0, 700.0]), randn(2, TOKENS, 16, seed=1)
    with torch.inference_mode():
        out = unet(*args, state=NetState(cross=True), cross=maps)
        for hook in hooks:
            hook.remove()
        assert torch.equal(out, unet(*args))
        unet(*args, state=NetState(probe="middle_block"), cross=maps)  # not asked for
    assert len(maps) == len(blocks) == 7
    assert [tuple(look.shape[2:]) for look in maps] == [(8, 12), (4, 6), (4, 6), (4, 6), (4, 6), (8, 12), (8, 12)]
    for index, look in enumerate(maps):
        q, k = (z.unflatten(2, (2, -1)) for z in seen[4 * index : 4 * index + 2])  # two heads
        weights = (torch.einsum("bmhd,blhd->bhlm", q, k) / q.shape[-1] ** 0.5).softmax(dim=2).mean(dim=1)
        torch.testing.assert_close(look.flatten(2), weights)
        assert look.dtype == torch.float32
        torch.testing.assert_close(look.sum(dim=1), torch.ones(2, *look.shape[2:]))


def test_the_engine_brings_each_picture_its_own_maps(model: Model) -> None:
    """Calls are shared with another run, and split: a picture's maps are those that it has alone."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {"one": [], "other": [], "alone": []}

    def looking(name: str) -> Looking:
        return Looking(ClassifierFree(cond_of(1), cond_of(2), 3.0), lambda _, maps: seen[name].append(maps))

    Engine(model, max_rows=2).drive([run_of(looking("one"), 3), run_of(looking("other"), 2)])
    latents(model, run_of(looking("alone"), 2))
    assert [len(found) for found in seen.values()] == [3, 3, 3]
    for one, other, alone in zip(*seen.values(), strict=True):
        assert [len(look) for look in one] == [3] * 7
        for maps in zip(one, other, alone, strict=True):
            assert maps[1].shape == maps[2].shape == (2, TOKENS, *maps[0].shape[2:])
            torch.testing.assert_close(maps[1], maps[2], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(maps[0][:2], maps[2], atol=1e-5, rtol=1e-4)
            assert float((maps[0][0] - maps[0][1]).abs().max()) > 1e-4


# -- guidance -------------------------------------------------------------------------------------------------------


def test_alone_the_answer_is_the_same_to_the_bit(model: Model) -> None:
    bare = ClassifierFree(cond_of(1), None, 1.0)
    looker = Looker((8, 12))
    [plain], [looked] = latents(model, run_of(bare, 2)), latents(model, run_of(Looking(bare, looker), 2))
    assert torch.equal(plain, looked)
    assert looker.heat([1]).shape == (2, 8, 12)


@pytest.mark.parametrize(
    "options", [Options(3.0), Options(3.0, sag=0.75), Options(3.0, pag=2.0), Options(3.0, rescale=0.5)]
)
def test_with_a_negative_the_answer_is_the_same_but_for_rounding(model: Model, options: Options) -> None:
    bare = plan(cond_of(1), cond_of(2), options, "eps")
    looker = Looker((8, 12))
    [plain], [looked] = latents(model, run_of(bare, 2)), latents(model, run_of(Looking(bare, looker), 2))
    assert float((plain - looked).abs().max() / plain.abs().max()) < 1e-5
    assert looker.heat([1]).shape == (2, 8, 12)


def test_only_the_asked_row_is_changed() -> None:
    state = NetState(freeu=(1.1, 1.2, 0.9, 0.2), seamless=(True, False))
    parts = [Weighted(cond_of(1)), Weighted(replace(cond_of(3), state=state), 0.5)]
    inner = ClassifierFree(parts, cond_of(2), 3.0)
    for row in (0, 1):
        rows = Looking(inner, lambda _, maps: None, row).rows(at())
        assert [one.state is not None and one.state.cross for one in rows] == [row == 0, row == 1, False]
        assert all(one.context is other.context for one, other in zip(rows, inner.rows(at()), strict=True))
        assert rows[1].state == (replace(state, cross=True) if row == 1 else state)


def test_the_callback_gets_maps_and_moment_and_the_answer_is_the_inner_plans() -> None:
    seen = []
    inner = ClassifierFree(cond_of(1), cond_of(2), 3.0)
    maps = (randn(1, TOKENS, 2, 2), randn(1, TOKENS, 4, 4))
    replies = [Reply(randn(1, 4, 4, 4, seed=5), cross=maps), Reply(randn(1, 4, 4, 4, seed=6))]
    when = at()
    found = Looking(inner, lambda moment, looks: seen.append((moment, looks))).combine(when, replies)
    assert not isinstance(found, Ask)
    assert torch.equal(found.x0, inner.combine(when, replies).x0)
    assert seen == [(when, maps)]
    with pytest.raises(ValueError, match="row=1: no maps"):
        Looking(inner, lambda moment, looks: None, 1).combine(when, replies)


def test_a_network_without_attention_to_text_is_named(model: Model) -> None:
    config = replace(TINY.unet, transformer_depth=(0, 0), middle_depth=0)
    blind = replace(model, unet=randomise(UNet(config)))
    with pytest.raises(ValueError, match="no attention to a text"):
        latents(blind, run_of(Looking(ClassifierFree(cond_of(1), None, 1.0), Looker((8, 12)))))


# -- heat -----------------------------------------------------------------------------------------------------------


def test_heat_is_the_mean_of_the_sums_and_at_most_1() -> None:
    one, other = torch.zeros(2, 4, 2, 3), torch.zeros(2, 4, 2, 3)
    one[0, 1, 0, 0], one[0, 2, 0, 0], other[0, 2, 1, 2] = 0.25, 0.5, 0.375
    one[1, 1], other[1, 2] = 0.125, 0.25
    found = heat([one, other], [1, 2], (2, 3))
    expected = torch.zeros(2, 2, 3)
    expected[0, 0, 0], expected[0, 1, 2], expected[1] = 1.0, 0.5, 1.0
    assert torch.equal(found, expected)
    assert torch.equal(heat([one], [3], (2, 3)), torch.zeros(2, 2, 3))  # never looked at
    assert heat([one, randn(2, 4, 4, 6).abs()], [0], (16, 8)).shape == (2, 16, 8)


@pytest.mark.parametrize(
    "maps, places, message", [([], [0], "maps="), ([1], [], "places="), ([1], [1, 4], "places=.*0 to 3")]
)
def test_what_heat_cannot_use_is_named(maps: list[int], places: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heat([torch.ones(1, 4, 2, 2) for _ in maps], places, (2, 2))


def test_a_looker_keeps_one_sum() -> None:
    """Layers and steps count alike; its heat is that of all maps at once."""
    looker = Looker((8, 12))
    with pytest.raises(ValueError, match="nothing was seen"):
        looker.heat([0])
    steps = [tuple(randn(2, 4, *size, seed=seed).abs() for size in ((8, 12), (4, 6), (2, 3))) for seed in range(5)]
    for maps in steps:
        looker(at(), maps)
    every = [look for maps in steps for look in maps]
    torch.testing.assert_close(looker.heat([1, 3]), heat(every, [1, 3], (8, 12)))
    held = [value for value in vars(looker).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in held) == 2 * 4 * 8 * 12 + 8 * 12
    looker(at(), (randn(2, 6, 8, 12).abs(),))  # a longer prompt from here on
    assert looker.heat([5]).shape == (2, 8, 12)


def test_what_tiles_see_goes_where_they_lie() -> None:
    whole = randn(1, 4, 8, 12).abs() + 0.1
    looker = Looker((8, 12))
    for left in (0, 4, 8):  # the last goes round the edge
        columns = torch.arange(left, left + 8) % 12
        looker(at((0, left, 8, 8)), (whole[..., columns],))
    torch.testing.assert_close(looker.heat([2]), heat([whole], [2], (8, 12)))


@contextmanager
def planted(unet: UNet, sizes: dict[int, tuple[int, int]], token: int) -> Iterator[Tensor]:
    """All attentions to text look at `token` in the middle of the picture, and elsewhere anywhere but there.

    Gives the context for it; `sizes` are the heights and widths of feature maps by their number of cells.
    """
    kept = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    hooks = []

    def look(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        height, width = sizes[out.shape[1]]
        inside = -torch.ones(height, width)
        inside[height // 4 : height * 3 // 4, width // 3 :] = 1
        return inside.flatten()[None, :, None].expand_as(out)

    for block in blocks_of(unet):
        width = block.attn2.to_q.weight.shape[0]
        block.attn2.to_q.weight.data = torch.eye(width)
        block.attn2.to_k.weight.data = torch.cat([torch.full((width, 1), 10.0), torch.zeros(width, 15)], dim=1)
        hooks.append(block.norm2.register_forward_hook(look))
    context = torch.zeros(1, TOKENS, 16)
    context[:, token, 0] = 1
    try:
        yield context
    finally:
        for hook in hooks:
            hook.remove()
        unet.load_state_dict(kept)


@pytest.mark.parametrize("token", [1, 3])
def test_a_planted_attention_is_found(model: Model, token: int) -> None:
    looker = Looker((8, 12))
    with planted(model.unet, {96: (8, 12), 24: (4, 6)}, token) as context:
        latents(model, run_of(Looking(ClassifierFree(Cond(context), cond_of(2), 3.0), looker), 2))
    found, none = looker.heat([token]), looker.heat([(token + 1) % TOKENS])
    expected = torch.zeros(2, 8, 12)
    expected[:, 2:6, 4:] = 1
    assert ((found > 0.5) == (expected == 1)).all()
    assert float(found[:, 3:5, 6:].min()) > 0.99
    assert float(found[:, :, :3].max()) < 0.01
    assert ((none > 0.5) == (expected == 0)).all()


def test_tiles_and_the_whole_find_the_same(model: Model) -> None:
    """A tiny network's attentions in a tile are nearly those in the picture; elsewhere they are others."""
    guidance = ClassifierFree(cond_of(1), None, 1.0)
    whole, tiles = Looker((8, 24)), Looker((8, 24))
    latents(model, run_of(Looking(guidance, whole), size=(8, 24)))
    latents(model, run_of(Looking(guidance, tiles), size=(8, 24), tile=16))
    found, expected = tiles.heat([2]), whole.heat([2])
    off, aside = ((z - expected).square().mean().sqrt() / expected.std() for z in (found, found.roll(3, 2)))
    assert float(off) < 0.5 * float(aside)
