"""Adapters made by the peers (diffusers, PEFT, LyCORIS) with random weights, worn here: the same outputs."""

from __future__ import annotations

import peft
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from peft.utils import get_peft_model_state_dict

from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from tests.adapters import model_of, peer_texts, peer_unet, pipe_of, randomised, text_outputs, unet_output

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "v_proj", "fc1"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def wear(model, path, **strengths):
    adapter = load_adapter(path, model)
    assert adapter.unmatched == () and adapter.matched == adapter.total > 0
    Wardrobe(model).wear([Worn(adapter, **strengths)])
    return adapter


def compare_unet(model, pipe, plain):
    """Ours as the peer's, and both far from the model without the adapter."""
    theirs = peer_unet(pipe, model.family)
    torch.testing.assert_close(unet_output(model), theirs, **CLOSE)
    assert (theirs - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd1", {}),
        ("sd1", {"use_dora": True}),
        ("sd2", {"lora_alpha": 2, "use_rslora": True}),
        ("xl", {}),
    ],
    ids=str,
)
def test_diffusers_file_of_unet_and_text(tmp_path, kind, options):
    model, pipe = model_of(kind), pipe_of(kind)
    plain = peer_unet(pipe, model.family)
    texts = ["text_encoder", "text_encoder_2"][: len(model.texts)]
    layers, metadata = {}, {}
    for name in ["unet", *texts]:
        targets = TEXT if name != "unet" else [*ATTENTION, "proj_in", "conv1", "conv_shortcut", "ff.net.0.proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, **{"lora_alpha": 6, **options})
        module = getattr(pipe, name)
        module.add_adapter(config)
        randomised(module, "lora_A", 1)
        randomised(module, "lora_B", 2)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    type(pipe).save_lora_weights(tmp_path, **layers, **metadata)
    adapter = wear(model, tmp_path)
    assert adapter.kinds == (("DoRA",) if "use_dora" in options else ("LoCon",)) and adapter.rank == 4
    assert set(adapter.parts) == {"unet", *model.family.text_parts}
    compare_unet(model, pipe, plain)
    for ours, theirs in zip(text_outputs(model), peer_texts(pipe, model.family), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


PEFT = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "conv1"]),
    "pattern": peft.LoraConfig(r=4, target_modules=ATTENTION, alpha_pattern={"to_q": 3}, rank_pattern={"to_k": 2}),
    "bias": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_out.0"], lora_bias=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[*ATTENTION, "conv1"]),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=[*ATTENTION, "conv1"]),
    "loha-tucker": peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1"], use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=[*ATTENTION, "conv1"]),
    "lokr-whole": peft.LoKrConfig(r=16, alpha=12, target_modules=ATTENTION),
    "lokr-both": peft.LoKrConfig(r=1, alpha=3, target_modules=ATTENTION, decompose_both=True),
    "lokr-tucker": peft.LoKrConfig(r=1, alpha=3, target_modules=["conv1"], use_effective_conv2d=True),
    "ia3": peft.IA3Config(target_modules=[*ATTENTION, "ff.net.2"], feedforward_modules=["ff.net.2"]),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft_folder(tmp_path, name):
    model, pipe = model_of("sd1"), pipe_of("sd1")
    plain = peer_unet(pipe, model.family)
    wrapped = peft.get_peft_model(pipe.unet, PEFT[name])
    for number, pattern in enumerate(("lora_A", "lora_B", "hada_", "lokr_", "ia3_l")):
        randomised(wrapped, pattern, number)
    wrapped.save_pretrained(tmp_path)
    wear(model, tmp_path)
    compare_unet(model, pipe, plain)


LYCORIS = {
    "lora": {"algo": "lora"},
    "tucker": {"algo": "lora", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr-whole": {"algo": "lokr", "full_matrix": True},
    "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "dora-inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "dora-loha": {"algo": "loha", "dora_wd": True},
    "glora": {"algo": "glora", "alpha": 2},
    "ia3": {"algo": "ia3"},
    "oft": {"algo": "diag-oft", "constraint": 0.02, "rescaled": True},
    "boft": {"algo": "boft", "linear_dim": 4},
    "full": {"algo": "full", "train_norm": True},
}


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_file(tmp_path, name):
    model, pipe = model_of("sd1"), pipe_of("sd1")
    plain = peer_unet(pipe, model.family)
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    options = {"linear_dim": 2, "linear_alpha": 1.0, "conv_dim": 2, "conv_alpha": 1.0, **LYCORIS[name]}
    if name == "glora":
        options |= {"linear_alpha": 2.0, "conv_alpha": 2.0}
    network = create_lycoris(pipe.unet, 1.0, **options)
    generator = torch.Generator().manual_seed(1)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            start = parameter.clone() if name == "full" or parameter.unique().numel() > 1 else 0
            parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "made.safetensors"
    network.save_weights(str(path), torch.float32, {})
    adapter = wear(model, path)
    assert adapter.changes and adapter.parts == ("unet",)
    compare_unet(model, pipe, plain)
