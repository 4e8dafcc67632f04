"""What an independent review found: predictions that were lost on writing, names that misled, real files refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.cli.main import main
from sfumato.families import find_family
from sfumato.families.detect import Clues, detect
from sfumato.weights.checkpoint import load_model, open_checkpoint, save_checkpoint
from sfumato.weights.files import load_safetensors, save_safetensors
from tests.test_detect import stored_shapes
from tests.tiny import TINIES, random_parts, save_bare


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", ["prune", "convert"])
def test_the_prediction_survives_writing(command: str, tmp_path: Path) -> None:
    family = TINIES["sd1-v"]
    save_checkpoint(tmp_path / "a.safetensors", family, random_parts(family))
    tensors, header = load_safetensors(tmp_path / "a.safetensors")
    marked = {name: tensor.clone() for name, tensor in tensors.items()} | {"v_pred": torch.zeros(0)}
    save_safetensors(tmp_path / "a.safetensors", marked, header)
    assert main([command, str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    assert open_checkpoint(tmp_path / "b.safetensors").family.prediction == "v"
    assert "v_pred" in load_safetensors(tmp_path / "b.safetensors")[0]


@pytest.mark.parametrize("name", ["realistic_768_v2", "sd1024x768-v5", "novpredator", "512-base-look", "a_v_preda"])
def test_names_do_not_mislead(name: str) -> None:
    for family in ("sd1", "xl"):
        assert detect(stored_shapes(find_family(family)), Clues({}, name)).family.name == family


def test_configs_beside_files(tmp_path: Path) -> None:
    from sfumato.weights.layouts.single_file import _yaml_prediction

    path = tmp_path / "m.safetensors"
    for text, prediction in (
        ("denoiser_scaling:\n  target: sgm...denoiser_scaling.VScaling\n", "v"),
        ("  target: sgm...EpsScaling\n", "eps"),
        ('  parameterization: "v"\n', "v"),
        ("target: ldm.models.diffusion.ddpm.LatentDiffusion\n", "eps"),
        ("something: else\n", None),
    ):
        path.with_suffix(".yaml").write_text(text)
        assert _yaml_prediction(path) == prediction
    marked = stored_shapes(find_family("xl")) | {"v_pred": (0,)}
    assert detect(marked, Clues({}, "m", "eps")).family.name == "xl-v", "the file's own mark is before the config"


def test_merges_that_cannot_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sd1", "sd1-v"):
        save_checkpoint(tmp_path / f"{name}.safetensors", TINIES[name], random_parts(TINIES[name]))
    a, b = (str(tmp_path / f"{name}.safetensors") for name in ("sd1", "sd1-v"))
    assert main(["merge", a, b, str(tmp_path / "out.safetensors")]) == 2
    assert "these do not merge" in capsys.readouterr().err
    before = Path(a).read_bytes()
    assert main(["merge", a, a, a]) == 2
    assert "there already" in capsys.readouterr().err
    assert Path(a).read_bytes() == before


def test_foreign_tensors_and_spellings(tmp_path: Path) -> None:
    family = TINIES["xl"]
    parts = random_parts(family)
    path = save_bare(tmp_path / "a.safetensors", family, parts)
    tensors = {name: tensor.clone() for name, tensor in load_safetensors(path)[0].items()}
    projection = "conditioner.embedders.1.model.text_projection"
    tensors[f"{projection}.weight"] = tensors.pop(projection).T.contiguous()
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        for name in [name for name in tensors if f".attn_1.{ours}." in name and name.startswith("first_stage_model")]:
            tensors[name.replace(f".attn_1.{ours}.", f".attn_1.{theirs}.")] = tensors.pop(name)
    tensors |= {"lvlb_weights": torch.zeros(3), "control_model.x": torch.zeros(1), "lora_unet_y": torch.zeros(1)}
    save_safetensors(path, tensors, {})
    model = load_model(path, family=family)
    for part, module in model.networks.items():
        assert all(torch.equal(tensor, parts[part][name]) for name, tensor in module.state_dict().items())
    assert {"lvlb_weights", "control_model.x", "lora_unet_y"} <= set(open_checkpoint(path, family).unused)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: replace(f, size=-5), "size=-5"),
        (lambda f: replace(f, schedule=replace(f.schedule, num_timesteps=10**9)), "num_timesteps=1000000000"),
        (lambda f: replace(f, autoencoder=replace(f.autoencoder, channel_mult=())), "channel_mult"),
        (lambda f: replace(f, unet=replace(f.unet, middle_depth=10**6)), "middle_depth=1000000"),
    ],
)
def test_a_description_of_an_absurd_size(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        change(TINIES["sd1"])
