"""Seamless textures: what comes out of a network rolls with what goes in, in the asked directions and in no other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.diffusion.guidance import Moment, Options, Weighted, plan
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.engine import Engine, Run
from sfumato.families import BOX, FAMILIES
from sfumato.memory.estimate import network_numbers
from sfumato.models import tiling
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.layers import Conv2d, pad, wrapped
from sfumato.models.unet import UNet
from sfumato.types import Cond, NetState
from sfumato.weights.checkpoint import load_model
from tests.conftest import TINY, randomise
from tests.tiny import TINIES

WRAPS = [(True, False), (False, True), (True, True), (False, False)]
AXES = {"x": 3, "y": 2}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights everywhere, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return randomise(build())


@pytest.fixture(scope="module")
def unet() -> UNet:
    network = seeded(lambda: UNet(TINY.unet))
    assert isinstance(network, UNet)
    return network


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    network = seeded(lambda: Autoencoder(TINY.autoencoder))
    assert isinstance(network, Autoencoder)
    return network


def rolls(function: Callable[[Tensor], Tensor], x: Tensor, axis: int, cells: int, grow: float) -> float:
    """How far the output of a rolled input is from the rolled output, relative to the greatest number in it."""
    with torch.inference_mode():
        found, expected = function(x.roll(cells, axis)), function(x).roll(round(cells * grow), axis)
    return float((found - expected).abs().max() / expected.abs().max())


def assert_rolls(function: Callable[[Tensor], Tensor], x: Tensor, wrap: tuple[bool, bool], cells: int, grow: float):
    for asked, axis in zip(wrap, AXES.values(), strict=True):
        off = rolls(function, x, axis, cells, grow)
        assert off < 1e-4 if asked else off > 1e-2, (wrap, axis, off)


# -- the convolution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 2, 0), (5, 1, (1, 2))])
def test_a_convolution_that_does_not_wrap_is_pytorchs_own(kernel: int, stride: int, padding: int) -> None:
    theirs = nn.Conv2d(4, 6, kernel, stride, padding)
    ours = Conv2d(4, 6, kernel, stride, padding)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, 4, 9, 11)
    assert torch.equal(ours(x), theirs(x))
    with wrapped(ours, (True, True)):
        assert ours(x).shape == theirs(x).shape
        assert torch.equal(ours(x), theirs(x)) == (padding == 0)
        torch.testing.assert_close(ours(x)[..., 2:-2, 2:-2], theirs(x)[..., 2:-2, 2:-2])  # far from the edges
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("wrap", WRAPS)
def test_pad_takes_the_other_edge_or_zeros(wrap: tuple[bool, bool]) -> None:
    x = randn(1, 2, 3, 4)
    found = pad(x, (1, 2, 2, 0), wrap)
    assert found.shape == (1, 2, 5, 7)
    rows, columns = torch.arange(-2, 3), torch.arange(-1, 6)
    expected = x[..., (rows % 3)[:, None], columns % 4].clone()
    if not wrap[0]:
        expected[..., (columns < 0) | (columns > 3)] = 0
    if not wrap[1]:
        expected[..., rows < 0, :] = 0
    assert torch.equal(found, expected)


def test_nothing_is_left_behind_after_an_error(unet: UNet) -> None:
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) > 10
    assert all(isinstance(module, Conv2d) for module in convolutions)
    with pytest.raises(RuntimeError, match="on the way"), wrapped(unet, (True, False)):
        assert {module.wrap for module in convolutions} == {(True, False)}
        with wrapped(unet.middle_block, (False, True)):
            assert unet.out[2].wrap == (True, False)
            assert {module.wrap for module in unet.middle_block.modules() if isinstance(module, Conv2d)} == {
                (False, True)
            }
        assert {module.wrap for module in convolutions} == {(True, False)}
        raise RuntimeError("on the way")
    assert {module.wrap for module in convolutions} == {(False, False)}
    with pytest.raises(RuntimeError):  # a context of a wrong width
        unet(randn(1, 4, 8, 8), torch.tensor([5.0]), randn(1, 3, 5), state=NetState(seamless=(True, True)))
    assert {module.wrap for module in convolutions} == {(False, False)}


# -- the networks ---------------------------------------------------------------------------------------------------


def call(unet: UNet, x: Tensor, state: NetState | None) -> Tensor:
    config = unet.config
    vector = None if config.vector_dim is None else randn(1, config.vector_dim, seed=3)
    return unet(x, torch.tensor([321.0]), randn(1, 5, config.context_dim, seed=2), vector, state)


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_unet_rolls(unet: UNet, wrap: tuple[bool, bool]) -> None:
    state = NetState(seamless=wrap)
    assert_rolls(lambda x: call(unet, x, state), randn(1, 4, 8, 12), wrap, 2, 1)


@pytest.mark.parametrize("name", ["sd1", "sd2", "xl"])
def test_the_unet_of_every_family_rolls(name: str) -> None:
    family = TINIES[name]
    network = seeded(lambda: UNet(family.unet))
    assert isinstance(network, UNet)
    state = NetState(seamless=(True, False), freeu=(1.2, 1.4, 0.9, 0.2))
    cells = 2 ** (len(family.unet.channel_mult) - 1)
    assert_rolls(lambda x: call(network, x, state), randn(1, 4, 16, 24), (True, False), cells, 1)


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_autoencoder_rolls(autoencoder: Autoencoder, wrap: tuple[bool, bool]) -> None:
    with wrapped(autoencoder, wrap):
        assert_rolls(autoencoder.decode, randn(1, 4, 6, 8), wrap, 1, 2)
        assert_rolls(lambda x: autoencoder.encode(x).mean, randn(1, 3, 12, 16), wrap, 2, 0.5)


def test_unasked_nothing_changes(unet: UNet, autoencoder: Autoencoder) -> None:
    """Bit for bit what PyTorch's own convolutions give."""
    x, z, images = randn(2, 4, 8, 8), randn(1, 4, 6, 8), randn(1, 3, 12, 16)
    with torch.inference_mode():
        ours = (
            call(unet, x[:1], None),
            call(unet, x[:1], NetState()),
            autoencoder.decode(z),
            autoencoder.encode(images).mean,
        )
        for module in (*unet.modules(), *autoencoder.modules()):
            if type(module) is Conv2d:
                module.__class__ = nn.Conv2d  # type: ignore[assignment]
        try:
            theirs = call(unet, x[:1], None), autoencoder.decoder(autoencoder.post_quant_conv(z))
        finally:
            for module in (*unet.modules(), *autoencoder.modules()):
                if type(module) is nn.Conv2d:
                    module.__class__ = Conv2d
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[0])
    assert torch.equal(ours[2], theirs[1])


def test_what_is_counted_and_saved_is_the_same() -> None:
    """The tensors of the box as they are in its checkpoint, and the published counts of SD 1.x."""
    numbers = network_numbers(FAMILIES["sd1"])
    assert numbers["unet"] == 859_520_964
    assert numbers["encoder"] + numbers["decoder"] == 83_653_863
    with torch.device("meta"):
        names = Autoencoder(BOX.autoencoder).state_dict().keys()
    assert {"encoder.down.0.downsample.conv.weight", "decoder.up.1.upsample.conv.bias"} <= names


# -- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPS)
def test_tiles_meet_across_the_edges(autoencoder: Autoencoder, wrap: tuple[bool, bool], monkeypatch) -> None:
    """With one convolution for a decoder, tiles give the whole but for the little weight of what is at their rims."""
    conv, z, images = autoencoder.decoder.conv_in, randn(1, 4, 40, 40), randn(1, 3, 64, 64)

    def decode(part: Tensor) -> Tensor:
        assert part.shape[-2:] == (40, 40) or conv.wrap == (False, False)  # tiles are less than the picture each way
        return conv(part).repeat_interleave(2, 2).repeat_interleave(2, 3)

    monkeypatch.setattr(autoencoder, "decode", decode)
    off = {}
    with torch.inference_mode():
        with wrapped(autoencoder, wrap):
            tiled = tiling.decode(autoencoder, z, tile=32, overlap=16)
            assert conv.wrap == wrap
            assert tiling.encode(autoencoder, images, tile=16).mean.shape == (1, 4, 32, 32)
        for other in WRAPS:
            with wrapped(autoencoder, other):
                off[other] = float((tiled - decode(z)).abs().max() / tiled.abs().max())
    assert off.pop(wrap) < 0.03
    assert min(off.values()) > 0.2


def test_in_a_direction_of_one_tile_the_tile_itself_wraps(autoencoder: Autoencoder) -> None:
    z = randn(1, 4, 8, 24)
    with torch.inference_mode(), wrapped(autoencoder, (True, True)):
        tiled, whole = (tiling.decode(autoencoder, z, tile=size, overlap=8) for size in (16, 64))
        assert torch.equal(whole, autoencoder.decode(z))
        assert rolls(lambda x: tiling.decode(autoencoder, x, tile=16, overlap=8), z, 2, 1, 2) < 1e-4
        assert tiled.shape == whole.shape


def test_tiles_of_a_decoder_without_context_are_the_whole(autoencoder: Autoencoder, monkeypatch) -> None:
    """Where a cell's picture depends on the cell alone, tiles make no difference, round the edges or not."""
    z = randn(1, 4, 21, 9)
    monkeypatch.setattr(autoencoder, "decode", lambda part: part.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for wrap in WRAPS:
        with wrapped(autoencoder, wrap):
            found = tiling.decode(autoencoder, z, tile=16, overlap=8)
        torch.testing.assert_close(found, autoencoder.decode(z))


# -- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeu", [None, (1.1, 1.2, 0.9, 0.2)])
def test_guidance_asks_every_row_seamless(freeu: tuple[float, float, float, float] | None) -> None:
    one, two, negative = (Cond(randn(1, 3, 4, seed=seed)) for seed in range(3))
    parts = [Weighted(one), Weighted([(2, two), (5, one)], 0.5)]
    options = Options(3.0, pag=1.0, sag=1.0, freeu=freeu, seamless=(True, False))
    guidance = plan(parts, [(4, negative), (9, one)], options, "eps")
    for step in range(6):
        rows = guidance.rows(Moment(step, 1.0, 0.0, torch.zeros(1, 4, 8, 8)))
        assert len(rows) == 5
        for row in rows:
            assert row.state is not None
            assert (row.state.seamless, row.state.freeu) == ((True, False), freeu)
    plainly = plan(parts, negative, Options(3.0), "eps")
    assert {row.state for row in plainly.rows(Moment(0, 1.0, 0.0, torch.zeros(1)))} == {None}


@pytest.mark.parametrize("wrap", WRAPS[:3])
def test_a_whole_run_rolls(tiny_checkpoint: Path, wrap: tuple[bool, bool]) -> None:
    """From noise to latents, with guidance: rolled noise is a rolled picture, all the way through the engine."""
    model, sigmas = load_model(tiny_checkpoint), [8.0, 3.0, 1.0, 0.0]
    conds = [Cond(randn(1, 5, 16, seed=seed)) for seed in (1, 2)]

    def drawn(x: Tensor) -> Tensor:
        guidance = plan(*conds, Options(3.0, pag=1.0, seamless=wrap), "eps")
        [found] = Engine(model).drive([Run(SAMPLERS["dpmpp_2m"].run(x, sigmas, None), guidance, sigmas)])
        assert found is not None
        return found

    assert_rolls(drawn, 8 * randn(1, 4, 8, 12), wrap, 2, 1)
