"""Checkpoints of every family: loaded from each layout, converted there and back, merged, pruned, inspected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.cli.main import main
from sfumato.families import Family
from sfumato.weights.checkpoint import load_model, open_checkpoint, save_checkpoint
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.original_names import ema_name
from sfumato.weights.overrides import recall
from tests import hostile
from tests.tiny import TINIES, random_parts, save_bare

NAMES = list(TINIES)


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


def bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().contiguous().view(torch.uint8)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, precisions and bits."""
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def loaded_as(path: Path, parts: dict[str, dict[str, Tensor]], **options) -> None:
    """The model loaded from `path` holds exactly `parts`."""
    model = load_model(path, **options)
    for name, module in model.networks.items():
        same(dict(module.state_dict()), parts[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_family_in_both_layouts(name: str, tmp_path: Path) -> None:
    family = TINIES[name]
    parts = random_parts(family)
    single, folder, back = tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "b.safetensors"
    save_checkpoint(single, family, parts, torch.float32)
    tensors, header = load_safetensors(single)
    betas = torch.rand(7, dtype=torch.float64)
    extra = {"betas": betas, "model_ema.num_updates": torch.tensor(3), "v_pred": torch.zeros(0)}
    mixed = {n: t.half() if n.endswith("bias") else t.clone() for n, t in tensors.items()}  # precisions side by side
    save_safetensors(single, mixed | extra, header)
    loaded_as(
        single, {p: {n: t.half().float() if n.endswith("bias") else t for n, t in s.items()} for p, s in parts.items()}
    )
    assert main(["convert", str(single), str(folder)]) == 0
    assert (folder / "model_index.json").is_file()
    assert main(["convert", str(folder), str(back)]) == 0
    again, header_again = load_safetensors(back)
    same(again, mixed | extra)
    assert header_again == header
    assert main(["convert", str(single), str(tmp_path / "ours.safetensors")]) == 0  # in our own order of tensors
    assert (tmp_path / "ours.safetensors").read_bytes() == back.read_bytes()
    opened = open_checkpoint(folder)
    assert opened.problems() == []
    assert replace(opened.family, name=family.name, defaults=family.defaults) == family


def test_bare_files_load_by_their_shapes_when_told(tmp_path: Path) -> None:
    for name, family in TINIES.items():
        parts = random_parts(family)
        loaded_as(save_bare(tmp_path / f"{name}.safetensors", family, parts), parts, family=family)


def full(tmp_path: Path, family: Family) -> tuple[Path, dict, dict]:
    """A training checkpoint: plain weights, averaged twins, counters; as a pickle."""
    parts = random_parts(family)
    averaged = random_parts(family, seed=5)["unet"]
    path = save_bare(tmp_path / "plain.safetensors", family, parts)
    tensors, _ = load_safetensors(path)
    twins = {ema_name(f"model.diffusion_model.{name}"): tensor for name, tensor in averaged.items()}
    state = {n: t.clone() for n, t in tensors.items()} | twins
    state |= {
        "model_ema.decay": torch.tensor(0.999),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77),
    }
    torch.save({"state_dict": state, "global_step": 470000, "epoch": 3}, tmp_path / "full.ckpt")
    return tmp_path / "full.ckpt", parts, parts | {"unet": averaged}


def test_averaged_weights(tmp_path: Path) -> None:
    family = TINIES["sd1"]
    path, plain, averaged = full(tmp_path, family)
    loaded_as(path, plain, family=family)
    loaded_as(path, averaged, family=family, use_ema=True)
    opened = open_checkpoint(path, family)
    assert opened.has_ema
    assert opened.metadata["global_step"] == "470000"
    with pytest.raises(ValueError, match=r"plain.safetensors.*use_ema.*no averaged"):
        open_checkpoint(tmp_path / "plain.safetensors", family, use_ema=True)


def with_header(path: Path, family: Family) -> Path:
    """The file again as .safetensors that describes its family, for the command line."""
    from sfumato.weights.files import open_tensors

    file = open_tensors(path)
    out = path.with_suffix(".safetensors")
    save_safetensors(out, {n: file.read(n).clone() for n in file.names()}, {"sfumato.family": family.to_json()})
    return out


def test_extract_prune_and_convert(tmp_path: Path) -> None:
    family = TINIES["sd1"]
    path, plain, averaged = full(tmp_path, family)
    path = with_header(path, family)
    assert main(["extract-ema", str(path), str(tmp_path / "ema.safetensors")]) == 0
    loaded_as(tmp_path / "ema.safetensors", averaged)
    assert main(["prune", str(path), str(tmp_path / "pruned.safetensors")]) == 0
    tensors, header = load_safetensors(tmp_path / "pruned.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert not any(name.startswith("model_ema") for name in tensors)
    assert Family.from_json(header["sfumato.family"]) == family
    assert main(["prune", "--ema", "--dtype", "bf16", str(path), str(tmp_path / "p2.safetensors")]) == 0
    loaded_as(
        tmp_path / "p2.safetensors", {p: {n: t.bfloat16().float() for n, t in s.items()} for p, s in averaged.items()}
    )


def test_merging(tmp_path: Path) -> None:
    family = TINIES["sd1"]
    a, b, c = (random_parts(family, seed) for seed in (1, 2, 3))
    for name, parts in (("a", a), ("b", b), ("c", c)):
        save_checkpoint(tmp_path / f"{name}.safetensors", family, parts, torch.float32)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]

    def merged(*words: str) -> dict[str, Tensor]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}.safetensors"
        assert main(["merge", *words[:1], *words[1:2], str(out), *words[2:]]) == 0
        model = load_model(out)
        return {f"{part}.{n}": t for part, module in model.networks.items() for n, t in module.state_dict().items()}

    def flat(parts: dict) -> dict[str, Tensor]:
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    for name, tensor in merged(paths[0], paths[1], "--share", "0.3").items():
        torch.testing.assert_close(tensor, 0.7 * flat(a)[name] + 0.3 * flat(b)[name])
    for name, tensor in merged(paths[0], paths[1], "--minus", paths[2], "--share", "0.8").items():
        torch.testing.assert_close(tensor, flat(a)[name] + 0.8 * (flat(b)[name] - flat(c)[name]), atol=1e-5, rtol=1e-5)
    out = tmp_path / "baked.safetensors"
    assert main(["merge", paths[0], str(out), "--vae", paths[1]]) == 0
    loaded_as(out, a | {"autoencoder": b["autoencoder"]})


def test_inpainting_takes_on_a_style(tmp_path: Path) -> None:
    """The usual recipe: inpainting + (style - base), whose first convolutions differ in their inputs."""
    inpaint, plain = TINIES["sd1-inpaint"], TINIES["sd1"]
    a, b, c = random_parts(inpaint, 1), random_parts(plain, 2), random_parts(plain, 3)
    for name, family, parts in (("a", inpaint, a), ("b", plain, b), ("c", plain, c)):
        save_checkpoint(tmp_path / f"{name}.safetensors", family, parts, torch.float32)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    assert main(["merge", *paths[:2], str(tmp_path / "out.safetensors"), "--minus", paths[2], "--share", "1"]) == 0
    model = load_model(tmp_path / "out.safetensors")
    assert model.family == inpaint
    conv, name = model.unet.state_dict()["input_blocks.0.0.weight"], "input_blocks.0.0.weight"
    torch.testing.assert_close(conv[:, :4], a["unet"][name][:, :4] + b["unet"][name] - c["unet"][name])
    assert torch.equal(conv[:, 4:], a["unet"][name][:, 4:])


def test_spellings_in_the_wild(tmp_path: Path) -> None:
    family = TINIES["sd1"]
    parts = random_parts(family)
    path = save_bare(tmp_path / "a.safetensors", family, parts)
    tensors, _ = load_safetensors(path)

    def wild(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        name = name.replace("transformer.text_model.", "transformer.")
        if name.startswith("first_stage_model.") and ".attn_1." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]  # linear layers, as files that went through diffusers have them
        return name, tensor.clone()

    changed = dict(wild(name, tensor) for name, tensor in tensors.items())
    changed["cond_stage_model.logit_scale"] = torch.zeros(())
    changed["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(8, 8)
    save_safetensors(tmp_path / "wild.safetensors", changed, {})
    loaded_as(tmp_path / "wild.safetensors", parts, family=family)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_stored_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    family = TINIES["xl"]
    parts = random_parts(family)
    save_checkpoint(tmp_path / "a.safetensors", family, parts, dtype)
    loaded_as(tmp_path / "a.safetensors", {p: {n: t.to(dtype).float() for n, t in s.items()} for p, s in parts.items()})


def test_another_autoencoder(tmp_path: Path) -> None:
    family = TINIES["sd1"]
    parts, other = random_parts(family, 1), random_parts(family, 2)["autoencoder"]
    save_checkpoint(tmp_path / "a.safetensors", family, parts, torch.float32)
    save_checkpoint(tmp_path / "b.safetensors", family, parts | {"autoencoder": other}, torch.float32)
    assert main(["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "folder")]) == 0
    bare = {name: tensor.clone() for name, tensor in other.items()}
    save_safetensors(tmp_path / "bare.safetensors", bare, {})
    expected = parts | {"autoencoder": other}
    diffusers = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    for vae in ("b.safetensors", "bare.safetensors", "folder", "folder/vae", diffusers):
        loaded_as(tmp_path / "a.safetensors", expected, vae=tmp_path / vae)
    save_safetensors(tmp_path / "no.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"^vae=.*no.safetensors.*autoencoder"):
        load_model(tmp_path / "a.safetensors", vae=tmp_path / "no.safetensors")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = TINIES["xl"]
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family))
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "tiny-xl"
    assert facts["precision"] == {"float16": sum(map(len, random_parts(family).values()))}
    assert facts["loads"] is True
    assert len(facts["sha256"]) == 64
    assert facts["sha256"].startswith(facts["model hash"])
    tensors, header = load_safetensors(path)
    kept = {n: t.clone() for n, t in tensors.items() if not n.startswith("first_stage")}
    save_safetensors(path, kept | {"model.diffusion_model.lora.odd": torch.zeros(2)}, header)
    assert main(["inspect", str(path)]) == 1
    told = capsys.readouterr().out
    assert "the autoencoder is missing" in told
    assert "lora.odd" in told
    save_safetensors(path, {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, {"ss_network_dim": "4"})
    assert main(["inspect", str(path)]) == 1
    assert "a LoRA or one of its kin" in capsys.readouterr().out


def test_an_override_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    family = replace(TINIES["sd1"], name="sd1")
    save_checkpoint(path, family, random_parts(family))
    assert recall(path) is None
    from sfumato.families import find_family
    from sfumato.weights.overrides import remember

    remember(path, find_family("sd1-v"))
    moved = path.rename(tmp_path / "moved.safetensors")
    assert recall(moved) == find_family("sd1-v")
    remember(moved, None)
    assert recall(moved) is None
    assert main(["inspect", str(moved), "--family", "nonsense"]) == 2
    assert "one of sd1, sd1-v" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "model.diffusion_model.out.2.bias is missing"),
        (
            lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
            r"has shape \(5,\), expected \(4,\)",
        ),
        (lambda t: t.update({"model.diffusion_model.zzz": torch.zeros(1)}), "zzz"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("cond_stage")],
            r"the text encoder \(cond_stage_model.transformer.\.\.\.\) is",
        ),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int64)}), "floating point"),
    ],
)
def test_what_does_not_fit_is_refused(change, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = TINIES["sd1"]
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    tensors, header = load_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_safetensors(path, tensors, header)
    with pytest.raises(ValueError, match=words):
        load_model(path)
    assert main(["txt2img", "--prompt", "x", "--ckpt", str(path), "--outdir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_targets_are_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = TINIES["sd1"]
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for target in (path, tmp_path / "full", tmp_path / "x.ckpt"):
        before = sorted(entry.name for entry in tmp_path.iterdir())
        assert main(["convert", str(path), str(target)]) == 2
        assert "out=" in capsys.readouterr().err
        assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "o.safetensors")]) == 2
    assert "unet" in capsys.readouterr().err
    loaded_as(path, random_parts(family))


def test_hostile_files_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2 for each, nothing run, nothing left behind."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    paths = hostile.hostile_files(folder)
    before = sorted(entry.name for entry in folder.rglob("*"))
    for path in paths[:: max(1, len(paths) // 120)]:
        assert main(["txt2img", "--prompt", "x", "--ckpt", str(path), "--outdir", str(tmp_path / "out")]) == 2, path
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1, told
        assert told[0].startswith("sfumato txt2img: error:")
        assert path.name in told[0]
    assert sorted(entry.name for entry in folder.rglob("*")) == before
    assert not list(tmp_path.rglob(f"*{hostile.MARKER}*"))
    assert not list((tmp_path / "out").rglob("*.png"))
