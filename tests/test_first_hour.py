"""The first hour: its commands are those of the learning pages, and (slow) a stranger's new environment can do them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs_tools import first_hour
from sfumato.types import Job

ROOT = Path(__file__).parents[1]
SAID = [
    shlex.split(line)[1:]
    for page in (ROOT / "docs" / "learn").glob("*.md")
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith("sfumato ")
]


@pytest.mark.parametrize("what", [what for what in first_hour.COMMANDS if what != "the same again, pixel for pixel"])
def test_what_is_done_is_what_the_pages_say(what):
    assert list(first_hour.COMMANDS[what]) in SAID


def test_what_is_drawn_again_is_what_was_drawn():
    draw, again = first_hour.COMMANDS["draw"], first_hour.COMMANDS["the same again, pixel for pixel"]
    assert list(again) == ["replay", f"{draw[-1]}/samples/00000.png"]
    assert ["replay", "outputs/txt2img-samples/samples/00000.png"] in SAID


def test_the_request_is_that_of_the_page_of_serving():
    assert f"-d '{json.dumps(first_hour.JOB)}'" in (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert Job(**first_hour.JOB).seed == 7


def test_the_mask_is_that_of_the_page(tmp_path):
    first_hour.write_mask(tmp_path / "mask.png")
    expected = np.zeros((128, 128), np.uint8)
    expected[32:96, 32:96] = 255
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "L" and np.array_equal(np.array(mask), expected)


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code 3: lost"):
        first_hour._run([sys.executable, "-c", "print('lost'); raise SystemExit(3)"], tmp_path)


def test_nothing_of_ours_is_in_the_surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SFUMATO_ADAPTERS", str(ROOT))
    found = first_hour._surroundings(tmp_path)
    assert not {"PYTHONPATH", "SFUMATO_ADAPTERS"} & set(found)
    assert found["SFUMATO_CACHE"].startswith(str(tmp_path)) and found["SFUMATO_CONFIG"].startswith(str(tmp_path))


@pytest.mark.services
@pytest.mark.skipif("SFUMATO_FIRST_HOUR" not in os.environ, reason="a minute of processor: set SFUMATO_FIRST_HOUR=1")
def test_a_stranger_can_do_it(tmp_path):
    words = ["-m", "docs_tools.first_hour", "--with-site-packages", "--folder", str(tmp_path / "new")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert all(f"{what} " in done.stdout for what in (*first_hour.COMMANDS, "serve: one request to its picture", "all"))
    assert len(list((tmp_path / "new").glob("**/samples/*.png"))) == 4
