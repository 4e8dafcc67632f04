"""`sfumato train controlnet` at tiny size: it learns, stops, goes on and steers; diffusers reads what it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.main import main
from sfumato.families import Model
from sfumato.images import load_png
from sfumato.images.annotate import annotate
from sfumato.models.controlnet import ControlNet
from sfumato.train import personal
from sfumato.train.conditions import Told
from sfumato.train.data import open_pictures
from sfumato.train.diffusion import DiffusionConfig
from sfumato.train.loop import LoopConfig
from sfumato.train.personal import Ready, Setup
from sfumato.train.views import Captioned, Hints, Shown, Views
from sfumato.weights.controls import load_control, save_control
from tests.adapters import checkpoint_of, inputs, model_of, same_bits, unet_output, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoopConfig(steps=8, batch_size=2, lr=3e-3, warmup=1, ema_decay=0.5, weight_decay=0.0, checkpoint_every=30)


def grey(pixels: np.ndarray) -> np.ndarray:
    return annotate(pixels, "grey")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of two halves, one of them in a folder of its own, with captions."""
    place = tmp_path_factory.mktemp("data") / "halves"
    (place / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.normal(60, 4, (64, 80, 3))
        pixels[:, 12 * (index + 1) :] = rng.normal(200, 4, (64, 80 - 12 * (index + 1), 3))
        path = place / ("more" if index == 5 else ".") / f"{index}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text("two halves", encoding="utf-8")
    return place


def setup(model: Model, folder: Path, run: Path, **changes: object) -> Setup:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return Setup(model, open_pictures(folder), Shown(64), config, DiffusionConfig(), run, "halves")


def probe(ready: Ready, seeds: int = 6) -> float:
    """The mean loss over a fixed choice of pictures, noise and timesteps."""
    batch = ready.examples.batch(ready.examples.indices_at(0))
    with torch.no_grad():
        found = [ready.objective.loss(batch, torch.Generator().manual_seed(s))[0].item() for s in range(seeds)]
    return sum(found) / len(found)


def train(kind: str, folder: Path, run: Path, *flags: str) -> int:
    place = ["--ckpt", str(checkpoint_of(kind)), "--data", str(folder), "--out", str(run), "--sample-steps", "2"]
    return main(["train", "controlnet", *place, "--warmup", "1", "--ema-decay", "0.5", "--batch", "2", *flags])


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_it_learns_and_the_model_stays(kind, folder, tmp_path):
    model = model_of(kind)
    before = weights_of(model)
    given = setup(model, folder, tmp_path / "run", steps=8 if kind == "sd1" else 3)
    ready = personal.controlnet(given, grey, "grey")
    first = probe(ready)
    plain = personal.lora(given, personal.LoRAConfig(rank=1)) if kind == "sd1" else None
    if plain is not None:  # a model without anything learned on it answers the same
        assert probe(plain) == pytest.approx(first, rel=1e-5), "it begins as no control at all"
        plain.objective.detach()  # type: ignore[attr-defined]
    path = personal.run(ready, given)
    assert probe(ready) < 0.98 * first
    assert same_bits(weights_of(model), before)
    network = load_control(path, model)
    whole = dict(network.state_dict())
    assert all(whole[name].any() for name in whole if name.startswith(("zero_convs", "middle_block_out"))), "ways out"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_diffusers_reads_it(kind, folder, tmp_path):
    from diffusers import ControlNetModel

    model = model_of(kind)
    with torch.enable_grad():
        given = setup(model, folder, tmp_path / "run", steps=2)
        path = personal.run(personal.controlnet(given, grey, "grey"), given)
    network = load_control(path, model)
    save_control(tmp_path / "theirs", network)
    more = {"addition_time_embed_dim": model.family.size_dim} if kind == "xl" else {}
    theirs = ControlNetModel.from_pretrained(tmp_path / "theirs", **more).eval()
    seen, vector, added = inputs(model.family), None, {}
    if kind == "xl":
        added = {"added_cond_kwargs": {"text_embeds": seen["pooled"], "time_ids": seen["numbers"]}}
        from sfumato.models.layers import timestep_embedding

        sizes = timestep_embedding(seen["numbers"].flatten().float(), model.family.size_dim).reshape(2, -1)
        vector = torch.cat([seen["pooled"], sizes], dim=1)
    hint = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    down, middle = theirs(seen["x"], seen["t"], seen["context"], hint, return_dict=False, **added)
    ours = network(seen["x"], seen["t"], seen["context"], vector, hint)
    assert max(residual.abs().max() for residual in ours.skips) > 1e-3
    torch.testing.assert_close(ours.middle, middle, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours.skips, down, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_it_stops_goes_on_and_steers(folder, tmp_path, caplog):
    run, whole = tmp_path / "half" / "halves", tmp_path / "whole" / "halves"
    flags = ["--annotate", "grey", "--lr", "1e-2", "--hint-drop", "0.3", "--gradient-checkpointing"]
    watched = ["--prompt", "two halves", "--sample-every", "2"]
    with caplog.at_level("INFO"):
        assert train("sd1", folder, run, "--steps", "2", *flags, *watched) == 0
    assert "for 2 steps" in caplog.text
    sheets = [np.asarray(Image.open(run / f"samples-00000{step}.png")) for step in (0, 2)]
    assert not np.array_equal(*sheets), "drawn with the control"
    assert train("sd1", folder, run, "--steps", "4", *flags) == 0
    assert train("sd1", folder, whole, "--steps", "4", *flags) == 0
    assert (run / "halves.safetensors").read_bytes() == (whole / "halves.safetensors").read_bytes()
    drawn = []
    for name, more in (("a", []), ("b", ["--control", f"halves,image={folder / '0.png'},annotate=grey"])):
        place = ["--ckpt", str(checkpoint_of("sd1")), "--adapters", str(run), "--outdir", str(tmp_path / name)]
        size = ["--W", "64", "--H", "64", "--steps", "2", "--n_samples", "1", "--n_iter", "1", "--skip_grid"]
        assert main(["txt2img", *place, *size, "--prompt", "x", *more]) == 0
        drawn.append(load_png(tmp_path / name / "samples" / "00000.png")[0])
    assert not np.array_equal(*drawn)


def test_hints_are_cut_as_their_pictures_are(folder, tmp_path):
    """Of inverted copies: where the cut is another, the sum is not white."""
    for path in folder.rglob("*.png"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    pictures = open_pictures(folder)
    for shown in (Shown(64), Shown(48, crop="random", flip=True), Shown(64, [(64, 64), (80, 64)])):
        batches = shown.batches(pictures, CONFIG)
        views = Views(batches, Hints(tmp_path, pictures))
        for step in range(6):
            seen = views.batch(batches.indices_at(step))
            assert seen.hints is not None and seen.hints.dtype == torch.uint8
            shown_again = ((seen.pixels + 1) * 127.5).round()
            assert (shown_again + seen.hints.float() - 255).abs().max() <= 1


def test_hints_are_those_of_the_annotator_and_dropped_ones_black(folder, tmp_path):
    given = setup(model_of("sd1"), folder, tmp_path)
    ready = personal.controlnet(given, grey, "grey", hint_drop_prob=0.5)
    batch = ready.examples.batch(ready.examples.indices_at(0) * 8)
    pixels = given.shown.batches(given.pictures, CONFIG).batch(ready.examples.indices_at(0)).pixels
    first = ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert batch.hints is not None and np.array_equal(batch.hints[0].permute(1, 2, 0).numpy(), grey(first))
    seen: list[torch.Tensor] = []
    inner = ready.objective._inner  # type: ignore[attr-defined]
    tell = inner.tell

    def listening(*given: object) -> Told:
        told: Told = tell(*given)
        assert told.hint is not None
        seen.append(told.hint)
        return told

    inner.tell = listening
    with torch.no_grad():
        ready.objective.loss(batch, torch.Generator().manual_seed(0))
    black = [not hint.any() for hint in seen[0]]
    assert 3 <= sum(black) <= 13 and seen[0].max() <= 1
    kept = batch.hints.float()[[not each for each in black]] / 255
    assert torch.equal(seen[0][[not each for each in black]], kept)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "hints: one of --annotate NAME and --hints DIR"),
        (["--annotate", "grey", "--hints", "x"], "hints: one of --annotate NAME and --hints DIR"),
        (["--hints", "nowhere"], "hints='nowhere': no such folder"),
        (["--hints", "{empty}"], "none for 6 of 6 pictures, first '0'"),
        (["--annotate", "depth"], "annotate='depth': make the hints with `sfumato annotate` first"),
        (["--annotate", "grey", "--hint-drop", "1"], "hint_drop_prob=1.0"),
        (["--annotate", "grey", "--batch", "7"], "batch_size=7: the set has only 6"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(folder, tmp_path, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    flags = [flag.format(empty=tmp_path / "empty") for flag in flags]
    assert train("sd1", folder, tmp_path / "run", "--steps", "2", *flags) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert words in line
    assert not list((tmp_path / "run").glob("*"))


def test_a_hint_of_another_shape(folder, tmp_path):
    for path in folder.rglob("*.png"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(target)
    pictures = open_pictures(folder)
    with pytest.raises(ValueError, match="64 x 64 px, its picture is 80 x 64"):
        Views(Shown(64).batches(pictures, CONFIG), Hints(tmp_path, pictures)).batch([0])


def test_one_caption_for_all_and_what_sees_more(folder, tmp_path, capsys):
    model = model_of("sd1")
    given = replace(setup(model, folder, tmp_path), pictures=Captioned(open_pictures(folder), "x"))
    ready = personal.controlnet(given, grey, "grey")
    assert ready.examples.batch([0, 1]).captions == ["x", "x"]
    assert isinstance(ready.objective.network, ControlNet) and unet_output(model).isfinite().all()
    assert train("sd1-inpaint", folder, tmp_path / "i", "--steps", "1", "--annotate", "grey") == 2
    assert "sees more than a text" in capsys.readouterr().err
