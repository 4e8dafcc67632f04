"""Models that inpaint, edit or see depth are trained, from one that draws from words: what U-Nets see beside x."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.main import main
from sfumato.families import FAMILIES, Model
from sfumato.images import from_uint8, load_png, to_uint8
from sfumato.tasks.canvas import Canvas
from sfumato.tasks.conditions import blank, concat_of
from sfumato.tasks.studio import Studio
from sfumato.train.conditions import Told, predicting
from sfumato.train.config import LoopConfig
from sfumato.train.data import LatentBatch, open_pictures
from sfumato.train.diffusion import DiffusionConfig, FramedBatch, Texts
from sfumato.train.seen import depths, edited, masked, random_mask, seeing, widened
from sfumato.train.tuning import tuned
from sfumato.train.views import Shown, latents_of
from sfumato.types import Job
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import load_safetensors
from tests.test_tuning import folder, train
from tests.tiny import TINIES, random_parts

__all__ = ["folder"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


def test_masks_are_of_all_kinds_and_come_back() -> None:
    rng = np.random.default_rng(0)
    masks = [random_mask(rng, 48, 64) for _ in range(400)]
    assert all(mask.shape == (48, 64) and mask.dtype == bool and mask.any() for mask in masks)
    shares = np.array([mask.mean() for mask in masks])
    assert 0.18 < (shares == 1).mean() < 0.32
    parts = shares[shares < 1]
    assert 0.1 < np.median(parts) < 0.5 and parts.min() < 0.05 and parts.max() > 0.6
    again = np.random.default_rng(0)
    assert all(np.array_equal(mask, random_mask(again, 48, 64)) for mask in masks[:20])
    assert random_mask(np.random.default_rng(3), 8, 8).any()


def test_families_become_the_published_ones() -> None:
    assert seeing(FAMILIES["sd1"], "inpaint") is FAMILIES["sd1-inpaint"]
    assert seeing(FAMILIES["xl"], "inpaint") is FAMILIES["xl-inpaint"]
    assert seeing(FAMILIES["box"], "inpaint").name == "box-inpaint"
    assert seeing(FAMILIES["sd1"], "edit") is FAMILIES["sd1-edit"]
    made = seeing(FAMILIES["sd2-base"], "depth")
    assert replace(made, name="sd2-depth") == FAMILIES["sd2-depth"]
    assert seeing(FAMILIES["sd2"], "depth").name == "sd2-v-depth", "the published one predicts noise"
    with pytest.raises(ValueError, match="sd2-depth's U-Net sees more than a text already"):
        seeing(FAMILIES["sd2-depth"], "inpaint")


@torch.inference_mode()
def test_a_widened_model_answers_as_before_whatever_it_sees(model: Model) -> None:
    wide = widened(model, "inpaint")
    generator = torch.Generator().manual_seed(0)
    x, beside = (torch.randn(2, channels, 4, 4, generator=generator) for channels in (4, 5))
    context = torch.randn(2, 77, model.family.unet.context_dim, generator=generator)
    t = torch.tensor([3, 700])
    before, after = model.unet(x, t, context), wide.unet(torch.cat([x, beside], 1), t, context)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert model.family.concat is None and wide.family.concat == "inpaint"


@torch.inference_mode()
def test_training_shows_what_drawing_shows(model: Model) -> None:
    wide = widened(model, "inpaint")
    grey, whole = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    torch.testing.assert_close(masked(wide, grey, whole), blank(wide, (16, 16)))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(masked(wide, image, whole), blank(wide, (16, 16)))  # nothing shines through
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:6, 3:6] = 1
    seen = masked(wide, image, mask)
    assert seen.shape == (1, 5, 8, 8)
    assert seen[0, 0].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]], "a cell is hidden where any pixel is"
    pixels = to_uint8(image)[0]
    canvas = Canvas(pixels, mask[0, 0].numpy(), lambda drawn: drawn)
    drawn = concat_of(canvas, Job("x", width=16, height=16), Studio(wide), None)
    assert drawn is not None
    torch.testing.assert_close(masked(wide, from_uint8(pixels[None]), mask), drawn)


def test_masks_change_from_pass_to_pass_and_a_resumed_run_sees_the_same(model: Model, folder: Path) -> None:
    wide, shown = widened(model, "inpaint"), Shown(16)
    config = LoopConfig(4, batch_size=2)

    def examples():  # type: ignore[no-untyped-def]
        return latents_of(wide, open_pictures(folder), shown, config)

    one, other = examples(), examples()
    assert not one.keeps
    first, again = one.batch([0, 1]), other.batch([0, 1])
    assert first.beside is not None and torch.equal(first.beside, again.beside)
    later = one.batch([len(one), len(one) + 1])  # the same pictures, a pass later
    assert torch.equal(first.mean, later.mean) and not torch.equal(first.beside, later.beside)
    bare = LatentBatch(first.mean, first.std, first.captions)
    objective = tuned(wide, DiffusionConfig(), train_text=False)
    with pytest.raises(ValueError, match="U-Net sees more than a text, these latents come without"):
        objective.loss(bare, torch.Generator())


def test_a_model_learns_to_inpaint_goes_on_and_paints(tiny_checkpoint, folder, tmp_path, capsys) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--lr", "2e-3", "--warmup", "1", "--batch", "4", "--ema-decay", "0.9", "--into", "inpaint"]
    watched = ["--prompt", "a red wall", "--sample-every", "100"]
    assert train(tiny_checkpoint, "diffusion", folder, run, "--steps", "60", *flags, *watched) == 0
    assert train(tiny_checkpoint, "diffusion", folder, run, "--steps", "160", *flags, *watched) == 0
    assert train(tiny_checkpoint, "diffusion", folder, whole, "--steps", "160", *flags) == 0
    names = [run / "model.safetensors", whole / "model.safetensors"]
    one, other = (load_model(path).unet.state_dict() for path in names)
    assert all(torch.equal(one[name], other[name]) for name in one)
    wide = load_model(names[0])
    assert wide.family.concat == "inpaint" and wide.family.name == "tiny-inpaint"
    assert one["input_blocks.0.0.weight"][:, 4:].abs().max() > 0, "the new channels were learned"

    half, whole_mask = torch.zeros(10, 1, 16, 16), torch.ones(10, 1, 16, 16)
    half[..., 8:] = 1
    at_first = error_of(widened(load_model(tiny_checkpoint), "inpaint"), folder, half)
    assert error_of(wide, folder, half) < error_of(wide, folder, whole_mask) < at_first, (
        "what is left of a picture helps"
    )

    picture = Image.fromarray(np.full((16, 16, 3), (220, 30, 30), np.uint8))
    picture.save(tmp_path / "in.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    capsys.readouterr()
    paint = ["inpaint", "--ckpt", str(names[0]), "--prompt", "a red wall", "--image", str(tmp_path / "in.png")]
    assert main([*paint, "--mask", str(tmp_path / "mask.png"), "--outdir", str(tmp_path / "out")]) == 0
    load_png(next((tmp_path / "out").rglob("*.png")))


def error_of(model: Model, folder: Path, masks: torch.Tensor) -> float:
    """Of ten pictures under these masks, without captions, with the same noise whatever the model."""
    examples = latents_of(model, open_pictures(folder), Shown(16), LoopConfig(4, batch_size=10))
    objective = tuned(model, DiffusionConfig(caption_drop_prob=1.0), train_text=False)
    batch, images = examples.batch(list(range(10))), examples.pictures.batch(list(range(10))).pixels
    given = replace(batch, beside=masked(model, images, masks))
    with torch.no_grad():
        return float(np.mean([float(objective.loss(given, seeded(seed))[0]) for seed in range(24)]))


@torch.inference_mode()
def test_what_is_edited_and_depth_are_shown_as_where_pictures_are_drawn(model: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels, ramp = (
        rng.integers(0, 256, (16, 16, 3), np.uint8),
        np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 9, 16, 1),
    )
    canvas = Canvas(pixels, None, lambda drawn: drawn)
    editing, deep = widened(model, "edit"), widened(model, "depth")
    drawn = concat_of(canvas, Job("x", width=16, height=16), Studio(editing), None)
    torch.testing.assert_close(edited(editing, from_uint8(pixels[None])), drawn)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    drawn = concat_of(canvas, Job("x", width=16, height=16, depth=str(tmp_path / "depth.png")), Studio(deep), None)
    maps = torch.from_numpy(ramp)[None, None].expand(1, 3, 16, 16).float()
    torch.testing.assert_close(depths(deep, maps), drawn, rtol=1e-4, atol=1e-4)
    flat = depths(deep, torch.cat([torch.full((1, 3, 16, 16), 7.0), maps]))
    assert not flat[0].any() and torch.equal(flat[1:], depths(deep, maps)), "a cut may be all sky"


@pytest.mark.parametrize("kind", ["edit", "depth"])
def test_a_model_learns_from_pictures_beside(kind, tiny_checkpoint, folder, tmp_path, capsys) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    for path in folder.glob("*.png"):
        if path.name != "03.png":
            with Image.open(path) as image:
                pixels = np.asarray(image)[::-1].copy()
                pixels[: len(pixels) // 2] //= 2
                Image.fromarray(pixels).save(beside / path.name)
    (folder / "03.png").unlink()
    run, flags = tmp_path / "run", ["--steps", "4", "--batch", "2", "--lr", "1e-3", "--warmup", "0", "--into", kind]
    assert train(tiny_checkpoint, "diffusion", folder, run, *flags) == 2
    assert "seen=None" in capsys.readouterr().err
    assert train(tiny_checkpoint, "diffusion", folder, run, *flags, "--seen", str(beside)) == 0
    made = load_model(run / "model.safetensors")
    assert made.family.name == f"tiny-{kind}"
    assert made.unet.state_dict()["input_blocks.0.0.weight"][:, 4:].abs().max() > 0
    assert train(tiny_checkpoint, "diffusion", folder, tmp_path / "r", *flags[:-2], "--seen", str(beside)) == 2
    assert "U-Net sees no other pictures" in capsys.readouterr().err
    assert (
        train(tiny_checkpoint, "diffusion", folder, tmp_path / "r", *flags, "--prompt", "x", "--seen", str(beside)) == 2
    )
    assert "draws from pictures, so nothing is drawn on the way" in capsys.readouterr().err


def test_captions_and_pictures_are_dropped_alone_and_together(model: Model) -> None:
    editing = widened(model, "edit")
    objective = tuned(editing, DiffusionConfig(caption_drop_prob=0.1, beside_drop_prob=0.1), train_text=False)
    told: list[Told] = []
    objective.denoiser.loss = lambda x0, noise, t, given, *more: told.append(given) or x0.mean((1, 2, 3))  # type: ignore[method-assign,assignment,func-returns-value]
    empty = objective.context([""])
    assert isinstance(empty, Texts)
    count = 400
    batch = FramedBatch(
        torch.zeros(count, 4, 2, 2), torch.zeros(count, 4, 2, 2), ["a"] * count, beside=torch.ones(count, 4, 2, 2)
    )
    for seed in range(5):
        objective.loss(batch, seeded(seed))
    bare = torch.cat([(each.context == empty.context).flatten(1).all(1) for each in told])
    blind = torch.cat([(each.beside == 0).flatten(1).all(1) for each in told if each.beside is not None])
    shares = [float(x.float().mean()) for x in (bare & ~blind, blind & ~bare, bare & blind)]
    assert all(0.03 < share < 0.07 for share in shares), shares


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_predictions_see_what_is_beside(model: Model) -> None:
    wide = widened(model, "inpaint")
    torch.nn.init.normal_(wide.unet.input_blocks[0][0].weight)  # type: ignore[union-attr]
    predict = predicting(wide)
    x, context = torch.randn(1, 4, 4, 4), torch.randn(1, 77, wide.family.unet.context_dim)
    t = torch.tensor([10])
    with torch.inference_mode():
        one, other = (predict(x, t, Told(context, beside=torch.full((1, 5, 4, 4), value))) for value in (0.0, 1.0))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("what", ["diffusion", "lora"])
def test_what_sees_something_else_is_refused_in_a_line(what, tmp_path, folder, capsys) -> None:
    family = TINIES["sd2-depth"]
    save_checkpoint(tmp_path / "d.safetensors", family, random_parts(family), torch.float32)
    more = ["--into", "inpaint"] if what == "diffusion" else []
    assert train(tmp_path / "d.safetensors", what, folder, tmp_path / "run", "--steps", "1", *more) == 2
    assert "U-Net sees more than a text" in capsys.readouterr().err


def test_a_lora_of_an_inpainting_model(tmp_path, folder, capsys) -> None:
    family = TINIES["sd1-inpaint"]
    save_checkpoint(tmp_path / "i.safetensors", family, random_parts(family), torch.float32)
    flags = ["--steps", "2", "--caption", "x", "--size", "64"]
    assert train(tmp_path / "i.safetensors", "lora", folder, tmp_path / "run", *flags) == 0
    result = capsys.readouterr().out.strip().splitlines()[-1]
    assert any(value.abs().max() > 0 for name, value in load_safetensors(Path(result))[0].items() if "up" in name)
