"""How networks are filled from disk: views of the map where nothing changes, one copy where something does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.families import Family
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.unet import UNetConfig
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import open_tensors
from tests.tiny import TINIES, random_parts

MEASURE = """
import json, sys, torch
from sfumato.weights.checkpoint import load_model
def kb(name):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[name].split()[0])
torch.set_num_threads(1)
load_model(sys.argv[2])  # a tiny one: all that is imported on the way is there
before = kb("VmRSS")
model = load_model(sys.argv[1])
weights = sum(p.numel() * p.element_size() for n in model.networks.values() for p in n.parameters()) / 1024
loaded, peak = kb("VmRSS") - before, kb("VmHWM") - before
with torch.inference_mode():
    x = torch.zeros(1, 4, 8, 8).to(memory_format=torch.channels_last)
    model.unet(x, torch.zeros(1), torch.zeros(1, 4, model.family.unet.context_dim))
    model.autoencoder.decode(x)
    model.autoencoder.encode(torch.zeros(1, 3, 64, 64))
used = kb("VmHWM") - before
print(json.dumps({"weights": weights, "loaded": loaded, "peak": peak, "used": used}))
"""


def medium() -> Family:
    """About 150 MB of weights in float32, of SD 1.x's shape."""
    family = TINIES["sd1"]
    return replace(
        family,
        unet=UNetConfig(channels=96, num_res_blocks=1, context_dim=8, num_heads=4),
        autoencoder=AutoencoderConfig(channels=32),
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=["as it computes", "half"])
def test_no_weight_is_in_memory_twice(stored: torch.dtype, tmp_path: Path) -> None:
    big, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    save_checkpoint(big, medium(), random_parts(medium()), stored)
    save_checkpoint(small, TINIES["sd1"], random_parts(TINIES["sd1"]), stored)
    command = [sys.executable, "-c", MEASURE, str(big), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["weights"] > 100_000, "large enough to be seen"
    assert found["peak"] <= 1.1 * found["weights"] + 20_000
    assert found["used"] <= 1.15 * found["weights"] + 30_000, "with the first call, which turns convolutions"
    if stored == torch.float32:
        assert found["loaded"] < 0.2 * found["weights"], "a view of the map costs nothing until it is read"


def test_views_where_nothing_changes(tmp_path: Path) -> None:
    family, path = TINIES["sd1"], tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    unet = load_model(path).unet
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    assert not unet.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        first = unet(torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 3, 8))
        again = unet(torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 3, 8))
    assert torch.equal(first, again)
    assert unet.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())


def test_changes_in_place_survive_the_turning(tmp_path: Path) -> None:
    """What a LoRA merge or a training step wrote into mapped weights is not lost when pages are handed back."""
    family, path = TINIES["sd1"], tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    unet = load_model(path).unet
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1.0)
    expected = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    with torch.inference_mode():
        unet(torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 3, 8))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in unet.named_parameters())
    file = open_tensors(path)  # and the file itself is as it was
    assert torch.equal(file.read("model.diffusion_model.out.2.bias"), random_parts(family)["unet"]["out.2.bias"])


def test_weights_can_be_trained_after_the_first_call(tmp_path: Path) -> None:
    family, path = TINIES["sd1"], tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    unet = load_model(path).unet
    with torch.inference_mode():
        unet(torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 3, 8))
    unet.requires_grad_(True)
    unet(torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 3, 8)).square().mean().backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in unet.parameters())
