"""Conversions that were once half done: averaged weights in another precision, autoencoders of another scale."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sfumato.cli.main import main
from sfumato.families import SD1, find_family
from sfumato.weights.checkpoint import load_model, open_checkpoint, save_checkpoint
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.folder import SURPLUS
from sfumato.weights.writing import HEADER
from tests.conftest import TINY
from tests.tiny import TINIES, random_parts


@pytest.fixture
def with_averages(tiny_checkpoint, tmp_path):
    """A full training checkpoint, as the original code wrote them."""
    tensors, metadata = load_safetensors(tiny_checkpoint)
    prefix = "model.diffusion_model."
    twins = {
        f"model_ema.diffusion_model{name.removeprefix(prefix).replace('.', '')}": tensor.float() * 0.5
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    path = tmp_path / "full.safetensors"
    save_safetensors(path, {**tensors, **twins, **extra}, metadata)
    return path


@pytest.mark.parametrize("dtype", ["fp16", "bf16", None])
def test_averaged_weights_get_the_precision_too(with_averages, tmp_path, dtype):
    out = tmp_path / "out.safetensors"
    flags = [] if dtype is None else ["--dtype", dtype]
    assert main(["convert", str(with_averages), str(out), *flags]) == 0
    before, _ = load_safetensors(with_averages)
    after, _ = load_safetensors(out)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, None: torch.float32}[dtype]
    twins = [name for name in after if name.startswith("model_ema.diffusion_model")]
    assert len(twins) > 20 and {after[name].dtype for name in twins} == {wanted}
    assert all(torch.equal(after[name], before[name].to(wanted)) for name in twins)
    assert after["model_ema.decay"].dtype == torch.float32 and int(after["model_ema.num_updates"]) == 7
    averaged = load_model(out, use_ema=True).unet.state_dict()
    plain = load_model(out).unet.state_dict()
    assert not all(torch.equal(averaged[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", ["header", "folder"])
@pytest.mark.parametrize("factor, fits", [(1.0, True), (1.0005, True), (0.715, False)])
def test_an_autoencoder_that_tells_another_scale_is_refused(tiny_checkpoint, tmp_path, kind, factor, fits):
    """0.13025 / 0.18215 is 0.715: XL's autoencoder has SD 1's shapes."""
    assert 0.13025 / SD1.latent_scale == pytest.approx(0.715, abs=1e-3)
    tensors, _ = load_safetensors(tiny_checkpoint)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    scale = TINY.latent_scale * factor
    if kind == "header":
        other = tmp_path / "other.safetensors"
        save_safetensors(other, own, {"sfumato.family": replace(TINY, latent_scale=scale).to_json()})
    else:
        folder = tmp_path / "folder"
        assert main(["convert", str(tiny_checkpoint), str(folder)]) == 0
        other = folder / "vae"
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"scaling_factor": scale}))
    if fits:
        assert load_model(tiny_checkpoint, vae=other).family.latent_scale == TINY.latent_scale
        return
    with pytest.raises(ValueError, match=r"^vae=.*its latents have the scale .*, the U-Net of tiny knows"):
        load_model(tiny_checkpoint, vae=other)


def test_an_autoencoder_that_tells_nothing_is_taken(tiny_checkpoint, tmp_path):
    tensors, _ = load_safetensors(tiny_checkpoint)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    save_safetensors(tmp_path / "bare.safetensors", own, {})
    assert load_model(tiny_checkpoint, vae=tmp_path / "bare.safetensors").family == TINY


def test_a_checkpoint_of_the_same_family_lends_its_autoencoder(tiny_checkpoint, tmp_path):
    parts = {name: network.state_dict() for name, network in load_model(tiny_checkpoint).networks.items()}
    save_checkpoint(tmp_path / "same.safetensors", TINY, parts)
    assert load_model(tiny_checkpoint, vae=tmp_path / "same.safetensors").family == TINY


def test_an_autoencoder_out_of_a_checkpoint_of_another_scale_is_refused(tiny_checkpoint, tmp_path):
    """XL's file says nothing in its header: its U-Net's shapes do."""
    tensors, _ = load_safetensors(tiny_checkpoint)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    unet = "model.diffusion_model."
    xl = find_family("xl").unet
    depth, blocks = sum(xl.transformer_depth), xl.num_res_blocks
    count = blocks * depth + (blocks + 1) * depth + xl.middle_depth
    shapes = {f"{unet}input_blocks.0.0.weight": (xl.channels, xl.in_channels, 1, 1)}
    shapes |= {f"{unet}{index}.attn2.to_k.weight": (1, xl.context_dim) for index in range(count)}
    shapes[f"{unet}label_emb.0.0.weight"] = (1, xl.vector_dim)
    other = tmp_path / "other.safetensors"
    save_safetensors(other, own | {name: torch.zeros(shape) for name, shape in shapes.items()}, {})
    with pytest.raises(ValueError, match=r"^vae=.*the scale 0\.13025, the U-Net of tiny knows"):
        load_model(tiny_checkpoint, vae=other)


def test_a_broken_config_of_an_autoencoder_is_named(tiny_checkpoint, tmp_path):
    assert main(["convert", str(tiny_checkpoint), str(tmp_path / "folder")]) == 0
    (tmp_path / "folder/vae/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^vae=.*vae/config.json is not readable JSON"):
        load_model(tiny_checkpoint, vae=tmp_path / "folder")


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"a": 1}', "null"])
def test_a_damaged_header_in_the_surplus_is_one_line(tiny_checkpoint, tmp_path, capsys, text):
    folder = tmp_path / "folder"
    assert main(["convert", str(tiny_checkpoint), str(folder)]) == 0
    save_safetensors(folder / SURPLUS, {"x": torch.zeros(1)}, {HEADER: text})
    assert main(["convert", str(folder), str(tmp_path / "out.safetensors")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and SURPLUS in lines[0] and "a JSON object of texts is needed" in lines[0]
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["notes.json", "safety_checker/config.json", "feature_extractor/preprocessor_config.json"]
)
def test_broken_json_that_is_none_of_ours_is_left_alone(tiny_checkpoint, tmp_path, name):
    folder = tmp_path / "folder"
    assert main(["convert", str(tiny_checkpoint), str(folder)]) == 0
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{")
    assert open_checkpoint(folder).problems() == []
    for text, words in (("{", "is not readable JSON"), ("[]", "holds a list; a JSON object is needed")):
        (folder / "unet/config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^ckpt=.*unet/config.json {words}"):
            open_checkpoint(folder)


@pytest.mark.parametrize("index", ["named", "no", "null"])
@pytest.mark.parametrize("gone", ["text_encoder", "text_encoder_2"])
def test_a_missing_text_encoder_of_xl_is_named(tmp_path, gone, index):
    family = TINIES["xl"]
    save_checkpoint(tmp_path / "a.safetensors", family, random_parts(family))
    folder = tmp_path / "folder"
    assert main(["convert", str(tmp_path / "a.safetensors"), str(folder)]) == 0
    shutil.rmtree(folder / gone)
    path = folder / "model_index.json"
    told = json.loads(path.read_text())
    if index == "no":
        path.unlink()
    elif index == "null":
        path.write_text(json.dumps(told | {gone: [None, None]}))
    with pytest.raises(
        ValueError, match=rf"^ckpt=.*: {gone}/config.json is missing: (model_index.json names|the U-Net)"
    ):
        open_checkpoint(folder)
