"""The command line as a person types it: files, names, recipes, replay, and one clear line for bad input."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato import images
from sfumato.cli import drawing, saving, txt2img
from sfumato.cli.main import main
from sfumato.images import load_png, save_png
from sfumato.pipeline import Pipeline
from sfumato.weights.files import load_safetensors, save_safetensors

SCRIPT = Path(__file__).parents[1] / "scripts" / "txt2img.py"


def draw(ckpt: Path, outdir: Path, *flags: str) -> int:
    return main(["txt2img", "--ckpt", str(ckpt), "--outdir", str(outdir), *flags])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error line; there must be exactly one, and no traceback."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_files_names_and_grid(tiny_checkpoint, tmp_path, capsys):
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "a cat", "--n_samples", "2", "--n_iter", "2") == 0
    expected = [tmp_path / "samples" / f"{number:05}.png" for number in range(4)] + [tmp_path / "grid-0000.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in expected]
    with Image.open(expected[-1]) as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "a cat") == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "samples" / "00004.png")]


def test_a_deleted_picture_is_never_overwritten(tiny_checkpoint, tmp_path, capsys):
    draw(tiny_checkpoint, tmp_path, "--prompt", "a cat", "--count", "3", "--skip_grid")
    (tmp_path / "samples" / "00000.png").unlink()
    capsys.readouterr()
    draw(tiny_checkpoint, tmp_path, "--prompt", "a dog")
    assert capsys.readouterr().out.strip().endswith("00003.png")


def test_two_processes_never_take_the_same_name(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_next_number", lambda folder, pattern: 0)  # what the other one saw as well
    for _ in range(2):
        assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--count", "2") == 0
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert names == ["grid-0000.png", "grid-0001.png", *(f"samples/0000{number}.png" for number in range(4))]


def test_grid_is_never_wider_than_its_pictures(tiny_checkpoint, tmp_path):
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--count", "2", "--n_rows", "10000000000") == 0
    with Image.open(tmp_path / "grid-0000.png") as grid:
        assert grid.size == (2 * 18 + 2, 18 + 2)


def test_prompt_file_with_fixed_code_starts_every_line_alike(tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na cat\n", encoding="utf-8")
    assert draw(tiny_checkpoint, tmp_path, "--from-file", str(prompts), "--fixed_code") == 0
    first, second = (load_png(path)[0] for path in sorted((tmp_path / "samples").iterdir()))
    assert np.array_equal(first, second)


def test_eta_zero_means_nothing_to_a_sampler_without(tiny_checkpoint, tmp_path):
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--ddim_eta", "0", "--sampler", "heun") == 0
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--plms", "--sampler", "PLMS", "--ddim_eta", "0") == 0


def test_a_picture_that_is_not_finite_is_no_picture(tiny_checkpoint, tmp_path, capsys):
    tensors, header = load_safetensors(tiny_checkpoint)
    tensors["first_stage_model.decoder.conv_out.bias"].fill_(float("nan"))
    save_safetensors(tmp_path / "nan.safetensors", tensors, header)
    assert draw(tmp_path / "nan.safetensors", tmp_path, "--prompt", "x") == 2
    assert "not finite" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda family: [], ["not an object"]),
        (lambda family: family | {"latent_scale": 0.0}, ["latent_scale=0.0"]),
        (lambda family: family | {"texts": [family["texts"][0] | {"skip_last": 9}]}, ["skip_last=9"]),
        (lambda family: family | {"prediction": "x0"}, ["prediction='x0'", "eps"]),
        (lambda family: family | {"texts": [None]}, ["None is not an object"]),
        (lambda family: family | {"texts": []}, ["texts"]),
        (lambda family: family | {"unet": family["unet"] | {"num_heads": 3}}, ["num_heads=3"]),
        (lambda family: family | {"unet": family["unet"] | {"norm_groups": 0}}, ["norm_groups=0"]),
        (lambda family: family | {"unet": family["unet"] | {"channel_mult": ["a", 2]}}, ["channel_mult"]),
        (
            lambda family: family | {"unet": family["unet"] | {"transformer_depth": [1, 99999]}},
            ["transformer_depth=99999"],
        ),
        (lambda family: family | {"unet": family["unet"] | {"channels": 10**9}}, ["channels=1000000000"]),
        (lambda family: family | {"wings": 2}, ["wings"]),
    ],
)
def test_a_header_that_describes_no_family(tiny_checkpoint, tmp_path, capsys, change, words):
    tensors, header = load_safetensors(tiny_checkpoint)
    header["sfumato.family"] = json.dumps(change(json.loads(header["sfumato.family"])))
    path = tmp_path / "odd.safetensors"
    save_safetensors(path, tensors, header)
    assert draw(path, tmp_path, "--prompt", "x") == 2
    line = one_line(capsys)
    assert all(word in line for word in ["odd.safetensors", *words]), line


def test_skip_save_keeps_only_the_grid(tiny_checkpoint, tmp_path):
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--count", "2", "--skip_save") == 0
    assert [path.name for path in tmp_path.rglob("*.png")] == ["grid-0000.png"]


def test_recipe_and_replay(tiny_checkpoint, tmp_path, capsys):
    flags = ["--prompt", "a red apple", "--negative", "blue", "--sampler", "euler_a", "--count", "3", "--seed", "7"]
    assert draw(tiny_checkpoint, tmp_path, *flags) == 0
    path = tmp_path / "samples" / "00002.png"
    _, recipe = load_png(path)
    assert recipe["job"]["prompt"] == "a red apple" and recipe["job"]["negative"] == "blue"
    assert (recipe["seed"], recipe["index"], recipe["job"]["steps"]) == (9, 2, 4)
    assert main(["replay", str(path), "--ckpt", str(tiny_checkpoint)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: every pixel"


def test_replay_tells_a_changed_picture(tiny_checkpoint, tmp_path, capsys):
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "a cat") == 0
    path = tmp_path / "samples" / "00000.png"
    pixels, recipe = load_png(path)
    changed = pixels.copy()
    changed[3, 4, 0] ^= 8
    save_png(path, changed, recipe)
    out = tmp_path / "again.png"
    assert main(["replay", str(path), "--ckpt", str(tiny_checkpoint), "--out", str(out)]) == 1
    assert "different: 1 of 256 pixels, by 8 of 255 at most" in capsys.readouterr().out
    assert np.array_equal(load_png(out)[0], pixels)


def test_fixed_code_repeats_the_noise(tiny_checkpoint, tmp_path):
    draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--n_iter", "2", "--fixed_code")
    first, second = (load_png(tmp_path / "samples" / f"0000{number}.png")[0] for number in (0, 1))
    assert np.array_equal(first, second)
    draw(tiny_checkpoint, tmp_path / "b", "--prompt", "x", "--n_iter", "2")
    third, fourth = (load_png(tmp_path / "b" / "samples" / f"0000{number}.png")[0] for number in (0, 1))
    assert np.array_equal(first, third) and not np.array_equal(third, fourth)


def test_prompt_file_draws_a_picture_a_line(tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\nдом\n", encoding="utf-8")
    assert draw(tiny_checkpoint, tmp_path, "--from-file", str(prompts), "--seed", "3", "--skip_grid") == 0
    recipes = [load_png(path)[1] for path in sorted((tmp_path / "samples").iterdir())]
    assert [(recipe["job"]["prompt"], recipe["seed"]) for recipe in recipes] == [("a cat", 3), ("дом", 4)]


def test_plms_flag_and_negative_change_the_picture(tiny_checkpoint, tmp_path):
    pictures = []
    for index, flags in enumerate([["--plms"], ["--sampler", "ddim"], ["--sampler", "ddim", "--negative", "red"]]):
        assert draw(tiny_checkpoint, tmp_path / str(index), "--prompt", "a cat", *flags) == 0
        pictures.append(load_png(tmp_path / str(index) / "samples" / "00000.png")[0])
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[1], pictures[2])


def test_original_script_defaults():
    args = drawing.original_script(txt2img.ORIGINAL, "txt2img.py", [])
    assert (args.prompt, args.n_iter, args.n_samples) == ("a painting of a virus monster playing guitar", 2, 3)
    assert (args.steps, args.guidance, args.seed, args.precision) == (50, 7.5, 42, "autocast")
    assert (args.outdir, args.style.sampler, args.n_rows) == ("outputs/txt2img-samples", "ddim", 0)
    asked = [each for iteration in drawing.asked_of(args) for each in iteration]
    assert [(job.seed, job.count) for each in asked for job in each.jobs] == [(42, 3), (45, 3)]


def test_original_script_runs(tiny_checkpoint, tmp_path):
    flags = "--prompt x --ddim_steps 2 --n_samples 1 --n_iter 1 --scale 2 --H 16 --W 32 --C 4 --f 2 --n_rows 1".split()
    command = [sys.executable, str(SCRIPT), *flags, "--ckpt", str(tiny_checkpoint), "--outdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == ["00000.png", "grid-0000.png"]
    assert " in float" in done.stderr
    with Image.open(tmp_path / "samples" / "00000.png") as picture:
        assert picture.size == (32, 16)


def test_empty_prompt_is_said(tiny_checkpoint, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert draw(tiny_checkpoint, tmp_path, "--prompt", "") == 0
    assert "drawing unconditionally" in caplog.text


def test_long_prompt_says_what_fell_off(tiny_checkpoint, tmp_path, caplog):
    words = " ".join(["a"] * 75 + ["zebra"] * 1925)
    assert draw(tiny_checkpoint, tmp_path, "--prompt", words) == 0
    assert "what fell off" not in caplog.text  # it has as many chunks as it needs
    assert draw(tiny_checkpoint, tmp_path, "--prompt", words, "--like", "diffusers") == 0
    assert "what fell off: zebra zebra" in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "x", "--H", "15"], ["height=15", "multiple of 4"]),
        (["--prompt", "x", "--W", "0"], ["width=0"]),
        (["--prompt", "x", "--W", "999999"], ["width=999999", "8192"]),
        (["--prompt", "x", "--sampler", "magic"], ["sampler='magic'", "euler_a", "plms"]),
        (["--prompt", "x", "--schedule", "magic"], ["schedule='magic'", "karras"]),
        (["--prompt", "x", "--steps", "0"], ["steps=0"]),
        (["--prompt", "x", "--steps", "2000"], ["steps=2000"]),
        (["--prompt", "x", "--scale", "nan"], ["guidance=nan"]),
        (["--prompt", "x", "--seed", "-1"], ["seed=-1"]),
        (["--prompt", "x", "--count", "0"], ["n_samples=0"]),
        (["--prompt", "x", "--C", "16"], ["C=16", "4"]),
        (["--prompt", "x", "--f", "8"], ["f=8", "2"]),
        (["--prompt", "x", "--eta", "2", "--sampler", "ddim"], ["eta=2.0"]),
        (["--prompt", "x", "--eta", "0.5", "--sampler", "heun"], ["eta=0.5", "heun"]),
        (["--prompt", "x", "--plms", "--sampler", "ddim"], ["sampler", "--plms", "ddim"]),
        (["--prompt", "x", "--plms", "--dpm_solver"], ["sampler", "--dpm_solver"]),
        (["--prompt", "caf\udce9"], ["prompt=", "not Unicode", "character 4"]),
        (["--prompt", "x", "--n_iter", "1000000000"], ["n_iter=1000000000"]),
        (["--prompt", "x", "--device", "meta"], ["device='meta'"]),
        (["--prompt", "x", "--plms", "--ddim_eta", "1"], ["ddim_eta=1.0", "--plms"]),
        (["--prompt", "x", "--device", "abacus"], ["device='abacus'"]),
        (["--prompt", "x", "--n_rows", "-1"], ["n_rows=-1"]),
        ([], ["prompt"]),
    ],
)
def test_bad_flags(tiny_checkpoint, tmp_path, capsys, flags, words):
    assert draw(tiny_checkpoint, tmp_path, *flags) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.safetensors", None, ["none.safetensors", "no such file"]),
        ("old.ckpt", b"\x80\x02", ["old.ckpt", ".safetensors"]),
        ("broken.safetensors", b"not a checkpoint", ["broken.safetensors", "not a readable"]),
        ("", None, ["a folder"]),
    ],
)
def test_bad_checkpoint(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert draw(path, tmp_path, "--prompt", "x") == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["No such file"]), (b"", ["no prompt"]), (b"\n \n", ["no prompt"]), (b"caf\xe9", ["not UTF-8", "byte 3"])],
)
def test_bad_prompt_file(tiny_checkpoint, tmp_path, capsys, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert draw(tiny_checkpoint, tmp_path, "--from-file", str(path)) == 2
    line = one_line(capsys)
    assert all(word in line for word in ["from-file=", *words]), line


def lines_of(path: Path, *lines: str) -> list[str]:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--from-file", str(path), "--seed", "3"]


def drawn_of(outdir: Path) -> list[tuple[str, int]]:
    recipes = [load_png(path)[1] for path in sorted((outdir / "samples").iterdir())]
    return [(recipe["job"]["prompt"], recipe["seed"]) for recipe in recipes]


def test_a_bad_line_is_told_and_the_others_are_drawn(tiny_checkpoint, tmp_path, capsys, caplog):
    """Wrong in itself (told before the first is drawn), or when it is drawn; seeds and pictures stay as they were."""
    (tmp_path / "words.txt").write_text("forbidden\n", encoding="utf-8")
    lines = ("a cat", "", "forbidden things", "a <lora:nothing:1>", "a dog")
    flags = [*lines_of(tmp_path / "p.txt", *lines), "--refuse-words", str(tmp_path / "words.txt")]
    assert draw(tiny_checkpoint, tmp_path / "out", *flags) == 1
    assert drawn_of(tmp_path / "out") == [("a cat", 3), ("a dog", 6)]
    with Image.open(tmp_path / "out" / "grid-0000.png") as grid:
        assert grid.size == (2 * 18 + 2, 18 + 2)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(":")[0] for text in said[:2]] == ["line 3 is left out", "line 4, seed=5 is not drawn"]
    assert "forbidden" in said[0] and "nothing" in said[1]
    assert said[2:] == ["2 of 4 were not drawn, or not all of their pictures"]
    assert all(record.exc_info is None for record in caplog.records)
    alone = ["--prompt", "a dog", "--seed", "6"]
    assert draw(tiny_checkpoint, tmp_path / "alone", *alone) == 0
    pictures = [load_png(tmp_path / name)[0] for name in ("out/samples/00001.png", "alone/samples/00000.png")]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("lines", "flags", "words"),
    [
        (("one thing", "two things"), ("--refuse-words", "words.txt"), ["line 1: ", "refused", "one"]),
        (("a", "b"), ("--steps", "0"), ["error: steps=0"]),
        (("a <lora:one:1>", "b <lora:two:1>"), (), ["lora='one'"]),
    ],
)
def test_a_file_of_bad_lines_alone_is_an_error(tiny_checkpoint, tmp_path, capsys, monkeypatch, lines, flags, words):
    (tmp_path / "words.txt").write_text("one\ntwo\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert draw(tiny_checkpoint, tmp_path / "out", *lines_of(tmp_path / "p.txt", *lines), *flags) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_fault_in_one_of_several_is_told_with_its_trace(tiny_checkpoint, tmp_path, capsys, caplog, monkeypatch):
    from sfumato import pipeline

    original = pipeline.complete

    def faulty(job, *args):
        if job.seed == 43:
            raise ArithmeticError("a fault of ours")
        return original(job, *args)

    monkeypatch.setattr(pipeline, "complete", faulty)
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--n_iter", "3", "--skip_grid") == 1
    assert drawn_of(tmp_path) == [("x", 42), ("x", 44)]
    [told] = [record for record in caplog.records if "seed=43 is not drawn: a fault of ours" in record.getMessage()]
    assert told.exc_info is not None and told.exc_info[0] is ArithmeticError
    with pytest.raises(ArithmeticError):
        draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--seed", "43")


def test_a_full_disk_ends_a_file_of_prompts(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(saving.Saver, "picture", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    assert draw(tiny_checkpoint, tmp_path / "out", *lines_of(tmp_path / "p.txt", "a", "b")) == 2
    assert "No space" in one_line(capsys)


def test_outdir_that_cannot_be_written(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert draw(tiny_checkpoint, tmp_path / "file" / "below", "--prompt", "x") == 2
    assert "outdir=" in one_line(capsys)


def test_full_disk_leaves_no_half_file(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    original = Image.Image.save

    def full(self, target, **options):
        original(self, target, **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(images.files.Image.Image, "save", full)
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x") == 2
    assert "No space left on device" in one_line(capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_ctrl_c_keeps_finished_pictures(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    original, calls = Pipeline.draw_each, []

    def interrupted(self, job, *args, **more):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, job, *args, **more)

    monkeypatch.setattr(Pipeline, "draw_each", interrupted)
    assert draw(tiny_checkpoint, tmp_path, "--prompt", "x", "--n_iter", "5") == 130
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["00000.png", "00001.png", "grid-0000.png"]
    assert "kept" in capsys.readouterr().err


RECIPE = {
    "job": {"prompt": "x", "count": 1},
    "index": 0,
    "precision": "float32",
    "model": {"hash": "0123456789", "name": "other"},
    "made with": {"device": "cpu"},
}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (None, ["no sfumato recipe"]),
        ({"index": 0}, ["damaged", "model=None"]),
        (RECIPE | {"job": {"prompt": "x", "size": 3}}, ["size", "no such field"]),
        (RECIPE | {"index": 1e999}, ["damaged", "index=inf"]),
        (RECIPE | {"index": 1}, ["damaged", "index 1 of 1"]),
        (RECIPE | {"index": "abc"}, ["damaged", "index='abc'"]),
        (RECIPE | {"precision": [1]}, ["damaged", "precision=[1]"]),
    ],
)
def test_replay_of_a_bad_recipe(tmp_path, capsys, recipe, words):
    path = tmp_path / "a.png"
    save_png(path, np.zeros((8, 8, 3), np.uint8), recipe)
    assert main(["replay", str(path)]) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line


def test_replay_with_another_checkpoint(tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "a.png"
    save_png(path, np.zeros((16, 16, 3), np.uint8), RECIPE)
    assert main(["replay", str(path), "--ckpt", str(tiny_checkpoint)]) == 2
    line = one_line(capsys)
    assert "0123456789" in line and "--ckpt" in line


def test_replay_of_no_picture(tmp_path, capsys):
    (tmp_path / "a.png").write_text("hello")
    assert main(["replay", str(tmp_path / "a.png")]) == 2
    assert "not a readable picture" in one_line(capsys)
    assert main(["replay", str(tmp_path / "b.png")]) == 2
    assert "no such file" in one_line(capsys)
