"""`sfumato lora`: what it prints and writes, and one line for what a person can mend."""

from __future__ import annotations

import json

import pytest
import torch

from sfumato.cli.main import main
from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.adapters.writing import save_adapter
from sfumato.weights.checkpoint import load_model
from tests.adapters import checkpoint_of, model_of, random_lora, same_bits, weights_of
from tests.tiny import TINIES

SD1 = TINIES["sd1"]


@pytest.fixture
def style(tmp_path):
    path = tmp_path / "style.safetensors"
    tags = json.dumps({"set": {"a fox": 3, "snow": 9}})
    save_adapter(path, random_lora(SD1), SD1, metadata={"ss_tag_frequency": tags, "ss_output_name": "fox"})
    return path


def test_inspect(style, capsys):
    count = len(random_lora(SD1))
    assert main(["lora", "inspect", str(style), "--ckpt", str(checkpoint_of("sd1"))]) == 0
    out = capsys.readouterr().out
    assert f"lora style: LoRA, rank 4, {count} of {count} keys matched\nfamily: tiny-sd1\n" in out
    assert "ss_output_name: fox" in out and "trained on: snow, a fox" in out and "ss_tag_frequency" not in out
    assert main(["lora", "inspect", str(style), "--ckpt", str(checkpoint_of("sd1")), "--all"]) == 0
    assert "sshs_model_hash: " in capsys.readouterr().out


def test_merge_is_wearing(style, tmp_path, capsys):
    ckpt, out = str(checkpoint_of("sd1")), tmp_path / "out.safetensors"
    assert main(["lora", "merge", ckpt, str(out), "--lora", f"{style}:0.8", "--lora", f"{style}:0:0.5"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    model = model_of("sd1")
    worn = load_adapter(style, model)
    Wardrobe(model).wear([Worn(worn, 0.8, 0.8), Worn(worn, 0.0, 0.5)])
    assert same_bits(weights_of(model), weights_of(load_model(out)))


def test_extract_and_resize(style, tmp_path):
    ckpt, tuned = str(checkpoint_of("sd1")), tmp_path / "tuned.safetensors"
    assert main(["lora", "merge", ckpt, str(tuned), "--lora", str(style)]) == 0
    out, small = tmp_path / "lora.safetensors", tmp_path / "small.safetensors"
    assert main(["lora", "extract", str(tuned), ckpt, str(out), "--rank", "8", "--dtype", "fp32"]) == 0
    again = load_adapter(out, SD1)
    assert set(again.changes) == set(random_lora(SD1)) and again.rank == 4
    one, other = model_of("sd1"), load_model(tuned)
    Wardrobe(one).wear([Worn(again)])
    ours = weights_of(one)
    for key, tensor in weights_of(other).items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=1e-5)
    assert main(["lora", "resize", str(out), str(small), "--rank", "2", "--ckpt", ckpt]) == 0
    smaller = load_adapter(small, SD1)
    assert smaller.rank == 2 and smaller.metadata["ss_network_dim"] == "2"
    assert smaller.num_bytes < again.num_bytes and small.stat().st_size < out.stat().st_size


def test_without_a_family_all_are_tried(tmp_path, capsys):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    from safetensors.torch import save_file

    save_file(
        {f"{stem}.lora_up.weight": torch.ones(1280, 2), f"{stem}.lora_down.weight": torch.ones(2, 2048)},
        tmp_path / "a.safetensors",
    )
    assert main(["lora", "inspect", str(tmp_path / "a.safetensors")]) == 0
    assert "1 of 1 keys matched\nfamily: xl (as tried)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["merge", "CKPT", "NEW", "--lora", "STYLE:x"], "FILE:STRENGTH"),
        (["merge", "CKPT", "NEW", "--lora", "nowhere.safetensors:1"], "lora='nowhere.safetensors'"),
        (["merge", "CKPT", "STYLE", "--lora", "STYLE"], "it is there already"),
        (["resize", "STYLE", "NEW", "--ckpt", "CKPT", "--rank", "0"], "rank=0: 1 or more"),
        (["extract", "CKPT", "CKPT", "NEW"], "nothing to extract"),
        (["extract", "CKPT", "CKPT", "STYLE"], "it is there already"),
        (["inspect", "STYLE"], "lora="),
        (["inspect", "CKPT"], "it is no adapter"),
    ],
    ids=str,
)
def test_what_can_be_mended_is_one_line(style, tmp_path, capsys, words, why):
    places = {"CKPT": str(checkpoint_of("sd1")), "STYLE": str(style), "NEW": str(tmp_path / "new.safetensors")}
    given = [next((w.replace(k, v) for k, v in places.items() if w.startswith(k)), w) for w in words]
    assert main(["lora", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sfumato lora: error: ") and why in error
    assert not (tmp_path / "new.safetensors").exists()
