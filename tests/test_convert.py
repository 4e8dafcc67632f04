"""Conversions that were once half done: averaged weights in another precision, autoencoders of another scale."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sfumato.cli.main import main
from sfumato.families import SD1
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import load_safetensors, save_safetensors
from tests.conftest import TINY


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
