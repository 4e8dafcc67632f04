"""The benchmark of whole pictures does what it says, at a tiny size; OpenVINO as a peer where it is installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import picture_512, unet_call
from sfumato.weights.files import open_tensors
from tests.tiny import TINIES

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def arguments(**others: object) -> argparse.Namespace:
    usual = {"family": "small", "size": 64, "steps": 2, "turns": 1, "threads": 1, "vram": 1.0}
    return argparse.Namespace(**{**usual, "programs": ["plain", "diffusers"], **others})


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs are found from the repository's root."""
    monkeypatch.chdir(Path(__file__).parents[1])


def test_both_programs_draw_the_same_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = picture_512.measured(arguments(), tmp_path)
    folder = tmp_path / "small"
    files = [open_tensors(path) for path in folder.rglob("*.safetensors")]
    numbers = sum(int(np.prod(file.shape(name))) for file in files for name in file.names())
    assert found["weights"] == 4 * numbers > 40e6
    for program in ("plain", "diffusers"):
        (run,) = found["runs"][program]
        assert run["calls"] == 2, "two steps, both rows in one call"
        stages = ("before", "load", "unet", "decode")
        assert all(run["wall"][stage] > 0 and run["processor"][stage] > 0 for stage in stages)
        for clock in ("wall", "processor"):
            assert sum(run[clock][stage] for stage in stages) <= run[clock]["whole"]
        assert run["peaks"]["load"] <= run["peaks"]["unet"] <= run["peaks"]["decode"] <= run["peak"]
        assert found["peak of weights"][program] == run["peak"] / found["weights"] > 1
        assert Image.open(tmp_path / f"{program}.png").size == (64, 64)
    assert found["apart"]["plain"]["worst"] <= 2 and found["apart"]["diffusers"]["std"] > 5
    ours, theirs = (found["runs"][name][0]["processor"]["whole"] for name in ("plain", "diffusers"))
    assert found["ratio"]["plain"]["processor"].median == pytest.approx(ours / theirs)
    assert capsys.readouterr().out.count("2 calls") == 2
    json.dumps(found["runs"])


def test_a_program_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="plain: "):
        picture_512.run("plain", tmp_path / "nothing", tmp_path / "a.png", arguments())


def test_how_far_pictures_are(tmp_path: Path) -> None:
    one = np.full((4, 4, 3), 100, np.uint8)
    other = one.copy()
    other[0, 0, 0] = 148
    paths = {"plain": tmp_path / "a.png", "diffusers": tmp_path / "b.png"}
    for path, pixels in zip(paths.values(), (one, other), strict=True):
        Image.fromarray(pixels).save(path)
    found = picture_512.apart(paths)
    assert found["plain"] == {"worst": 48.0, "mean": 1.0}
    assert found["diffusers"]["std"] > 0


def test_openvino_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["unet_call", "--openvino"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        unet_call.main()
    assert "the package openvino is not installed" in capsys.readouterr().err


def test_openvino_answers_as_diffusers_does() -> None:
    pytest.importorskip("openvino")
    family = TINIES["sd1"]
    peer, given = unet_call.theirs(family, unet_call.weights(family)), unet_call.inputs(family, 8, 2)
    answer = unet_call.by_openvino(peer, given, 1)()
    with torch.inference_mode():
        assert torch.allclose(answer, peer(*given).sample, atol=1e-4)
