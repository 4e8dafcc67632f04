"""`sfumato train`: a checkpoint goes on with a person's own pictures, stops, goes on, and is drawn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.main import main
from sfumato.images import load_png
from sfumato.pipeline import Pipeline
from sfumato.train.logs import read_log
from sfumato.train.perceptual import VGG16Features
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import open_tensors, save_safetensors
from tests.tiny import TINIES, random_parts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A captioned folder: red and blue pictures of several shapes, one of them broken."""
    place = tmp_path / "set"
    place.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        colour = np.array([220, 30, 30] if index % 2 else [30, 30, 220])
        pixels = (colour + rng.normal(0, 8, (16 + 4 * (index % 3), 20, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{index:02}.png")
        (place / f"{index:02}.txt").write_text("a red wall" if index % 2 else "a blue wall", encoding="utf-8")
    (place / "03.png").write_bytes(b"not a picture")
    return place


def train(ckpt: Path, what: str, folder: Path, run: Path, *flags: str) -> int:
    return main(["train", what, "--ckpt", str(ckpt), "--data", str(folder), "--out", str(run), *flags])


def losses(run: Path, figure: str = "loss") -> list[float]:
    return [json.loads(line)[figure] for line in (run / "log.jsonl").read_text().splitlines()]


def test_diffusion_learns_stops_goes_on_and_draws(tiny_checkpoint, folder, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--lr", "2e-3", "--warmup", "1", "--batch", "4", "--ema-decay", "0.5", "--crop", "random", "--flip"]
    watched = ["--prompt", "a red wall", "--sample-every", "20"]
    assert train(tiny_checkpoint, "diffusion", folder, run, "--steps", "20", *flags, *watched) == 0
    assert capsys.readouterr().out.strip() == str(run / "model.safetensors")
    assert sorted(path.name for path in run.glob("samples-*.png")) == ["samples-000000.png", "samples-000020.png"]
    assert train(tiny_checkpoint, "diffusion", folder, run, "--steps", "40", *flags, *watched) == 0
    assert train(tiny_checkpoint, "diffusion", folder, whole, "--steps", "40", *flags, *watched) == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), "as if never stopped"
    assert len(losses(run)) == 2, "a line every 20 steps, of both halves"
    before, after = (Pipeline.from_pretrained(path) for path in (tiny_checkpoint, run / "model.safetensors"))
    assert after.model.family == before.model.family
    same = [
        torch.equal(a, b) for a, b in zip(before.model.unet.parameters(), after.model.unet.parameters(), strict=True)
    ]
    assert not any(same[:4])
    for name in ("autoencoder", "text"):
        kept = zip(before.model.networks[name].parameters(), after.model.networks[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in kept), "what is not trained stays"
    assert main(["txt2img", "--ckpt", str(run / "model.safetensors"), "--prompt", "x", "--outdir", str(tmp_path)]) == 0
    load_png(tmp_path / "samples" / "00000.png")
    assert main(["train", "status", str(run)]) == 0
    assert "40" in capsys.readouterr().out


def test_shapes_and_the_text_encoder(tiny_checkpoint, folder, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", "3", "--batch", "2", "--buckets", "--train-text", "--min-snr", "5", "--offset-noise", "0.05"]
    assert train(tiny_checkpoint, "diffusion", folder, run, *flags, "--lr", "1e-2", "--warmup", "0") == 0
    before, after = (Pipeline.from_pretrained(path) for path in (tiny_checkpoint, run / "model.safetensors"))
    texts = zip(before.model.texts[0].parameters(), after.model.texts[0].parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in texts)


@pytest.mark.parametrize("kind", ["sd2", "xl", "xl-refiner", "xl-inpaint"])
def test_other_families_go_on_with_their_texts(kind, folder, tmp_path):
    family = TINIES[kind]
    begin, result = tmp_path / "begin.safetensors", tmp_path / "run" / "model.safetensors"
    save_checkpoint(begin, family, random_parts(family), torch.float32)
    flags = ["--steps", "2", "--batch", "2", "--lr", "1e-3", "--warmup", "0", "--size", "64", "--train-text"]
    assert train(begin, "diffusion", folder, tmp_path / "run", *flags) == 0
    before, after = load_model(begin), load_model(result)
    assert after.family.name == family.name
    for part in ("unet", *family.text_parts):
        pairs = zip(before.networks[part].parameters(), after.networks[part].parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs), part


def test_the_decoder_alone(tiny_checkpoint, folder, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", "40", "--batch", "4", "--lr", "5e-3", "--warmup", "1", "--decoder-only", "--random-crop", "8"]
    assert train(tiny_checkpoint, "autoencoder", folder, run, *flags) == 0
    first, last = losses(run, "l1")
    assert last < first
    before, after = (
        Pipeline.from_pretrained(path).model.autoencoder for path in (tiny_checkpoint, run / "model.safetensors")
    )
    pairs = list(zip(before.named_parameters(), after.parameters(), strict=True))
    assert all(torch.equal(a, b) for (name, a), b in pairs if name.startswith(("encoder", "quant_conv")))
    assert not all(torch.equal(a, b) for (name, a), b in pairs if name.startswith("decoder"))


def test_the_autoencoder_against_a_critic_and_by_how_pictures_look(tiny_checkpoint, folder, tmp_path):
    torch.manual_seed(0)
    trunk = VGG16Features().state_dict()
    heads = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate((64, 128, 256, 512, 512))}
    save_safetensors(tmp_path / "vgg16.safetensors", trunk, {})
    save_safetensors(tmp_path / "heads.safetensors", heads, {})
    looks = ["--lpips", str(tmp_path / "vgg16.safetensors"), str(tmp_path / "heads.safetensors")]
    flags = [
        "--steps",
        "20",
        "--batch",
        "2",
        "--lr",
        "3e-3",
        "--critic",
        "--critic-start",
        "10",
        "--lpips-weight",
        "0.5",
    ]
    run = tmp_path / "run"
    assert (
        train(tiny_checkpoint, "autoencoder", folder, run, *flags, *looks, "--equivariance", "0.2", "--size", "32") == 0
    )
    line = read_log(run)[-1]
    assert line["perceptual"] > 0 and line["critic_real"] > line["critic_fake"] and line["adaptive_weight"] > 0
    with open_tensors(run / "state.safetensors") as file:
        assert any(name.startswith("critic.optimizer.") for name in file.names())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--critic-weight", "1"], "critic_weight=1: it needs --critic"),
        (["--critic-start", "5"], "critic_start=5: it needs --critic"),
        (["--lpips-weight", "1"], "lpips_weight=1: it needs --lpips"),
        (["--lpips", "a", "b", "c"], "lpips: 3 files; one (a whole LPIPS) or two"),
        (["--lpips", "nowhere.pth"], "nowhere.pth"),
        (["--critic", "--random-crop", "8"], "critic: 16 px or more are needed; pictures or crops are 8"),
        (["--critic", "--equivariance", "0.5"], "critic: 16 px or more are needed; pictures or crops, shrunk by"),
        (["--equivariance", "2"], "equivariance=2.0: 0 to 1"),
        (["--critic", "--critic-weight", "-1"], "critic_weight=-1.0: 0 or more"),
    ],
)
def test_bad_flags_of_the_autoencoder_are_one_line(tiny_checkpoint, folder, tmp_path, capsys, flags, words):
    assert train(tiny_checkpoint, "autoencoder", folder, tmp_path / "run", "--steps", "2", *flags) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert words in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "data='nowhere': no such file or folder"),
        (["--size", "17"], "size=17: a multiple of 4"),
        (["--batch", "0"], "batch_size=0: 1 or more"),
        (["--lr", "0"], "lr=0.0: a number above 0"),
        (["--caption-drop", "2"], "caption_drop_prob=2"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(tiny_checkpoint, folder, tmp_path, capsys, flags, words):
    assert train(tiny_checkpoint, "diffusion", folder, tmp_path / "run", "--steps", "2", *flags) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert words in line
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_empty_set(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(tiny_checkpoint, "diffusion", tmp_path / "empty", tmp_path / "run", "--steps", "2") == 2
    assert "error: data=" in capsys.readouterr().err
