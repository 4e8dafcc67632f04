"""The box's probe: its questions fit the judge's answers, and the judge reads as a probe's reader."""

from __future__ import annotations

import numpy as np
import torch

from recipes.box import bias
from recipes.box.judge import HEADS, Judge
from sfumato.evaluate.probe import Probe
from sfumato.weights.files import save_safetensors


def test_every_question_can_be_answered():
    probe = Probe(tuple(bias.questions()), {name: tuple(options) for name, options in HEADS.items()})
    prompts = [asked.prompt for asked in probe.prompts]
    assert {"a cat", "3d dog", "a cat on an orange background", "five stars", "hello", ""} <= set(prompts)
    assert all(asked.group for asked in probe.prompts)
    beside = next(asked for asked in probe.prompts if asked.prompt == "a cat to the left of a dog")
    assert beside.asks == {"placing": "beside", "first": "cat", "second": "dog"}


def test_the_judge_is_a_reader(tmp_path):
    torch.manual_seed(0)
    judge = Judge().eval()
    save_safetensors(tmp_path / "state.safetensors", {f"ema.{k}": v for k, v in judge.state_dict().items()}, {})
    reader = bias.Judged(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    read = reader.read(list(pixels))
    with torch.inference_mode():
        wanted = judge(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    for name, options in HEADS.items():
        assert read[name].shape == (3, len(options))
        assert torch.allclose(read[name], wanted[name].softmax(-1), atol=1e-6)
