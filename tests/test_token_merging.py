"""Token merging: what is joined, that nothing is lost, where it works, whose seed it goes by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.engine import Engine
from sfumato.models.merging import Merging, destinations
from sfumato.models.transformer import Asked, CrossAttention, TransformerBlock
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipeline import Pipeline, recipe
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete, job_from_dict
from sfumato.types import Job
from sfumato.weights.checkpoint import Model, load_model

JOB = Job("a red apple", "a dog", sampler="euler", steps=4, guidance=3.0, seed=1, width=32, height=32)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drive(model: Model, *jobs: Job) -> list[Tensor]:
    return Engine(model).drive([txt2img.start(complete(job, model.family), model) for job in jobs])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 2)])
def test_one_destination_in_every_window(size: tuple[int, int]) -> None:
    found = destinations(size, generators(0, 1))
    assert found.shape == (2, (size[0] // 2) * (size[1] // 2))
    windows = (found // size[1] // 2) * (size[1] // 2) + found % size[1] // 2
    assert torch.equal(windows, torch.arange(found.shape[1]).expand(2, -1))
    many = destinations((2, 2), generators(*range(200)))
    assert [int((many == cell).sum()) > 20 for cell in range(4)] == [True] * 4


@pytest.mark.parametrize("size, ratio", [((8, 8), 0.5), ((8, 8), 0.75), ((5, 7), 0.4), ((4, 4), 0.01)])
def test_every_cell_is_somewhere(size: tuple[int, int], ratio: float) -> None:
    length = size[0] * size[1]
    z = torch.randn(3, length, 16)
    found = Merging(ratio, generators(0, 1, 2)).match(z, size)
    places = torch.cat([found.apart, found.kept, found.joined], dim=1)
    assert torch.equal(places.sort(dim=1).values, torch.arange(length).expand(3, -1))
    assert found.joined.shape[1] == min(int(ratio * length), length - found.kept.shape[1])
    assert found.merge(z).shape == (3, length - found.joined.shape[1], 16)


def test_joined_cells_are_the_nearest_and_their_mean_comes_back() -> None:
    """Against the definition, cell by cell."""
    z = torch.randn(1, 36, 8)
    found = Merging(0.5, generators(3)).match(z, (6, 6))
    likeness = torch.nn.functional.cosine_similarity(z[0][:, None], z[0][None], dim=2)
    kept = found.kept[0].tolist()
    sources = [cell for cell in range(36) if cell not in kept]
    best = {cell: max((float(likeness[cell, other]), -number) for number, other in enumerate(kept)) for cell in sources}
    wanted = sorted(sources, key=lambda cell: -best[cell][0])[:18]
    assert set(found.joined[0].tolist()) == set(wanted)
    into = dict(zip(found.joined[0].tolist(), found.into[0].tolist(), strict=True))
    assert all(-best[cell][1] == into[cell] for cell in wanted)
    back = found.spread(found.merge(z))[0]
    for number, cell in enumerate(kept):
        held = [cell, *(source for source in wanted if into[source] == number)]
        for each in held:
            assert torch.allclose(back[each], z[0, held].mean(dim=0), atol=1e-6)
    for cell in set(sources) - set(wanted):
        assert torch.equal(back[cell], z[0, cell])


def test_cells_that_are_alike_lose_nothing() -> None:
    """Attention over a map of four colours is the same with a half of it merged, where every kept cell counts alike."""
    torch.manual_seed(0)
    colours = torch.randn(4, 8)
    z = colours[torch.arange(64) % 2 + 2 * (torch.arange(64) // 8 % 2)][None]
    attention = CrossAttention(8, 8, 2)
    found = Merging(0.75, generators(1)).match(z, (8, 8))
    assert found.merge(z).shape[1] == 16
    merged = found.spread(found.merge(z))
    assert float((merged - z).abs().max()) > 0.1  # at 0.75 each window is one cell: this ratio does lose
    with torch.inference_mode():
        some = Merging(0.1, generators(1)).match(z, (8, 8))
        assert torch.allclose(some.spread(some.merge(z)), z, atol=1e-6)
        near = some.spread(attention(some.merge(z), some.merge(z)))
        assert 1e-6 < distance(near, attention(z, z)) < 0.2


@pytest.mark.parametrize("size", [(1, 8), (8, 1), (1, 1)])
def test_a_map_one_cell_high_or_wide_is_left_alone(size: tuple[int, int]) -> None:
    """It has no window of 2 x 2: a block answers as without merging, and merging itself says so."""
    merging = Merging(0.5, generators(0))
    block = TransformerBlock(8, 6, 2, False).requires_grad_(False)
    z, context = torch.randn(1, size[0] * size[1], 8), torch.randn(1, 3, 6)
    assert torch.equal(block(z, context, Asked(merging=merging), size), block(z, context))
    with pytest.raises(ValueError, match="2 x 2 cells or more"):
        merging.match(z, size)
    wide = torch.randn(1, 16, 8)
    assert not torch.allclose(block(wide, context, Asked(merging=merging), (2, 8)), block(wide, context))


@torch.inference_mode()
def test_a_strip_goes_through_a_network() -> None:
    """Latents two cells high are one high where a network first has attention."""
    shape = UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1), norm_groups=4)
    unet = UNet(replace(shape, context_dim=6, num_heads=2)).eval()
    x, t, context = torch.randn(1, 4, 2, 8), torch.tensor([3.0]), torch.randn(1, 3, 6)
    assert torch.equal(unet(x, t, context, merging=Merging(0.5, generators(0))), unet(x, t, context))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.8])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio="):
        Merging(ratio, [])


def test_a_ratio_of_0_changes_no_bit(model: Model) -> None:
    assert torch.equal(drive(model, replace(JOB, tome=0.0))[0], drive(model, JOB)[0])


def test_more_merging_is_further_from_the_exact_picture(model: Model) -> None:
    exact = drive(model, JOB)[0]
    found = [float((drive(model, replace(JOB, tome=ratio))[0] - exact).abs().mean()) for ratio in (0.02, 0.75)]
    assert 0 < 1.5 * found[0] < found[1] < float(exact.abs().mean()) / 4


def test_only_the_highest_resolution_is_merged(model: Model) -> None:
    """The first level's self-attention sees fewer cells; the second level's and the middle's all of theirs."""
    lengths: list[tuple[str, int]] = []
    hooks = [
        part.register_forward_pre_hook(lambda module, args, name=name: lengths.append((name, args[0].shape[1])))
        for name, part in model.unet.named_modules()
        if isinstance(part, CrossAttention) and name.endswith("attn1")
    ]
    drive(model, replace(JOB, tome=0.5, steps=1, guidance=1.0))
    for hook in hooks:
        hook.remove()
    fine = [length for name, length in lengths if name.startswith(("input_blocks.1.", "output_blocks.3."))]
    assert set(fine) == {128}  # of 16 x 16
    assert {length for name, length in lengths if name.startswith("middle")} == {64}


def test_together_is_alone_and_picture_i_is_its_own(model: Model) -> None:
    jobs = [replace(JOB, tome=0.5, count=2), replace(JOB, seed=4, tome=0.5, pag=2.0), replace(JOB, seed=9)]
    jobs.append(replace(JOB, seed=6, tome=0.5, reuse="2"))
    together = drive(model, *jobs)
    for job, one in zip(jobs, together, strict=True):
        assert distance(one, drive(model, job)[0]) < 1e-5
    [second] = drive(model, replace(JOB, tome=0.5, seed=2))
    assert distance(together[0][1:], second) < 1e-5


def test_the_seed_chooses_and_each_step_anew(model: Model) -> None:
    """With noise and prompt the same, another seed of merging gives another picture."""

    def drawn(seed: int) -> Tensor:
        run = txt2img.start(complete(replace(JOB, tome=0.5), model.family), model)
        run.seeds = [seed]
        return Engine(model).drive([run])[0]

    assert torch.equal(drawn(1), drive(model, replace(JOB, tome=0.5))[0])
    assert distance(drawn(2), drawn(1)) > 1e-4


def test_the_recipe_holds_it(model: Model) -> None:
    pipe = Pipeline(model)
    result = pipe.draw(replace(JOB, tome=0.3))
    told = recipe(result, 0)["job"]
    assert told["tome"] == 0.3
    assert np.array_equal(pipe.draw(job_from_dict(told)).images, result.images)


@pytest.mark.parametrize("value", [0.8, -0.1, None, "0.5"])
def test_what_is_refused(model: Model, value: object) -> None:
    with pytest.raises(ValueError, match="tome="):
        complete(replace(JOB, tome=value), model.family)
