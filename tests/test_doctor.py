"""`sfumato doctor` and `sfumato completion`, and what every command's help says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.cli import completion, doctor
from sfumato.cli.main import COMMANDS, EXIT_CODES, main, parser
from sfumato.pipeline import Pipeline


@pytest.fixture(scope="module")
def report() -> Iterator[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "TEST_SECONDS", 120.0)  # the machine that tests may be busy
        yield doctor.examine("cpu", "full")


def test_this_machine_is_well(report):
    assert report["problems"] == []
    test = report["self-test"]
    assert test["difference"] <= test["allowed"]
    assert test["loading seconds"] > 0 and test["drawing seconds"] > 0
    assert report["versions"]["torch"] == torch.__version__ and "missing" not in report["versions"].values()
    assert report["choice"]["device"] == "cpu" and report["choice"]["precision"] == "float32"
    assert report["choice"]["threads"] == torch.get_num_threads()
    assert report["machine"]["devices"][-1]["name"] == "cpu"
    assert set(report["fits"]) == {"sd1", "sd2", "xl"}


def test_what_is_told_names_every_part(report):
    lines = doctor.told(report)
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == [
        "versions", "machine", "would be chosen", "places", "one picture of", "extras", "self-test", "problems",
        "advice",
    ]  # fmt: skip
    assert any("box.safetensors" in line for line in lines)


def test_another_picture_is_told():
    pixels = np.full((128, 128, 3), 255, np.uint8)
    facts = doctor.compared(pixels, "float32")
    assert "from the expected one" in facts["problem"] and facts["difference"] > 200
    assert facts["seen"] == [[255.0] * 3] * 16


def test_a_picture_that_is_off_by_a_little_passes_and_by_more_does_not():
    blocks = np.array(doctor.EXPECTED, np.uint8).reshape(4, 4, 3)
    picture = blocks.repeat(32, 0).repeat(32, 1)
    assert doctor.compared(picture, "float32")["difference"] == 0
    picture[:32, :32, 0] -= 3
    assert "problem" in doctor.compared(picture, "float32")
    assert "problem" not in doctor.compared(picture, "bfloat16")


def test_a_box_that_is_damaged_or_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "TEST_MODEL", "0" * 10)
    assert "is damaged" in doctor.self_test("cpu", "full")["problem"]
    monkeypatch.setattr("sfumato.pipeline.box_path", lambda: tmp_path / "box.safetensors")
    assert "missing" in doctor.self_test("cpu", "full")["problem"]


def test_a_test_that_takes_too_long_stops(monkeypatch):
    monkeypatch.setattr(doctor, "TEST_SECONDS", 0.0)
    assert "slow or busy" in doctor.self_test("cpu", "full")["problem"]


def test_without_torch_it_says_so(tmp_path):
    """In a process whose torch cannot be imported, as after an installation that went wrong."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    command = [sys.executable, "-m", "sfumato.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert any("libcudart" in line for line in json.loads(done.stdout)["problems"])


def test_extras_that_are_missing_come_with_the_line_that_brings_them(monkeypatch):
    lines = ["numpy", 'numpy>=1 ; extra == "one"', 'no-such-library>=2 ; extra == "one"', 'pytest ; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.extras() == {
        "one": {"there": {"numpy": np.__version__}, "missing": ["no-such-library"],
                "install": 'pip install "sfumato[one]"'},
    }  # fmt: skip


def test_advice_names_threads_folders_and_disk(report):
    bad = {
        "choice": {"device": "cpu", "threads": 8},
        "machine": {"usable cores": 2, "free disk GiB": 0.1},
        "places": {"adapters missing": ["loras"]},
        "fits": {"xl": "does not fit: too large"},
    }
    found = "\n".join(doctor.advice(bad))
    for words in ("OMP_NUM_THREADS=2", "loras is no folder", "0.1 GiB", "xl does not fit"):
        assert words in found


def test_the_command_prints_json_and_bad_devices_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json", "--no-test", "--device", "cpu"]) == 0
    assert "self-test" not in json.loads(capsys.readouterr().out)
    assert main(["doctor", "--no-test", "--device", "abacus"]) == 2
    assert "device='abacus'" in capsys.readouterr().err


def test_the_test_picture_is_the_apple_that_was_expected():
    """Red in the middle, white in the corners: the expected numbers are of a picture, not of noise."""
    red, green, blue = np.array(doctor.EXPECTED).reshape(4, 4, 3)[1:3, 1:3].mean((0, 1))
    assert red > 200 and max(green, blue) < 60
    assert all(min(doctor.EXPECTED[corner]) > 220 for corner in (0, 3, 12, 15))
    assert Pipeline.from_pretrained(device="cpu", adapters=[]).model.hash == doctor.TEST_MODEL


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from sfumato.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert "torch" not in done.stdout.split() and "numpy" not in done.stdout.split()
    assert seconds < 3  # about 0.2 where nothing else runs
    for code, meaning in EXIT_CODES.items():
        assert f"{code}: {meaning}" in " ".join(done.stdout.split())


def test_every_command_has_an_example_that_its_parser_takes():
    import shlex

    top = parser()
    for name, (summary, example) in COMMANDS.items():
        assert summary and summary[0].islower()
        args = top.parse_args([name, *shlex.split(example)])
        assert args.name == f"sfumato {name}"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command_and_its_flags(shell):
    pytest.importorskip("shtab")
    text = completion.script(shell)
    assert all(name in text for name in COMMANDS) and "--ddim_steps" in text.replace("-l ddim_steps", "--ddim_steps")
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=text, text=True, capture_output=True).returncode == 0


def test_completion_without_shtab_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert 'pip install "sfumato[completion]"' in capsys.readouterr().err
