"""A recipe says how its checkpoint was read; replay reads it so again, or says in one line what it needs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.cli.main import main
from sfumato.families import Family
from sfumato.images import load_png, save_png
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.original_names import ema_name
from sfumato.weights.overrides import recall
from tests.tiny import TINIES, random_parts, save_bare

UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def family(tiny_family: Family) -> Family:
    return replace(tiny_family, latent_scale=0.18215)


@pytest.fixture
def checkpoint(family: Family, tmp_path: Path) -> Path:
    """A file with averaged weights that are others than the plain ones."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    tensors, header = load_safetensors(path)
    other = random_parts(family, 5)["unet"]
    twins = {ema_name(f"{UNET}{name}"): tensor for name, tensor in other.items()}
    save_safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()} | twins, header)
    return path


def drawn(ckpt: Path, folder: Path, *flags: object) -> Path:
    command = ["txt2img", "--ckpt", ckpt, "--outdir", folder, "--prompt", "a cat", "--steps", "2", *flags]
    assert main([str(each) for each in command]) == 0
    return folder / "samples" / "00000.png"


def replayed(picture: Path, ckpt: Path, *flags: object) -> int:
    return main([str(each) for each in ("replay", picture, "--ckpt", ckpt, *flags)])


def model_of(picture: Path) -> dict[str, object]:
    return load_png(picture)[1]["model"]


def test_averaged_weights(checkpoint, tmp_path, capsys):
    plain, picture = drawn(checkpoint, tmp_path / "plain"), drawn(checkpoint, tmp_path / "out", "--ema")
    assert (load_png(plain)[0] != load_png(picture)[0]).any()
    assert model_of(picture)["ema"] is True and "ema" not in model_of(plain)
    assert replayed(picture, checkpoint) == replayed(plain, checkpoint) == 0
    assert replayed(plain, checkpoint, "--ema") == 1
    assert "model read with ema None, now True" in capsys.readouterr().out


def test_another_autoencoder(checkpoint, family, tmp_path, capsys):
    vae, third = tmp_path / "fine.safetensors", tmp_path / "third.safetensors"
    for seed, path in ((7, vae), (8, third)):
        save_safetensors(path, random_parts(family, seed)["autoencoder"], {})
    picture = drawn(checkpoint, tmp_path / "out", "--vae", vae)
    told = model_of(picture)["vae"]
    assert told["name"] == "fine" and len(told["hash"]) == 10
    assert replayed(picture, checkpoint, "--vae", vae) == 0
    capsys.readouterr()
    assert replayed(picture, checkpoint) == 2
    error = capsys.readouterr().err
    assert "vae=None" in error and f"fine ({told['hash']})" in error and "--vae" in error
    assert replayed(picture, checkpoint, "--vae", third) == 2
    assert f"fine ({told['hash']}), this is third" in capsys.readouterr().err


def test_an_autoencoder_has_one_hash_however_it_lies(checkpoint, family, tmp_path):
    """Where its folder is and how that is spelled does not matter, nor what the checkpoint's own would be."""
    assert main(["convert", str(checkpoint), str(tmp_path / "folder")]) == 0
    path = tmp_path / "folder" / "vae"
    spelled = [path, path / ".." / "vae", path.parent, path / "diffusion_pytorch_model.safetensors"]
    facts = [load_model(checkpoint, vae=each).facts["vae"]["hash"] for each in spelled]
    assert len(set(facts)) == 1
    assert load_model(path.parent, vae=path).hash == load_model(path.parent).hash


def test_a_family_by_hand_is_not_remembered_by_replay(tmp_path, monkeypatch):
    from sfumato.families import FAMILIES

    small = TINIES["sd1"]
    monkeypatch.setitem(FAMILIES, "small", replace(small, name="small"))
    path = save_bare(tmp_path / "bare.safetensors", small, random_parts(small))
    picture = drawn(path, tmp_path / "out", "--family", "small")
    assert model_of(picture)["family"] == "small"
    monkeypatch.setenv("SFUMATO_CONFIG", str(tmp_path / "elsewhere"))
    assert replayed(picture, path) == 0
    assert recall(path) is None


def test_a_variant_of_a_folder(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    assert main(["convert", str(checkpoint), str(folder)]) == 0
    for path in sorted(folder.rglob("*.safetensors")):
        if path.parent != folder:
            half = {name: tensor.half() for name, tensor in load_safetensors(path)[0].items()}
            save_safetensors(path.with_name(f"{path.stem}.fp16.safetensors"), half, {"format": "pt"})
    picture = drawn(folder, tmp_path / "out", "--variant", "fp16")
    assert model_of(picture)["variant"] == "fp16"
    assert replayed(picture, folder) == 0


def test_the_fast_way(tiny_checkpoint, tmp_path, capsys):
    picture = drawn(tiny_checkpoint, tmp_path / "out", "--fast")
    pixels, made = load_png(picture)
    assert made["made with"]["fast"] == "yes"
    assert replayed(picture, tiny_checkpoint, "--out", tmp_path / "again.png") == 0
    assert load_png(tmp_path / "again.png")[1]["made with"]["fast"] == "yes"
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    del made["made with"]["fast"]
    save_png(tmp_path / "slow.png", changed, made)
    capsys.readouterr()
    assert replayed(tmp_path / "slow.png", tiny_checkpoint, "--fast") == 1
    assert "made with fast None, now yes" in capsys.readouterr().out


@pytest.fixture
def thrifty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of --vram as thrifty as for a large model in little memory: one row, slices, tiles."""
    from sfumato import pipeline

    plan, far = pipeline.plan, {"max_rows": 1, "max_pictures": 1, "attention_slice": 8, "tile": 16}
    monkeypatch.setattr(pipeline, "plan", lambda *args: replace(plan(*args), **far))


def made_of(picture: Path) -> dict[str, str]:
    return load_png(picture)[1]["made with"]


@pytest.mark.usefixtures("thrifty")
def test_what_a_plan_chose(tiny_checkpoint, tmp_path, capsys):
    """Tiles change pixels: replay decodes in the same ones, unasked; where the recipe is silent it cannot."""
    size = ("--W", 48, "--H", 32)
    whole = drawn(tiny_checkpoint, tmp_path / "whole", *size)
    picture = drawn(tiny_checkpoint, tmp_path / "out", *size, "--vram", 4)
    pixels, made = load_png(picture)
    assert (load_png(whole)[0] != pixels).any()
    chosen = {"max_rows": "1", "max_pictures": "1", "query_rows": "8", "tile": "16"}
    assert {name: made["made with"].get(name) for name in chosen} == chosen
    assert not set(chosen) & set(made_of(whole))
    assert replayed(picture, tiny_checkpoint, "--out", tmp_path / "again.png") == 0
    assert made_of(tmp_path / "again.png") == made["made with"]
    assert replayed(picture, tiny_checkpoint, "--vram", 4) == 0
    capsys.readouterr()
    assert replayed(whole, tiny_checkpoint, "--vram", 4) == 1, "the person's own plan holds"
    assert "made with tile None, now 16" in capsys.readouterr().out
    del made["made with"]["tile"]
    save_png(tmp_path / "untold.png", pixels, made)
    assert replayed(tmp_path / "untold.png", tiny_checkpoint) == 1


def test_a_plan_of_replay_is_for_the_recipes_pictures(tiny_checkpoint, tmp_path, monkeypatch):
    from sfumato import pipeline

    picture = drawn(tiny_checkpoint, tmp_path / "out", "--W", 48, "--H", 32, "--n_samples", 3)
    plan, asked = pipeline.plan, []

    def watched(*args):
        asked.append(args[1:4])
        return plan(*args)

    monkeypatch.setattr(pipeline, "plan", watched)
    assert replayed(picture, tiny_checkpoint, "--vram", 4) == 0
    assert asked == [(48, 32, 3)]


def test_half_precision_of_a_plan(tiny_checkpoint, tmp_path, monkeypatch):
    from sfumato import pipeline

    plan = pipeline.plan
    monkeypatch.setattr(pipeline, "plan", lambda *args: plan(*args[:6], torch.bfloat16, *args[7:]))
    picture = drawn(tiny_checkpoint, tmp_path / "out", "--vram", 4)
    assert load_png(picture)[1]["precision"] == "bfloat16"
    assert replayed(picture, tiny_checkpoint) == 0


def test_what_fast_layers_could_keep(tiny_checkpoint, tmp_path, monkeypatch):
    """Which layers keep weights, and so compute otherwise, hangs on the room there was: told where it was short."""
    from sfumato import pipeline
    from sfumato.pipeline import Pipeline

    plenty = drawn(tiny_checkpoint, tmp_path / "plenty", "--fast")
    assert "fast_bytes" not in made_of(plenty)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "free_memory", lambda device: 2000)
        picture = drawn(tiny_checkpoint, tmp_path / "out", "--fast")
        assert made_of(picture)["fast_bytes"] == "1000"
    kept, hasten = [], Pipeline._hasten
    monkeypatch.setattr(Pipeline, "_hasten", lambda self: (kept.append(self.fast_bytes), hasten(self))[1])
    assert replayed(picture, tiny_checkpoint) == 0
    assert kept[-1] == 1000 < kept[0]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "free_memory", lambda device: 1000)
        replayed(picture, tiny_checkpoint, "--out", tmp_path / "again.png")  # equal or not, by rounding
    assert kept[-1] == 500, "no more than there is room for"
    assert made_of(tmp_path / "again.png")["fast_bytes"] == "500"


@pytest.mark.parametrize("bound", [{"tile": "x"}, {"max_rows": "0"}, {"query_rows": "-8"}, {"max_pictures": "1.5"}])
def test_damaged_bounds_are_told(tiny_checkpoint, tmp_path, capsys, bound):
    pixels, made = load_png(drawn(tiny_checkpoint, tmp_path / "out"))
    save_png(tmp_path / "odd.png", pixels, made | {"made with": made["made with"] | bound})
    assert replayed(tmp_path / "odd.png", tiny_checkpoint) == 2
    error = capsys.readouterr().err
    assert "its recipe is damaged" in error and f"{next(iter(bound))}=" in error


def test_a_folder_has_one_hash_however_it_is_spelled(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    assert main(["convert", str(checkpoint), str(folder)]) == 0
    monkeypatch.chdir(tmp_path)
    spelled = [folder, Path("folder"), Path("folder/../folder"), Path(os.path.relpath(folder))]
    told = {(model.name, model.hash) for model in map(load_model, spelled)}
    monkeypatch.chdir(folder)
    told.add((load_model(".").name, load_model(".").hash))
    folder.rename(tmp_path / "moved")
    moved = load_model(tmp_path / "moved")
    assert told == {("folder", moved.hash)}


@pytest.mark.parametrize("facts", [{"ema": "yes"}, {"vae": "x"}, {"vae": {"name": "x"}}, {"variant": 3}])
def test_damaged_facts_are_told(tiny_checkpoint, tmp_path, capsys, facts):
    picture = drawn(tiny_checkpoint, tmp_path / "out")
    pixels, made = load_png(picture)
    save_png(tmp_path / "odd.png", pixels, made | {"model": made["model"] | facts})
    assert replayed(tmp_path / "odd.png", tiny_checkpoint) == 2
    assert "its recipe is damaged" in capsys.readouterr().err
