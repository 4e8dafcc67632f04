"""The documentation site builds, strictly, and asks nobody else's host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*href=["']?https?://"""
    )
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not [found for found in fetched.findall(text) if "canonical" not in found], page
    api = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    assert "from_pretrained" in api and "The one description of pictures to make" in api
    assert "--n_samples" in (tmp_path / "reference" / "command-line.html").read_text(encoding="utf-8")
