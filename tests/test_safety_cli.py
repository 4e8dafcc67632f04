"""Looking, marking and signing from the command line, and that what was done is done again by replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from imwatermark import WatermarkDecoder
from PIL import Image
from transformers import CLIPConfig

from sfumato.cli.drawing import original_script, run
from sfumato.cli.main import main, run_command
from sfumato.cli.txt2img import ORIGINAL
from sfumato.images import load_png
from sfumato.safety import dwtdct, opennsfw, provenance
from sfumato.safety.marks import Mark, marked

SMALL = ["--H", "96", "--W", "96", "--steps", "2", "--prompt", "a cat"]


@pytest.fixture(scope="module")
def checker(tmp_path_factory) -> dict[bool, Path]:
    """Folders of checkers that flag every picture, and none."""
    folders = {}
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    for flags in (True, False):
        folders[flags] = tmp_path_factory.mktemp("checker")
        peer = StableDiffusionSafetyChecker(CLIPConfig(vision_config=shape, projection_dim=16))
        with torch.no_grad():
            peer.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
            peer.special_care_embeds_weights.fill_(2.0)
        peer.save_pretrained(folders[flags])
    return folders


def draw(ckpt: Path, out: Path, *flags: object) -> int:
    return main(["txt2img", "--ckpt", str(ckpt), "--outdir", str(out), *map(str, flags)])


@pytest.fixture
def small_marks(monkeypatch):
    """Marks in pictures that the tiny model draws in no time; whether they can be read there is not asked."""
    monkeypatch.setattr(dwtdct, "SMALLEST", 96 * 96)


def enlarge(ckpt: Path, folder: Path, *flags: object) -> Path:
    """A picture of 256 x 264 px that `sfumato upscale` makes of a smooth one."""
    y, x = np.mgrid[:128, :132]
    pixels = np.stack([x + 60, y + 40, 128 + 60 * np.sin(x / 9)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "begin.png")
    words = ["upscale", "--ckpt", ckpt, "--image", folder / "begin.png", "--outdir", folder, *flags]
    assert main([str(word) for word in words]) == 0
    return folder / "samples" / "00000.png"


@pytest.mark.parametrize("method", ["dwtdct", "strong"])
def test_a_mark_is_in_the_picture_and_replay_puts_it_there_again(tiny_checkpoint, tmp_path, capsys, method):
    text = [] if method == "dwtdct" else ["mine"]
    path = enlarge(tiny_checkpoint, tmp_path, "--watermark", *text, "--watermark-method", method)
    pixels, made = load_png(path)
    wanted = (text or ["StableDiffusionV1"])[0]
    assert pixels.shape == (256, 264, 3) and made["watermark"] == {"text": wanted, "method": method}
    if method == "dwtdct":
        theirs = WatermarkDecoder("bytes", 136).decode(pixels[..., ::-1].copy(), "dwtDct")
        assert theirs == b"StableDiffusionV1"
    capsys.readouterr()
    assert main(["watermark", "read", str(path)]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    again = tmp_path / "again.png"
    assert main(["replay", str(path), "--ckpt", str(tiny_checkpoint), "--out", str(again)]) == 0
    assert np.array_equal(load_png(again)[0], pixels) and load_png(again)[1]["watermark"] == made["watermark"]


def test_without_the_flag_there_is_no_mark(tiny_checkpoint, tmp_path, capsys):
    path = enlarge(tiny_checkpoint, tmp_path)
    assert not {"watermark", "safety", "signature"} & set(load_png(path)[1])
    capsys.readouterr()
    assert main(["watermark", "read", str(path)]) == 1
    assert capsys.readouterr().out == ""


def test_no_room_is_said_before_drawing(tiny_checkpoint, tmp_path, capsys):
    small = ["--H", "16", "--W", "16", "--steps", "1", "--prompt", ""]
    assert draw(tiny_checkpoint, tmp_path, *small, "--watermark") == 2
    assert "256 x 256 or as many are needed" in capsys.readouterr().err
    assert list((tmp_path / "samples").iterdir()) == []
    assert draw(tiny_checkpoint, tmp_path, *small, "--watermark", "x" * 30, "--watermark-method", "strong") == 2
    assert "30 bytes; 24 are allowed" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["report", "blur", "withhold"])
def test_policies_are_told_and_done_again(tiny_checkpoint, tmp_path, checker, policy, caplog):
    flags = ["--steps", "2", "--prompt", "a cat", "--n_samples", "2", "--film", "png"]
    assert draw(tiny_checkpoint, tmp_path / "free", *flags) == 0
    for flagged in (True, False):
        out = tmp_path / str(flagged)
        guarded = ["--safety", policy, "--safety-checker", checker[flagged]]
        assert draw(tiny_checkpoint, out, *flags, *guarded) == 0
        pixels, made = load_png(out / "samples" / "00001.png")
        free, _ = load_png(tmp_path / "free" / "samples" / "00001.png")
        assert made["safety"]["flagged"] is flagged and made["safety"]["policy"] == policy
        assert made["safety"]["checker"] == "stable-diffusion-safety-checker" and len(made["safety"]["scores"]) == 20
        hidden = flagged and policy != "report"
        assert np.array_equal(pixels, free) is not hidden
        assert (pixels == 128).all() == (hidden and policy == "withhold")
        assert (out / "samples" / "00001-film.png").exists() is not hidden, "a film would show it"
        with Image.open(out / "grid-0000.png") as grid, Image.open(tmp_path / "free" / "grid-0000.png") as theirs:
            assert (grid.tobytes() == theirs.tobytes()) is not hidden
        assert main(["replay", str(out / "samples" / "00001.png"), "--ckpt", str(tiny_checkpoint)]) == 0


def test_a_checker_without_a_policy_is_a_mistake(tiny_checkpoint, tmp_path, checker, capsys):
    assert draw(tiny_checkpoint, tmp_path, *SMALL, "--safety-checker", checker[True]) == 2
    assert "--safety says what is done" in capsys.readouterr().err


def test_refused_words(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "words").write_text("cat\n")
    assert draw(tiny_checkpoint, tmp_path, *SMALL, "--refuse-words", tmp_path / "words") == 2
    assert "prompt: refused by word list words (cat)" in capsys.readouterr().err
    assert (
        draw(tiny_checkpoint, tmp_path, "--steps", "1", "--prompt", "a dog", "--refuse-words", tmp_path / "words") == 0
    )


HIRES = ["--H", 16, "--W", 16, "--steps", 1, "--hires", 2, "--hires-strength", 0.5]


def test_refused_words_of_the_second_pass(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "words").write_text("cat\n")
    refusing = ["--refuse-words", tmp_path / "words"]
    second = [*HIRES, "--prompt", "a dog", "--hires-prompt", "a Cat"]
    assert draw(tiny_checkpoint, tmp_path / "a", *second, *refusing) == 2
    assert "prompt: refused by word list words (cat)" in capsys.readouterr().err
    assert not list((tmp_path / "a").glob("**/*.png"))
    plot = ["--x", "hires.prompt=a dog,a cat", *HIRES, "--prompt", "", "--out", tmp_path / "plot.png"]
    assert ours("plot", tiny_checkpoint, *plot, *refusing) == 2
    assert "(cat)" in capsys.readouterr().err and not (tmp_path / "plot.png").exists()
    assert draw(tiny_checkpoint, tmp_path / "a", *second) == 0
    capsys.readouterr()
    again = ["replay", tmp_path / "a/samples/00000.png", "--out", tmp_path / "again.png"]
    assert ours(again[0], tiny_checkpoint, *again[1:], *refusing) == 2
    assert "(cat)" in capsys.readouterr().err and not (tmp_path / "again.png").exists()


def test_refused_words_of_rows(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "words").write_text("cat\n")
    (tmp_path / "rows.csv").write_text("prompt,seed\na dog,1\na bird,2\n")
    words = [tmp_path / "rows.csv", tmp_path / "out", *HIRES, "--hires-prompt", "a cat"]
    ours("batch", tiny_checkpoint, *words, "--refuse-words", tmp_path / "words")
    assert "refused by word list words (cat)" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/**/*.png"))


def test_the_original_scripts_look_and_mark(tiny_checkpoint, tmp_path, small_marks, monkeypatch):
    def script(*flags: object) -> int:
        given = ["--ckpt", str(tiny_checkpoint), "--prompt", "a cat", "--ddim_steps", "2", "--n_iter", "1"]
        args = original_script(ORIGINAL, "txt2img.py", [*given, "--n_samples", "1", *map(str, flags)])
        return run_command(run, args, "txt2img.py")

    assert script("--H", 96, "--W", 96, "--watermark", "", "--safety", "off", "--outdir", tmp_path / "a") == 0
    plain, made = load_png(tmp_path / "a" / "samples" / "00000.png")
    assert not {"watermark", "safety"} & set(made)
    assert script("--H", 96, "--W", 96, "--outdir", tmp_path / "b") == 0
    pixels, made = load_png(tmp_path / "b" / "samples" / "00000.png")
    assert made["watermark"]["text"] == "StableDiffusionV1" and made["safety"]["policy"] == "blur"
    assert np.array_equal(pixels, marked(plain, Mark())) and not np.array_equal(pixels, plain)
    with Image.open(tmp_path / "a" / "grid-0000.png") as grid, Image.open(tmp_path / "b" / "grid-0000.png") as theirs:
        assert np.array_equal(np.asarray(theirs), marked(np.asarray(grid), Mark()))
    monkeypatch.setattr(opennsfw, "PACKAGE", "no_such_package_at_all")
    assert script("--H", 16, "--W", 16, "--outdir", tmp_path / "c") == 0, "too small for a mark: drawn without"
    assert not {"watermark", "safety"} & set(load_png(tmp_path / "c" / "samples" / "00000.png")[1])


def test_signed_pictures(tiny_checkpoint, tmp_path, small_marks, capsys):
    assert main(["keys", "new", str(tmp_path / "key")]) == 0
    assert draw(tiny_checkpoint, tmp_path, *SMALL, "--watermark", "--sign", tmp_path / "key") == 0
    path = tmp_path / "samples" / "00000.png"
    assert main(["verify", str(path), "--key", str(tmp_path / "key.pub")]) == 0
    assert load_png(path)[1]["signature"]["by"] == provenance.load_public(tmp_path / "key.pub")
    assert main(["replay", str(path), "--ckpt", str(tiny_checkpoint)]) == 0
    assert draw(tiny_checkpoint, tmp_path, *SMALL, "--sign", tmp_path / "key.pub") == 2
    assert "no private key" in capsys.readouterr().err


def test_loops_are_looked_at_each_time(tiny_checkpoint, tmp_path, checker):
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "a.png")
    words = ["img2img", "--ckpt", str(tiny_checkpoint), "--image", str(tmp_path / "a.png"), "--prompt", "a cat"]
    words += ["--steps", "2", "--strength", "0.5", "--loopback", "2", "--outdir", str(tmp_path)]
    assert main([*words, "--safety", "withhold", "--safety-checker", str(checker[True])]) == 0
    pictures = [load_png(path)[0] for path in sorted((tmp_path / "samples").glob("*.png"))]
    assert len(pictures) == 2 and all((picture == 128).all() for picture in pictures)


def test_watermarks_of_any_picture(tmp_path, capsys):
    y, x = np.mgrid[:300, :400]
    pixels = np.stack([x * 255 // 400, y * 255 // 300, 128 + 60 * np.sin(x / 9)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for method in ("strong", "dwtdct"):
        for ending in ("png", "jpg", "webp"):
            out = tmp_path / f"{method}.{ending}"
            flags = ["--text", "seventeen letters", "--method", method]
            assert main(["watermark", "write", str(tmp_path / "a.png"), str(out), *flags]) == 0
            capsys.readouterr()
            assert main(["watermark", "read", str(out), "--method", method]) == 0
            assert capsys.readouterr().out == "seventeen letters\n"
    assert main(["watermark", "write", str(tmp_path / "a.png"), str(tmp_path / "a.bmp")]) == 2
    assert "out=" in capsys.readouterr().err


def test_a_mark_keeps_the_recipe_and_drops_the_signature(tiny_checkpoint, tmp_path):
    assert main(["keys", "new", str(tmp_path / "key")]) == 0
    path, out = enlarge(tiny_checkpoint, tmp_path, "--sign", tmp_path / "key"), tmp_path / "marked.png"
    assert main(["verify", str(path)]) == 0
    assert main(["watermark", "write", str(path), str(out), "--method", "dwtdct"]) == 0
    before, after = load_png(path)[1], load_png(out)[1]
    assert "signature" in before
    assert after == {name: value for name, value in before.items() if name != "signature"}
    assert main(["verify", str(out)]) == 1


def test_check_tells_each_picture(checker, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    assert main(["check", str(tmp_path), "--safety-checker", str(checker[True])]) == 1
    assert '"flagged": true' in capsys.readouterr().out
    assert main(["check", str(tmp_path / "a.png"), "--safety-checker", str(checker[False]), "--flagged"]) == 0
    assert capsys.readouterr().out == ""


def ours(command: str, ckpt: Path, *flags: object) -> int:
    return main([command, *map(str, flags), "--ckpt", str(ckpt)])


@pytest.fixture
def begin(tmp_path) -> Path:
    """A folder with one picture of 96 px and its caption."""
    folder = tmp_path / "begin"
    folder.mkdir()
    y, x = np.mgrid[:96, :96]
    Image.fromarray(np.stack([x + 60, y + 40, x + y], axis=-1).astype(np.uint8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")
    return folder


@pytest.fixture
def key(tmp_path) -> Path:
    assert main(["keys", "new", str(tmp_path / "key")]) == 0
    return tmp_path / "key"


@pytest.mark.parametrize("command", ["edit", "augment", "plot"])
def test_other_commands_treat_mark_and_sign(tiny_checkpoint, tmp_path, checker, small_marks, begin, key, command):
    words = {
        "edit": ["--image", begin / "a.png", "--steps", 2, "--rounds", 1, "--outdir", tmp_path / "out"],
        "augment": [begin, tmp_path / "out", "--steps", 2],
        "plot": ["--x", "seed=1,2", *SMALL, "--out", tmp_path / "out.png"],
    }[command]
    path = {"edit": tmp_path / "out/samples/00000.png", "augment": tmp_path / "out/a-1.png"}.get(
        command, tmp_path / "out.png"
    )
    guarded = ["--safety", "withhold", "--safety-checker", checker[True], "--watermark", "mine", "--sign", key]
    assert ours(command, tiny_checkpoint, *words, *guarded) == 0
    pixels, made = load_png(path)
    assert provenance.verify(pixels, made).sound
    left, top, right, bottom = 0, 0, 96, 96
    if command == "plot":
        left, top, right, bottom = made["plot"]["cells"][1]["box"]
        made = made["plot"]["cells"][1]["recipe"]
    assert made["safety"]["flagged"] and made["safety"]["policy"] == "withhold"
    assert made["watermark"] == {"text": "mine", "method": "dwtdct"}
    grey = marked(np.full((96, 96, 3), 128, np.uint8), Mark("mine", "dwtdct"))
    assert np.array_equal(pixels[top:bottom, left:right], grey)
    if command != "edit":
        cell = ["--cell", 2] if command == "plot" else []
        assert ours("replay", tiny_checkpoint, path, *cell) == 0


@pytest.mark.parametrize("command", ["edit", "augment", "plot", "replay"])
def test_other_commands_refuse_words_before_they_draw(tiny_checkpoint, tmp_path, begin, capsys, command):
    (tmp_path / "words.txt").write_text("cat\n")
    assert draw(tiny_checkpoint, tmp_path / "drawn", *SMALL) == 0
    words = {
        "edit": ["--image", begin / "a.png", "--prompt", "a dog", "--to", "a cat", "--outdir", tmp_path / "out"],
        "augment": [begin, tmp_path / "out"],
        "plot": ["--x", "seed=1,2", *SMALL, "--out", tmp_path / "out.png"],
        "replay": [tmp_path / "drawn/samples/00000.png", "--out", tmp_path / "out.png"],
    }[command]
    capsys.readouterr()
    assert ours(command, tiny_checkpoint, *words, "--refuse-words", tmp_path / "words.txt") == 2
    assert "refused by word list words.txt (cat)" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*/**/*.png")) and not (tmp_path / "out.png").exists()


def test_replay_keeps_what_was_done_and_adds_what_is_asked(tiny_checkpoint, tmp_path, checker, small_marks, key):
    guarded = ["--safety", "blur", "--safety-checker", checker[True]]
    assert draw(tiny_checkpoint, tmp_path, *SMALL, *guarded) == 0
    path, out = tmp_path / "samples/00000.png", tmp_path / "again.png"
    blurred, told = load_png(path)
    assert ours("replay", tiny_checkpoint, path, "--out", out, "--watermark", "mine", "--sign", key) == 0
    pixels, made = load_png(out)
    assert made["safety"] == told["safety"] and np.array_equal(pixels, marked(blurred, Mark("mine", "dwtdct")))
    assert provenance.verify(pixels, made).sound
    withheld = ["--safety", "withhold", "--safety-checker", checker[True]]
    assert ours("replay", tiny_checkpoint, out, "--out", tmp_path / "third.png", *withheld) == 0
    pixels, made = load_png(tmp_path / "third.png")
    assert made["safety"]["policy"] == "withhold" and made["watermark"]["text"] == "mine"
    assert np.array_equal(pixels, marked(np.full((96, 96, 3), 128, np.uint8), Mark("mine", "dwtdct")))
