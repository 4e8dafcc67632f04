"""The trainer: the order of data, exact resume, checkpoints, EMA, and that each objective learns."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIP, CLIPConfig, CLIPVisionConfig
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.train import loop
from sfumato.train.autoencoder import AutoencoderObjective, initialise
from sfumato.train.clip import CLIPObjective
from sfumato.train.data import CachedLatents, CaptionedBatch, CaptionedShards, LatentBatch, indices_at
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, frozen
from sfumato.train.loop import LoopConfig, ema_weights, fit

from .conftest import TINY

CONFIG = LoopConfig(steps=6, batch_size=4, lr=1e-2, warmup=2, log_every=1, save_every=2)


class Latents:
    """Sixteen latents of two kinds, told apart by their captions."""

    captions = ["red", "blue"] * 8

    def __len__(self) -> int:
        return 16

    def batch(self, indices):
        mean = torch.stack([torch.full((4, 8, 8), 1.0 if index % 2 else -1.0) for index in indices])
        return LatentBatch(mean, torch.full_like(mean, 0.1), [self.captions[index] for index in indices])


def words(captions):
    """A stand-in for the text tower: one fixed random vector a caption."""
    return torch.stack([torch.randn(3, 16, generator=torch.Generator().manual_seed(len(c))) for c in captions])


def diffusion(drop: float = 0.1) -> DiffusionObjective:
    torch.manual_seed(0)
    network = UNet(TINY.unet)
    denoiser = Denoiser(lambda x, t, c: network(x, t, c), NoiseSchedule(TINY.schedule), "v")
    return DiffusionObjective(network, denoiser, words, 0.7, DiffusionConfig(caption_drop_prob=drop))


@pytest.fixture
def shards(tmp_path):
    """Two shards of 8 x 8 pictures whose red value is the picture's number."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:05}.tar", "w") as archive:
            for index in range(shard * 3, shard * 3 + 3):
                png = io.BytesIO()
                Image.new("RGB", (8, 8), (index, 0, 255)).save(png, "PNG")
                files = {"png": png.getvalue(), "txt": f"picture {index}\n".encode(), "json": b"{}"}
                for suffix, data in files.items():
                    info = tarfile.TarInfo(f"{index:04}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return tmp_path


def test_every_epoch_sees_every_example_once_in_its_own_order():
    epochs = [sum((indices_at(step, 4, 10, seed=1) for step in range(5 * e, 5 * e + 5)), []) for e in range(2)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(list(range(10)) * 2)
    assert epochs[0][:10] != epochs[0][10:] and epochs[0] != epochs[1]
    assert indices_at(7, 4, 10, seed=1) == indices_at(7, 4, 10, seed=1) != indices_at(7, 4, 10, seed=2)
    with pytest.raises(ValueError, match="empty"):
        indices_at(0, 4, 0, seed=1)


def test_shards_are_read_at_random(shards):
    data = CaptionedShards([shards], 8)
    batch = data.batch([5, 0, 5])
    assert len(data) == 6 and batch.captions == ["picture 5", "picture 0", "picture 5"]
    assert batch.pixels.shape == (3, 3, 8, 8)
    assert torch.allclose(batch.pixels[:, :, 0, 0], torch.tensor([[5, 0, 255], [0, 0, 255], [5, 0, 255]]) / 127.5 - 1)
    with pytest.raises(ValueError, match="8, 8"):
        CaptionedShards([shards], 16).batch([0])
    with pytest.raises(ValueError, match="no .tar shards"):
        CaptionedShards([shards / "none"], 8)


def test_cached_latents_come_back(tmp_path):
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    CachedLatents.write(paths[0], mean[:2], std[:2], ["a", "b"])
    CachedLatents.write(paths[1], mean[2:], std[2:], ["ц"])
    batch = CachedLatents(paths).batch([2, 0])
    assert batch.captions == ["ц", "a"]
    assert torch.equal(batch.mean, mean[[2, 0]].half().float()) and torch.equal(batch.std, std[[2, 0]].half().float())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_equals_never_stopping(tmp_path, accumulate):
    config = replace(CONFIG, accumulate=accumulate)
    straight = fit(diffusion(), Latents(), config, tmp_path / "straight")
    fit(diffusion(), Latents(), replace(config, steps=4), tmp_path / "stopped")
    resumed = fit(diffusion(), Latents(), config, tmp_path / "stopped")
    assert straight.step == resumed.step == 6
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
        assert torch.equal(straight.ema[name], resumed.ema[name]), name
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    straight_lines = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight_lines]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["loss", "zero_grad"])
def test_a_signal_ends_after_a_whole_step(tmp_path, monkeypatch, number, where):
    """Also one that comes after the weights have changed and before the step is counted."""
    with monkeypatch.context() as patch:
        objective, calls = diffusion(), []
        owner = objective if where == "loss" else torch.optim.AdamW
        original = getattr(owner, where)

        def interrupted(*args, **options):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), number)
            return original(*args, **options)

        patch.setattr(owner, where, interrupted)
        handler = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt):
            fit(objective, Latents(), replace(CONFIG, save_every=100), tmp_path)
        assert signal.getsignal(number) is handler
    straight = fit(diffusion(), Latents(), CONFIG, tmp_path / "straight")
    resumed = fit(diffusion(), Latents(), CONFIG, tmp_path)
    assert all(torch.equal(p, resumed.parameters[name]) for name, p in straight.parameters.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    fit(diffusion(), Latents(), replace(CONFIG, steps=2), tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("sfumato.weights.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fit(diffusion(), Latents(), CONFIG, tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*part"))


def test_steps_that_were_not_saved_leave_the_log(tmp_path):
    fit(diffusion(), Latents(), replace(CONFIG, steps=2), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99}\n')
    fit(diffusion(), Latents(), replace(CONFIG, steps=4), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[2]["loss"] < 99


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    fit(diffusion(), Latents(), replace(CONFIG, steps=1), tmp_path)
    other = AutoencoderObjective(Autoencoder(TINY.autoencoder))
    with pytest.raises(ValueError, match="parameters differ"):
        fit(other, Latents(), CONFIG, tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    objective = diffusion()
    with torch.no_grad():
        objective.network.time_embed[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(objective, Latents(), replace(CONFIG, nan_patience=3), tmp_path)


def test_ema_follows_its_formula(tmp_path):
    objective = diffusion()
    start = {name: p.detach().clone() for name, p in objective.network.named_parameters()}
    state = fit(objective, Latents(), replace(CONFIG, steps=1), tmp_path)
    decay = min(CONFIG.ema_decay, 2 / 11)  # (1 + 1) / (10 + 1)
    for name, parameter in state.parameters.items():
        assert torch.allclose(state.ema[name], decay * start[name] + (1 - decay) * parameter, atol=1e-6)
        assert torch.equal(ema_weights(tmp_path / "state.safetensors")[name], state.ema[name])


def test_learning_rate_warms_up_and_falls():
    config = LoopConfig(steps=100, batch_size=1, lr=1.0, warmup=10, decay="cosine")
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], rel=0.02)
    assert rates[99] == pytest.approx(0.1, abs=0.01) and all(
        a >= b for a, b in zip(rates[10:], rates[11:], strict=False)
    )
    with pytest.raises(ValueError, match="decay="):
        replace(config, decay="stairs").lr_at(0)


def test_diffusion_learns_what_captions_mean(tmp_path):
    objective = diffusion()
    config = replace(CONFIG, steps=150, batch_size=16, lr=3e-3, save_every=1000, log_every=1)
    fit(objective, Latents(), config, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    x, sigma = torch.randn(2, 4, 8, 8) * 20, [20.0, 20.0]
    with torch.no_grad():
        x0 = objective.denoiser(x, sigma, words(["red", "blue"])).mean(dim=(1, 2, 3))
    assert x0[0] < 0 < x0[1]  # at this noise only the caption can tell


@pytest.mark.parametrize(("drop", "low", "high"), [(0.0, 0, 0), (0.1, 100, 220), (1.0, 1600, 1600)])
def test_captions_are_dropped_as_often_as_asked(drop, low, high):
    seen: list[str] = []

    def listening(captions):
        seen.extend(captions)
        return words(captions)

    objective = diffusion(drop)
    objective.context = listening
    for step in range(100):
        objective.loss(Latents().batch(range(16)), torch.Generator().manual_seed(step))
    assert low <= seen.count("") <= high  # of 1,600; at 0.1 the deviation is 12


def test_a_frozen_context_reads_each_caption_once():
    asked: list[str] = []

    def states(captions):
        asked.extend(captions)
        return words(captions).requires_grad_()

    context = frozen(states)
    first, second = context(["red", "", "red"]), context(["blue", "red"])
    assert asked == ["red", "", "blue"]
    assert torch.equal(first[0], first[2]) and torch.equal(first[0], second[1]) and not first.requires_grad
    assert torch.allclose(second, words(["blue", "red"]), atol=1e-3)  # kept in fp16


def test_autoencoder_learns_and_starts_by_passing_its_input_on(tmp_path):
    torch.manual_seed(0)
    pictures = torch.rand(8, 3, 1, 1).expand(8, 3, 16, 16) * 2 - 1

    class Plain:
        def __len__(self):
            return 8

        def batch(self, indices):
            return CaptionedBatch(pictures[list(indices)].clone(), [""] * len(indices))

    objective = AutoencoderObjective(initialise(Autoencoder(TINY.autoencoder), seed=0))
    fit(objective, Plain(), replace(CONFIG, steps=80, batch_size=8, lr=3e-3, save_every=1000), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 6


def test_clip_finds_the_caption_of_a_picture(tmp_path):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, width=16, num_layers=1, num_heads=2)
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}

    class Colours:
        def __len__(self):
            return 4

        def batch(self, indices):
            names = [list(colours)[index] for index in indices]
            pixels = torch.stack([torch.tensor(colours[n]).float()[:, None, None].expand(3, 8, 8) for n in names])
            return CaptionedBatch(pixels, names)

    objective = CLIPObjective(
        CLIP(CLIPConfig(TINY.texts[0].config, vision, 8)), ClipTokenizer(TINY.texts[0].config.vocab_size)
    )
    fit(objective, Colours(), replace(CONFIG, steps=60, lr=1e-2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["found"] == 1.0 and lines[-1]["contrastive"] < 0.5 * lines[0]["contrastive"]


def test_clip_tokens_are_padded_to_the_longest_only():
    vision = CLIPVisionConfig(image_size=8, patch_size=4, width=16, num_layers=1, num_heads=2)
    network = CLIP(CLIPConfig(TINY.texts[0].config, vision, 8)).eval()
    objective = CLIPObjective(network, ClipTokenizer(TINY.texts[0].config.vocab_size))
    short, long = objective.tokens(["a cat"]), objective.tokens(["a cat", "a cat on a mat in a house"])
    assert short.shape[1] < long.shape[1] <= 77
    with torch.no_grad():
        assert torch.allclose(network.text_features(short)[0], network.text_features(long)[0], atol=1e-6)


def test_state_saves_only_what_is_trained(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    loop.State(network, CONFIG).save(tmp_path / "state.safetensors", CONFIG)
    assert set(ema_weights(tmp_path / "state.safetensors")) == {"0.weight", "0.bias"}
