"""From an empty folder to a picture by the command line alone, and what stands in the way told in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.main import main
from sfumato.evaluate.features import Clip, open_features
from sfumato.families import FAMILIES
from sfumato.images import load_png
from sfumato.train.beginning import TINY, family_to_begin, measured_scale
from sfumato.train.data import open_pictures
from sfumato.train.views import Shown
from sfumato.weights.checkpoint import load_model

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def train(*words):
    return main(["train", *map(str, words)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Plain colours of 32 px, a little noisy, by their names."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(16):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.array(COLOURS[name]) + rng.normal(0, 8, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {name} wall")
    return folder


def test_from_an_empty_folder_to_a_picture(pictures, tmp_path, capsys):
    begin, ae, clip, unet = tmp_path / "begin.safetensors", tmp_path / "ae", tmp_path / "clip", tmp_path / "unet"
    common = ["--data", pictures, "--device", "cpu", "--warmup", 1]
    assert train("new", "--config", "tiny", "--out", begin) == 0
    first = load_model(begin)
    assert first.family.unet == TINY.unet and first.family.latent_scale == 1.0

    flags = ["--steps", 30, "--batch", 4, "--lr", 3e-3, "--ema-decay", 0.8]
    assert train("autoencoder", "--ckpt", begin, "--out", ae, *common, *flags, "--measure-scale") == 0
    second = load_model(ae / "model.safetensors")
    scale = second.family.latent_scale
    assert scale != 1.0
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.glob("*.png"))])
    with torch.no_grad():
        posterior = second.autoencoder.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    deviation = (posterior.mean.double().var() + posterior.std.double().square().mean()).sqrt()
    assert scale == pytest.approx(1 / float(deviation), rel=1e-4)
    logged = [json.loads(line) for line in (ae / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == 20

    flags = ["--steps", 25, "--batch", 8, "--lr", 2e-3, "--ema-decay", 0.8]
    assert train("clip", "--ckpt", ae / "model.safetensors", "--out", clip, *common, *flags) == 0
    third = load_model(clip / "model.safetensors")
    assert third.family.latent_scale == scale
    same = {
        name: all(
            torch.equal(a, b) for a, b in zip(network.parameters(), third.networks[name].parameters(), strict=True)
        )
        for name, network in second.networks.items()
    }
    assert same == {"unet": True, "autoencoder": True, "text": False}
    towers = open_features(f"clip:{clip / 'clip.safetensors'}")
    assert isinstance(towers, Clip) and towers.size == 32
    images = towers(torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2).float() / 255)
    captions = [path.with_suffix(".txt").read_text() for path in sorted(pictures.glob("*.png"))[:4]]
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(towers.texts(captions)).T
    assert cosines.argmax(1).tolist() == [captions.index(caption) for caption in captions]  # it has learned them

    flags = ["--steps", 2, "--batch", 4, "--train-text", "--text-lr", 1e-6]
    assert train("diffusion", "--ckpt", clip / "model.safetensors", "--out", unet, *common, *flags) == 0
    words = ["txt2img", "--ckpt", unet / "model.safetensors", "--prompt", "a red wall", "--steps", 2]
    assert main([*map(str, words), "--outdir", str(tmp_path)]) == 0
    assert load_png(tmp_path / "samples" / "00000.png")[0].shape == (32, 32, 3)
    status = capsys.readouterr()
    assert train("status", clip) == 0 and "25" in capsys.readouterr().out and "error" not in status.err


def test_new_weights_are_the_seeds(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train("new", "--config", "tiny", "--seed", seed, "--out", tmp_path / f"{name}.safetensors") == 0
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_every_family_can_begin_and_a_strange_one_cannot(tmp_path, capsys):
    assert family_to_begin("sd1") is FAMILIES["sd1"] and family_to_begin("tiny") is TINY
    assert train("new", "--config", "sd9", "--out", tmp_path / "x.safetensors") == 2
    assert "config='sd9': one of tiny, sd1" in capsys.readouterr().err
    assert train("new", "--config", "tiny", "--out", tmp_path / "x.ckpt") == 2
    assert "the name of a .safetensors file" in capsys.readouterr().err
    (tmp_path / "y.safetensors").touch()
    assert train("new", "--config", "tiny", "--out", tmp_path / "y.safetensors") == 2
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["clip", "--buckets"], "buckets: CLIP takes squares"),
        (["clip", "--size", 36], "size=36: a multiple of 8"),
        (["autoencoder", "--decoder-only", "--measure-scale"], "measure_scale: with --decoder-only"),
        (["diffusion", "--text-lr", 1e-5], "text_lr=1e-05: text encoders are trained with --train-text"),
    ],
)
def test_bad_flags_are_one_line(pictures, tmp_path, capsys, words, message):
    begin = tmp_path / "begin.safetensors"
    assert train("new", "--config", "tiny", "--out", begin) == 0
    name, *flags = words
    common = ["--ckpt", begin, "--data", pictures, "--out", tmp_path / "run", "--steps", 1, "--batch", 2]
    assert train(name, *common, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1


def test_latents_of_nothing_have_no_scale(pictures, tmp_path):
    begin = tmp_path / "begin.safetensors"
    assert train("new", "--config", "tiny", "--out", begin) == 0
    model = load_model(begin)
    with torch.no_grad():
        for parameter in model.autoencoder.quant_conv.parameters():
            parameter.fill_(-1e9) if parameter.ndim == 1 else parameter.zero_()
    with pytest.raises(ValueError, match="latent_scale: the latents' deviation"):
        measured_scale(model, open_pictures(pictures), Shown(32))
