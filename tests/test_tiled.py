"""Tiled diffusion: tiles cover, their weights sum to 1, and the sampler cannot tell them from one network call."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.guidance import ClassifierFree, Guidance, Options, plan
from sfumato.diffusion.noise import SeededNoise
from sfumato.diffusion.samplers import SAMPLERS, Steps, drive
from sfumato.diffusion.samplers.tiled import _spans, crop, tiled
from sfumato.engine import Engine, Run
from sfumato.families import Family
from sfumato.models import tiling
from sfumato.types import Answer, Cond, NetState, Query
from sfumato.weights.checkpoint import Model, load_model
from sfumato.weights.parts import build
from tests.conftest import randomise

CPU = torch.device("cpu")
SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


def steps_of(name: str, height: int, width: int, pictures: int = 1) -> Steps:
    """A sampler's run over SIGMAS on fixed noise."""
    x = SIGMAS[0] * randn(pictures, 4, height, width)
    noise = SeededNoise(range(pictures), (4, height, width))
    return SAMPLERS[name].run(x, SIGMAS, noise)


def cond_of(seed: int, concat: Tensor | None = None) -> Cond:
    return Cond(randn(1, 5, 16, seed=seed), concat=concat)


def latents(model: Model, steps: Steps, guidance: Guidance | None = None, watch=None) -> Tensor:
    guidance = guidance or ClassifierFree(cond_of(1), cond_of(2), 3.0)
    [result] = Engine(model).drive([Run(steps, guidance, SIGMAS, watch)])
    assert result is not None
    return result


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def of_each_cell(query: Query) -> Answer:
    """A network without context: what it says of a cell depends on that cell alone."""
    x0 = query.x.tanh() / (1 + query.sigma)
    return Answer(x0, 0.5 * x0, x0 + 1)


# -- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(
    "size, tile, overlap",
    [(9, 8, 0), (16, 8, 0), (16, 8, 4), (17, 8, 7), (30, 8, 2), (8, 8, 4), (5, 8, 4), (96, 64, 32)],
)
def test_tiles_cover_every_cell_with_weights_that_sum_to_1(size: int, tile: int, overlap: int, ring: bool) -> None:
    spans = _spans(size, tile, overlap, ring, CPU)
    total = torch.zeros(size, dtype=torch.float64)
    for span in spans:
        assert span.cells.tolist() == [(span.start + index) % size for index in range(min(size, tile))]
        assert 0 <= span.start < size
        assert (span.weight > 0).all()
        total[span.cells] += span.weight
    torch.testing.assert_close(total, torch.ones(size, dtype=torch.float64), atol=1e-6, rtol=0)
    ends = [set(span.cells.tolist()) for span in spans]
    for one, other in pairwise([*ends, *ends[:1]] if ring and len(ends) > 1 else ends):
        assert len(one & other) >= overlap
    room = size + (overlap if ring else 0)
    assert len(spans) == 1 if size <= tile else (len(spans) - 1) * (tile - overlap) + overlap < room


@pytest.mark.parametrize("size, tile, overlap", [(30, 8, 2), (17, 8, 4), (96, 64, 16), (100, 32, 8)])
def test_places_and_weights_are_those_of_the_tiled_autoencoder(size: int, tile: int, overlap: int) -> None:
    """Two layers that may not know one another hold the same geometry."""
    spans = _spans(size, tile, overlap, False, CPU)
    places = tiling.starts(size, tile, overlap)
    assert [span.start for span in spans] == places
    for span, weight in zip(spans, tiling.ramps(places, tile, 1, CPU), strict=True):
        torch.testing.assert_close(span.weight, weight)


def test_weights_fall_smoothly() -> None:
    """No step larger than the greatest slope of 3 x^2 - 2 x^3 over the overlap, 1.5 / 8."""
    weights = [span.weight for span in _spans(40, 16, 8, True, CPU)]
    assert len(weights) == 5
    for weight in weights:
        assert float(weight.diff().abs().max()) <= 1.5 / 8 + 1e-3
        assert float(weight[[0, -1]].max()) < 0.02  # on a ring every tile fades at both ends
    first = _spans(40, 16, 8, False, CPU)[0].weight
    assert torch.equal(first[:8], torch.ones(8))


def test_crop_goes_round_the_edges() -> None:
    x = randn(2, 3, 5, 7)
    assert torch.equal(crop(x, (1, 2, 3, 4)), x[:, :, 1:4, 2:6])
    assert torch.equal(crop(x[0], (4, 6, 2, 3)), x[0].roll((-4, -6), (1, 2))[:, :2, :3])


# -- the wrapper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "heun", "lms", "plms", "ddim"])
@pytest.mark.parametrize("seamless", [(False, False), (True, False), (True, True)])
def test_without_context_tiles_change_nothing(sampler: str, seamless: tuple[bool, bool]) -> None:
    whole = drive(steps_of(sampler, 13, 22, 2), of_each_cell)
    windows: list[tuple[int, int, int, int] | None] = []

    def denoise(query: Query) -> Answer:
        windows.append(query.window)
        assert query.x.shape == (2, 4, 8, 8)
        return of_each_cell(query)

    found = drive(tiled(steps_of(sampler, 13, 22, 2), 8, 3, seamless), denoise)
    assert apart(found, whole) < 1e-5
    assert len(set(windows)) == (3 if seamless[1] else 2) * (5 if seamless[0] else 4)


def test_all_parts_of_an_answer_are_blended() -> None:
    def ask_once() -> Steps:
        query = Query(randn(1, 4, 12, 20), 2.0)
        answer = yield query
        expected = of_each_cell(query)
        for name in ("x0", "uncond", "cond"):
            torch.testing.assert_close(getattr(answer, name), getattr(expected, name))
        bare = yield query
        assert bare.uncond is None and bare.cond is None
        return bare.x0

    asked: list[Query] = []

    def denoise(query: Query) -> Answer:
        asked.append(query)
        return of_each_cell(query) if len(asked) <= 6 else Answer(of_each_cell(query).x0)

    assert drive(tiled(ask_once(), 8, 2), denoise).shape == (1, 4, 12, 20)
    assert [query.window for query in asked[:6]] == [(top, left, 8, 8) for top in (0, 4) for left in (0, 6, 12)]
    assert {query.sigma for query in asked} == {2.0}
    assert {query.cut for query in asked} == {(True, True)}
    assert len(asked) == 12


@pytest.mark.parametrize("height, width", [(8, 8), (4, 8), (6, 2)])
def test_what_fits_into_a_tile_passes_as_it_is(model: Model, height: int, width: int) -> None:
    seen: list[Query] = []
    whole = latents(model, steps_of("dpmpp_2m", height, width))
    found = latents(model, tiled(steps_of("dpmpp_2m", height, width), 8, 4), watch=lambda query, _: seen.append(query))
    assert torch.equal(found, whole)
    assert [query.window for query in seen] == [None] * 5


def test_closing_the_wrapper_closes_the_sampler() -> None:
    inner = steps_of("euler", 8, 20)
    outer = tiled(inner, 8, 2)
    query = next(outer)
    outer.send(of_each_cell(query))
    assert inner.gi_frame is not None
    outer.close()
    assert inner.gi_frame is None


def test_an_error_of_the_sampler_comes_through() -> None:
    def failing() -> Steps:
        yield Query(torch.zeros(1, 4, 8, 20), 1.0)
        raise ValueError("sigma=1: the sampler gives up")

    with pytest.raises(ValueError, match="gives up"):
        drive(tiled(failing(), 8, 2), of_each_cell)


@pytest.mark.parametrize("tile, overlap, message", [(1, 0, "tile=1"), (8, 8, "overlap=8"), (8, -1, "overlap=-1")])
def test_sizes_out_of_range_are_named(tile: int, overlap: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiled(steps_of("euler", 8, 20), tile, overlap)


# -- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m"])
def test_a_network_call_is_no_larger_than_a_tile(model: Model, sampler: str) -> None:
    """Rows and cells of the fullest call are those of a picture of one tile."""
    shapes: list[tuple[int, ...]] = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    try:
        latents(model, tiled(steps_of(sampler, 12, 20, 2), 8, 4))
        tiles = list(shapes)
        shapes.clear()
        latents(model, steps_of(sampler, 8, 8, 2))
    finally:
        hook.remove()
    assert set(tiles) == set(shapes) == {(4, 4, 8, 8)}  # two pictures, each with its negative
    assert len(tiles) == len(shapes) * 2 * 4


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m", "heun"])
def test_tiles_are_close_to_the_whole(model: Model, sampler: str) -> None:
    """A small network sees nearly the same in a tile; a picture that is put together wrongly is far away."""
    whole = latents(model, steps_of(sampler, 24, 40))
    found = latents(model, tiled(steps_of(sampler, 24, 40), 16, 8))

    def off(x: Tensor) -> float:
        return float((x - whole).std() / whole.std())

    assert 0 < off(found) < 0.1
    assert off(found.roll(1, 3)) > 0.5  # a tile put one cell aside


@pytest.mark.parametrize(
    "options", [Options(3.0, sag=0.75), Options(3.0, pag=2.0), Options(4.0, rescale=0.7), Options(4.0, percentile=0.9)]
)
def test_every_plan_works_on_a_tile(model: Model, options: Options) -> None:
    guidance, bare = (plan(cond_of(1), cond_of(2), these, "eps") for these in (options, Options(options.scale)))
    found = latents(model, tiled(steps_of("euler", 12, 20), 8, 4), guidance)
    assert found.shape == (1, 4, 12, 20)
    assert found.isfinite().all()
    assert apart(found, latents(model, tiled(steps_of("euler", 12, 20), 8, 4), bare)) > 1e-3
    one = latents(model, steps_of("euler", 8, 8), guidance)
    assert torch.equal(latents(model, tiled(steps_of("euler", 8, 8), 8, 4), guidance), one)


@pytest.fixture(scope="module")
def inpainting(tiny_family: Family, model: Model) -> Model:
    """A model whose U-Net sees five channels beside x."""
    family = replace(tiny_family, unet=replace(tiny_family.unet, in_channels=9), concat="inpaint")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = randomise(build(family)["unet"])
    return replace(model, family=family, unet=unet)


@pytest.mark.parametrize("seamless", [(False, False), (True, True)])
def test_concat_is_cropped_to_the_tile(inpainting: Model, seamless: tuple[bool, bool]) -> None:
    """What the network sees beside x in a tile is what the whole picture has there."""
    height, width = 12, 20
    places = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    concat = torch.cat([places.expand(1, 5, -1, -1), 1000 + places.expand(1, 5, -1, -1)])  # two pictures'
    inputs: list[Tensor] = []
    hook = inpainting.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0][:, 4:].clone()))
    windows: list[tuple[int, int, int, int] | None] = []
    try:
        latents(
            inpainting,
            tiled(steps_of("euler", height, width, 2), 8, 4, seamless),
            ClassifierFree(cond_of(1, concat), None, 1.0),
            watch=lambda query, _: windows.append(query.window),
        )
    finally:
        hook.remove()
    assert len(inputs) == len(windows) == (5 * 15 if seamless[0] else 5 * 8)
    for seen, window in zip(inputs, windows, strict=True):
        assert window is not None
        top, left, rows, columns = window
        assert torch.equal(seen, concat.roll((-top, -left), (2, 3))[..., :rows, :columns])


def test_a_tile_does_not_meet_itself(model: Model) -> None:
    """The rows of a tile are seamless in the directions that it spans, and in no other."""
    state, states = NetState(seamless=(True, True)), []
    guidance = ClassifierFree(replace(cond_of(1), state=state), None, 1.0)
    hook = model.unet.register_forward_pre_hook(lambda module, args: states.append(args[4]))
    try:
        latents(model, tiled(steps_of("euler", 8, 20), 8, 4, (True, True)), guidance)
        latents(model, steps_of("euler", 8, 20), guidance)
    finally:
        hook.remove()
    assert states == [NetState(seamless=(False, True))] * (5 * 5) + [state] * 5


def test_seamless_tiles_roll(model: Model) -> None:
    """A picture that rolls by a whole number of tiles gives the rolled picture: no edge is special."""

    def of(x: Tensor) -> Tensor:
        steps = tiled(SAMPLERS["dpmpp_2m"].run(x, SIGMAS, SeededNoise([0], (4, 8, 24))), 8, 2, (True, False))
        return latents(model, steps)

    x = SIGMAS[0] * randn(1, 4, 8, 24)
    assert len(_spans(24, 8, 2, True, CPU)) == 4
    assert apart(of(x.roll(6, 3)), of(x).roll(6, 3)) < 1e-4
    assert apart(of(x.roll(6, 3)), of(x)) > 0.1
