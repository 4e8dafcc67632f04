"""Examples and notebooks do what they say, in two steps."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.images import load_png

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_draw_saves_pictures_with_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = example("draw").main(steps=2)
    assert [path.name for path in paths] == [f"apple-{seed}.png" for seed in (7, 8, 9, 10)]
    pixels, recipe = load_png(paths[3])
    assert pixels.shape == (128, 128, 3) and recipe["index"] == 3 and recipe["job"]["seed"] == 7


def test_an_own_sampler_draws_an_apple_and_goes_again():
    before = dict(SAMPLERS)
    picture = example("own_sampler").main(steps=10).astype(float)
    red, green, blue = picture[48:80, 48:80].mean((0, 1))
    assert red > 1.5 * green and red > 1.5 * blue
    assert before == SAMPLERS


def test_watching_sees_every_step_and_the_belief_settles():
    moves = example("watch").main(steps=6)
    assert len(moves) == 5 and moves[-1] == min(moves)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), "notebooks are kept without outputs"
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"\bsteps ?= ?\d+", "steps=2", cell.source)
    nbclient.NotebookClient(
        book, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [
        output for cell in book.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert shown, "at least one picture is shown"


def test_the_tiny_thing_of_the_notebook_learns():
    """Its own code, with fewer steps than it has: the loss must fall, so that the notebook is no empty ceremony."""
    nbformat = pytest.importorskip("nbformat")
    (path,) = [each for each in NOTEBOOKS if "tiny" in each.stem]
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    names: dict = {}
    exec(compile(re.sub(r"\bsteps ?= ?\d+", "steps = 60", text), path.name, "exec"), names)
    losses = names["losses"]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
