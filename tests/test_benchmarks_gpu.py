"""The GPU's table, all of it, at tiny size on a CPU; torch.compile without Inductor, whose own test is elsewhere."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu


def test_every_way_is_measured_and_answers_alike(capsys, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(gpu, "why_not", lambda _: None)
    torch._dynamo.reset()
    words = ["--device", "cpu", "--tiny", "--turns", "1", "--backend", "eager", "--sizes", "xl"]
    args = gpu.flags().parse_args([*words, "--precision", "fp32"])
    found = gpu.measured(gpu.tiny(gpu.SIZES["xl"]), args)
    torch._dynamo.reset()
    assert list(found["seconds"]) == ["eager", "compiled", "diffusers", "diffusers, compiled"]
    assert max(found["apart"].values()) < 1e-4
    assert all(len(taken) == 1 and taken[0] > 0 for taken in found["seconds"].values())


def test_tables_are_told(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda _: "there is no compiler")
    assert gpu.main(["--device", "cpu", "--tiny", "--turns", "1", "--no-peers", "--weights", "int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sd15: nothing is compiled, because there is no compiler"
    assert [line.split(",")[0] for line in lines if "steps of two rows" in line] == ["sd15", "xl"]
    assert sum("steps a second" in line for line in lines) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
def test_without_a_card_one_line_says_so(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().out == (
        "gpu: there is no CUDA card here; --device cpu --tiny runs all of it at tiny size\n"
    )
