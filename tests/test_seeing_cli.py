"""Films, heat maps, edits, latent files and augmenting from the command line, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.images import load_png


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture whose size is no multiple of the model's step."""
    y, x = np.mgrid[:18, :22]
    pixels = np.stack([10 * x, 12 * y, 120 + 0 * x], axis=-1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(ckpt: Path, command: str, *flags: str) -> int:
    return main([command, *flags, "--ckpt", str(ckpt)])


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize("ending", ["png", "gif", "webp"])
def test_a_film_ends_with_its_picture(tiny_checkpoint, tmp_path, picture, ending):
    out = tmp_path / "out"
    flags = ["--prompt", "a cat", "--steps", "3", "--outdir", str(out), "--film", ending, "--preview", "full"]
    assert run(tiny_checkpoint, "img2img", "--image", str(picture), *flags, "--count", "2", "--skip_grid") == 0
    for number in (0, 1):
        last = pixels_of(out / "samples" / f"{number:05}.png")
        film = out / "samples" / f"{number:05}-film.{ending}"
        with Image.open(film) as opened:
            if ending == "png":
                whole = np.asarray(opened)
                assert np.array_equal(whole[2:20, -24:-2], last)
            else:
                assert opened.n_frames >= 2 and opened.size == (22, 18)


def test_frames_lie_where_the_picture_lies(tiny_checkpoint, tmp_path, picture):
    """The last thing that the network believed in is nearly the picture, cut and composed as the picture is."""
    mask = np.zeros((18, 22), np.uint8)
    mask[4:10, 5:12] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    cases = [
        ("img2img", []),
        ("inpaint", ["--mask", str(tmp_path / "m.png")]),
        ("inpaint", ["--mask", str(tmp_path / "m.png"), "--only-masked", "--padding", "2"]),
        ("outpaint", ["--left", "6"]),
    ]
    for number, (command, flags) in enumerate(cases):
        out = tmp_path / f"out{number}"
        common = ["--prompt", "a", "--steps", "4", "--sampler", "euler", "--guidance", "1", "--outdir", str(out)]
        film = ["--film", "png", "--preview", "full"]
        assert run(tiny_checkpoint, command, "--image", str(picture), *flags, *common, *film) == 0
        last = pixels_of(out / "samples" / "00000.png").astype(int)
        strip = pixels_of(out / "samples" / "00000-film.png").astype(int)
        wide = last.shape[1]
        before = strip[2:-2, -2 * wide - 4 : -wide - 4]
        assert before.shape == last.shape and np.abs(before - last).mean() < 1, command


def test_where_words_look(tiny_checkpoint, tmp_path, picture, capsys, caplog):
    out = tmp_path / "out"
    flags = ["--prompt", "a red apple", "--steps", "2", "--outdir", str(out), "--where", "apple", "--where", "red"]
    assert run(tiny_checkpoint, "txt2img", *flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    both = pixels_of(out / "samples" / "00000-where-apple.png")
    assert both.shape == (16, 32, 3) and np.array_equal(both[:, :16], pixels_of(out / "samples" / "00000.png"))
    assert run(tiny_checkpoint, "txt2img", *flags[:-1], "zebra") == 2
    assert "where='zebra'" in capsys.readouterr().err
    pair = ["--image", str(picture), "--prompt", "an apple", "--where", "apple", "--steps", "2", "--outdir", str(out)]
    assert run(tiny_checkpoint, "outpaint", *pair, "--left", "4", "--count", "2", "--skip_grid") == 0
    assert run(tiny_checkpoint, "img2img", *pair, "--strength", "0") == 0
    assert "nothing was drawn" in caplog.text
    assert run(tiny_checkpoint, "upscale", *pair, "--strength", "0.5") == 2
    assert run(tiny_checkpoint, "img2img", *pair, "--skip_save") == 2


def test_an_edit(tiny_checkpoint, tmp_path, picture, capsys):
    out = tmp_path / "out"
    flags = ["--image", str(picture), "--prompt", "a cat", "--steps", "20", "--outdir", str(out)]
    assert run(tiny_checkpoint, "edit", *flags, "--guidance", "1", "--rounds", "30") == 0
    assert run(tiny_checkpoint, "img2img", "--image", str(picture), "--prompt", "a", "--strength", "0", "--outdir",
               str(out)) == 0  # fmt: skip
    assert run(tiny_checkpoint, "edit", *flags, "--to", "a dog", "--guidance", "9") == 0
    assert run(tiny_checkpoint, "edit", *flags, "--null-text", "--null-rounds", "2", "--guidance", "3") == 0
    again, encoded, other, learnt = (pixels_of(out / "samples" / f"{n:05}.png").astype(int) for n in range(4))
    assert again.shape == (18, 22, 3) == learnt.shape
    assert np.abs(again - encoded).mean() < 0.3 * np.abs(other - encoded).mean(), "another prompt does not return"
    made = load_png(out / "samples" / "00000.png")[1]
    assert made["edit"]["prompt"] == "a cat" and len(made["pictures"]["image"]) == 64
    assert main(["replay", str(out / "samples" / "00000.png")]) == 2
    assert run(tiny_checkpoint, "edit", *flags, "--null-text", "--negative", "blue") == 2
    assert "negative='blue'" in capsys.readouterr().err


def test_compress_and_expand_leave_the_picture_alone(tiny_checkpoint, tmp_path, picture, capsys):
    before = picture.read_bytes()
    assert run(tiny_checkpoint, "compress", str(picture), "--quality", "90") == 0
    path, size, lost = capsys.readouterr().out.strip().split("\t")
    assert Path(path) == tmp_path / "a.sfl" and size == f"{(tmp_path / 'a.sfl').stat().st_size} bytes"
    assert float(lost.removesuffix(" dB")) > 0
    assert run(tiny_checkpoint, "expand", path) == 0
    assert pixels_of(tmp_path / "a-expanded.png").shape == (18, 22, 3)
    assert picture.read_bytes() == before
    Image.open(picture).save(tmp_path / "a.bmp")
    assert run(tiny_checkpoint, "compress", str(picture), str(tmp_path / "a.bmp")) == 2
    assert run(tiny_checkpoint, "expand", str(picture)) == 2
    assert "file=" in capsys.readouterr().err


def test_augment(tiny_checkpoint, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, level in (("x", 60), ("y", 200)):
        Image.new("RGB", (16, 16), (level, 100, 40)).save(folder / f"{name}.png")
    (folder / "x.txt").write_text("a {red|blue} house", encoding="utf-8")
    (folder / "broken.jpg").write_bytes((folder / "x.png").read_bytes()[:40])
    flags = [str(folder), str(out), "--copies", "2", "--strength", "0.2", "0.6", "--steps", "4"]
    assert run(tiny_checkpoint, "augment", *flags) == 1, "one picture could not be read"
    names = sorted(path.name for path in out.iterdir())
    assert names == ["x-1.png", "x-1.txt", "x-2.png", "x-2.txt", "y-1.png", "y-2.png"]
    job = load_png(out / "x-1.png")[1]["job"]
    assert job["prompt"] in ("a red house", "a blue house") and 0.2 <= job["strength"] <= 0.6
    kept = (out / "x-2.png").read_bytes()
    (out / "x-1.png").unlink()
    capsys.readouterr()
    run(tiny_checkpoint, "augment", *flags)
    assert capsys.readouterr().out.splitlines() == [str(out / "x-1.png")]
    assert "3 variants were there already" in caplog.text and "1 of 3 pictures could not be read" in caplog.text
    assert (out / "x-2.png").read_bytes() == kept
    assert run(tiny_checkpoint, "augment", str(folder), str(folder)) == 2
    (folder / "x.bmp").write_bytes(b"")
    assert run(tiny_checkpoint, "augment", *flags) == 2, "two pictures of one name"
    (folder / "x.bmp").unlink()
    (folder / "x.txt").write_bytes(b"stra\xdfe")
    assert run(tiny_checkpoint, "augment", *flags) == 2
    assert "x.txt" in capsys.readouterr().err
