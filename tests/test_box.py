"""The model in the box: the shipped file is what it says, and its pictures follow their prompts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from recipes.box.captions import BACKGROUNDS
from sfumato.cli.main import main
from sfumato.families import BOX, Family
from sfumato.images import load_png
from sfumato.pipeline import Pipeline, box_path

CORNER = 8  # px; things are kept away from the corners


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(device="cpu")


def corners(images: np.ndarray) -> np.ndarray:
    """Mean colour (B, 3) of the four corners of pictures (B, H, W, 3)."""
    ends = [slice(0, CORNER), slice(-CORNER, None)]
    parts = [images[:, rows, columns].reshape(len(images), -1, 3) for rows in ends for columns in ends]
    return np.concatenate(parts, axis=1).mean(axis=1)


def nearest(colour: np.ndarray) -> str:
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(colour - BACKGROUNDS[name])))


def test_the_file_is_small_half_precision_and_describes_itself():
    path = box_path()
    assert path.stat().st_size <= 60_000_000
    with safe_open(str(path), framework="pt") as file:
        assert Family.from_json(file.metadata()["sfumato.family"]) == BOX
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.")
    assert all(name.startswith(prefixes) for name in names)


def test_loading_does_not_load_torchs_compiler():
    """It takes two seconds, and a picture takes four."""
    code = "import sys; from sfumato.pipeline import Pipeline; Pipeline.from_pretrained(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split()


def test_backgrounds_follow_the_prompt(pipe):
    things, colours = ("a cat", "3d octopus", "a guitar"), ("white", "black", "red", "yellow", "green", "blue", "pink")
    found = [
        nearest(corner) == colour
        for colour in colours
        for thing in things
        for corner in corners(pipe(f"{thing} on a {colour} background", count=2, steps=12).images)
    ]
    assert np.mean(found) >= 0.9, found


def test_the_thing_follows_the_prompt(pipe):
    """Mean colours inside tell a red apple from a banana, a tree and a whale, whatever the seed."""
    means = {
        name: pipe(f"{name} on a white background", count=4, steps=12).images[:, 40:88, 40:88].mean(axis=(0, 1, 2))
        for name in ("a red apple", "a banana", "a tree", "a whale")
    }
    red, green, blue = means["a red apple"]
    assert red > 1.5 * green and red > 1.5 * blue
    red, green, blue = means["a banana"]
    assert red > 1.3 * blue and green > 1.3 * blue
    red, green, blue = means["a tree"]
    assert green > 1.3 * red and green > 1.3 * blue
    red, green, blue = means["a whale"]
    assert blue > green > red


def test_guidance_and_negative_do_what_they_should(pipe):
    """More guidance brings the background nearer to the colour asked for; the negative prompt pushes from it."""
    blue = np.array(BACKGROUNDS["blue"])

    def distance(**fields):
        images = pipe("octopus on a blue background", count=4, steps=12, **fields).images
        return np.linalg.norm(corners(images) - blue, axis=1).mean()

    assert distance(guidance=4.0) < distance(guidance=0.0)
    plain = corners(pipe("octopus", count=4, steps=12, seed=3).images).mean()
    pushed = corners(pipe("octopus", negative="octopus on a white background", count=4, steps=12, seed=3).images).mean()
    assert pushed < plain - 20


def test_without_a_checkpoint_the_box_draws_and_replays(tmp_path, capsys):
    assert main(["txt2img", "--prompt", "a red apple", "--outdir", str(tmp_path), "--device", "cpu"]) == 0
    path = tmp_path / "samples" / "00000.png"
    pixels, recipe = load_png(path)
    assert pixels.shape == (128, 128, 3) and recipe["model"]["name"] == "box"
    assert main(["replay", str(path), "--device", "cpu"]) == 0
    assert main(["txt2img", "--prompt", "a", "--ckpt", str(box_path()), "--steps", "2", "--outdir", str(tmp_path)]) == 0
