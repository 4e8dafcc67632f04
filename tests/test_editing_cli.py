"""The editing commands as a person types them: files, what a mask keeps in the saved picture, replay, and bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli import drawing, img2img
from sfumato.cli.main import main
from sfumato.images import load_png
from sfumato.images.fitting import fitted
from sfumato.pipeline import Pipeline
from sfumato.types import Job
from sfumato.weights.checkpoint import build, save_checkpoint
from tests.conftest import randomise
from tests.test_editing import kin, nearly, painted, through_the_autoencoder

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

SCRIPT = Path(__file__).parents[1] / "scripts" / "img2img.py"
HIGH, WIDE = 18, 21  # px, no multiples of the tiny model's step of 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """The checkpoint of a tiny model of each kind, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("kin")

    def model(concat: str | None) -> Path:
        path = folder / f"tiny-{concat}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            parts = {name: randomise(module).state_dict() for name, module in build(kin(concat)).items()}
            save_checkpoint(path, kin(concat), parts, torch.float32)
        return path

    return model


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with a picture of noise, masks for it, and files of unusual kinds."""
    rng = np.random.default_rng(0)
    picture, hard = rng.integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8), painted(HIGH, WIDE, 5, 12, 7, 16)
    soft = np.zeros_like(hard)
    soft[3:14, 4:18] = np.linspace(0, 255, 14).astype(np.uint8)[None, :, None]
    depth = np.repeat(np.linspace(0, 255, WIDE).astype(np.uint8)[None], HIGH, axis=0)
    square = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    arrays = {
        "picture": picture, "hard": hard, "soft": soft, "depth": depth, "kept": 255 - hard, "black": hard * 0,
        "white": hard * 0 + 255, "dim": hard // 3, "grey": hard * 0 + 99, "square": square,
        "see-through": np.dstack([picture, 255 - hard[..., 0]]), "corner": painted(24, 32, 0, 5, 0, 7),
        "large mask": painted(2 * HIGH, 2 * WIDE, 10, 24, 14, 32),
    }  # fmt: skip
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return tmp_path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def flags_of(desk: Path, text: str) -> list[str]:
    """Words of a command line; @name is a file on the desk."""
    return [str(desk / word[1:].replace("+", " ")) if word.startswith("@") else word for word in text.split()]


def edit(command: str, ckpt: Path, desk: Path, text: str) -> int:
    """Run a command with its pictures under desk/out; two steps, where `text` says nothing else."""
    prompt = [] if "--prompt" in text or "--from-file" in text else ["--prompt", "a red apple"]
    return main([command, "--ckpt", str(ckpt), "--outdir", str(desk / "out"), "--steps", "2", *prompt,
                 *flags_of(desk, text)])  # fmt: skip


def saved(desk: Path) -> list[Path]:
    return sorted((desk / "out" / "samples").glob("*.png"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error line; there must be exactly one, and no traceback."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, mask, concat", [
    ("--mask @hard.png", "hard", None),
    ("--mask @hard.png --sampler euler_a --fill noise", "hard", None),
    ("--mask @soft.png --mask-soft", "soft", None),
    ("--mask @hard.png --only-masked --padding 2 --sampler lms", "hard", None),
    ("--mask @kept.png --mask-invert --sampler uni_pc", "hard", None),
    ("--mask @large+mask.png --mask-resize", "hard", None),
    ("--mask @hard.png --strength 1", "hard", "inpaint"),
    ("", "hard", None),
])  # fmt: skip
def test_the_saved_picture_is_the_old_one_where_the_mask_is_black(
    models: Callable[[str | None], Path], desk: Path, text: str, mask: str, concat: str | None
) -> None:
    name = "picture" if "--mask" in text else "see-through"
    assert edit("inpaint", models(concat), desk, f"--image @{name}.png {text}") == 0
    [path] = saved(desk)
    old, new, kept = pixels(desk / "picture.png"), pixels(path), pixels(desk / f"{mask}.png")[..., 0] == 0
    assert new.shape == old.shape and np.array_equal(new[kept], old[kept])
    assert not np.array_equal(new, old)


def test_like_a1111_beyond_the_blur(models: Callable[[str | None], Path], desk: Path) -> None:
    text = "--image @square.png --mask @corner.png --like a1111 --W 32 --H 24"
    assert edit("inpaint", models(None), desk, text) == 0
    old, new = pixels(desk / "square.png"), pixels(saved(desk)[0])
    assert np.array_equal(new[15:], old[15:]) and np.array_equal(new[:, 17:], old[:, 17:])
    assert not np.array_equal(new[:5, :7], old[:5, :7])


def test_outpainting_on_all_sides(models: Callable[[str | None], Path], desk: Path) -> None:
    assert edit("outpaint", models(None), desk, "--image @picture.png --left 5 --right 3 --up 2 --down 9") == 0
    new = pixels(saved(desk)[0])
    assert new.shape == (HIGH + 11, WIDE + 8, 3)
    assert np.array_equal(new[2 : 2 + HIGH, 5 : 5 + WIDE], pixels(desk / "picture.png"))


# --- sizes -----------------------------------------------------------------------------------------------------------


def decoded(ckpt: Path, image: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 encoded and decoded."""
    return through_the_autoencoder(Pipeline.from_pretrained(ckpt), image)


@pytest.mark.parametrize("text, size", [
    ("", (HIGH, WIDE)), ("--W 24 --H 20 --resize keep", (HIGH, WIDE)), ("--W 32 --H 16", (16, 32)),
    ("--W 32 --H 16 --resize stretch", (16, 32)), ("--W 32 --H 16 --resize crop", (16, 32)),
    ("--W 32 --H 16 --resize fill", (16, 32)), ("--W 32 --H 16 --resize latent", (16, 32)),
    ("--W 40", (36, 40)),  # 18 * 40 / 21 = 34.3, and 36 is the next multiple of 4
    ("--H 8", (8, 8)), ("--H 36", (36, 40)),  # 21 * 36 / 18 = 42, as near to 40 as to 44
    ("--like comfy", (16, 20)), ("--like compvis", (16, 20)), ("--resize crop", (16, 20)),
])  # fmt: skip
def test_sizes(models: Callable[[str | None], Path], desk: Path, text: str, size: tuple[int, int]) -> None:
    """At strength 0 what is saved is the picture, made to fit and through the autoencoder."""
    assert edit("img2img", models(None), desk, f"--image @picture.png --strength 0 {text}") == 0
    new, old = pixels(saved(desk)[0]), pixels(desk / "picture.png")
    assert new.shape == (*size, 3)
    fit = text.partition("--resize ")[2]
    if size == (HIGH, WIDE):
        whole = np.pad(old, [(0, 2), (0, 3), (0, 0)], mode="symmetric")
        assert nearly(new, decoded(models(None), whole)[:HIGH, :WIDE])
    else:
        simple = decoded(models(None), fitted(old, size[1], size[0], fit or "stretch"))
        assert nearly(new, simple) == (fit != "latent"), "latents are another thing to stretch"


def test_what_is_transparent_is_laid_on_white(models: Callable[[str | None], Path], desk: Path) -> None:
    with Image.open(desk / "square.png") as picture:
        alpha = np.zeros((24, 32), np.uint8)
        alpha[:8], alpha[8:16] = 255, 102
        Image.merge("RGBA", (*picture.split(), Image.fromarray(alpha))).save(desk / "glass.png")
    assert edit("img2img", models(None), desk, "--image @glass.png --strength 0") == 0
    seen = pixels(desk / "square.png").astype(float)
    seen[8:16] = 0.4 * seen[8:16] + 0.6 * 255
    seen[16:] = 255
    expected = decoded(models(None), np.round(seen).astype(np.uint8))
    assert nearly(pixels(saved(desk)[0]), expected)


# --- many pictures ---------------------------------------------------------------------------------------------------


def test_loopback_draws_over_what_it_drew(
    models: Callable[[str | None], Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "--image @picture.png --loopback 3 --strength 0.4 --loopback-strength 0.8 --steps 5 --count 2 --seed 3"
    assert edit("img2img", models(None), desk, text) == 0
    paths = saved(desk)
    jobs = [load_png(path)[1]["job"] for path in paths]
    assert [job["strength"] for job in jobs] == pytest.approx([0.4, 0.6, 0.8] * 2)
    begun = [desk / "picture.png", *paths[:2], desk / "picture.png", *paths[3:5]]
    assert [job["image"] for job in jobs] == [str(path) for path in begun]
    assert [job["seed"] for job in jobs] == [3, 5, 7, 4, 6, 8] and {job["count"] for job in jobs} == {1}
    capsys.readouterr()
    assert main(["replay", str(paths[1]), "--ckpt", str(models(None))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: every pixel"


def test_loopback_with_a_mask_and_another_size(models: Callable[[str | None], Path], desk: Path) -> None:
    text = "--image @picture.png --mask @hard.png --W 32 --H 16 --loopback 3"
    assert edit("inpaint", models(None), desk, text) == 0
    first, *others = [pixels(path) for path in saved(desk)]
    corner = (slice(0, 3), slice(0, 8))
    assert len(others) == 2 and all(np.array_equal(other[corner], first[corner]) for other in others)
    assert not np.array_equal(first, others[0])


def test_folders_of_pictures_and_masks(models: Callable[[str | None], Path], desk: Path) -> None:
    pictures, masks = desk / "pictures", desk / "masks"
    pictures.mkdir()
    masks.mkdir()
    for index, name in enumerate(("b.png", "a.png", "c.bmp")):
        Image.fromarray(np.roll(pixels(desk / "picture.png"), index, axis=0)).save(pictures / name)
    (pictures / "notes.txt").write_text("not a picture")
    Image.fromarray(pixels(desk / "hard.png")).save(pictures / "a_mask.png")
    for name, mask in (("a_mask.png", "hard"), ("b.png", "kept"), ("c_mask.bmp", "soft")):
        Image.fromarray(pixels(desk / f"{mask}.png")).save(masks / name)
    assert edit("inpaint", models(None), desk, "--image @pictures --image @picture.png --mask @hard.png") == 0
    names = [Path(load_png(path)[1]["job"]["image"]).name for path in saved(desk)]
    assert names == ["a.png", "b.png", "c.bmp", "picture.png"]
    assert edit("inpaint", models(None), desk, "--image @pictures --mask @masks") == 0
    recipes = [load_png(path)[1] for path in saved(desk)[4:]]
    assert [Path(made["job"]["mask"]).name for made in recipes] == ["a_mask.png", "b.png", "c_mask.bmp"]
    kept = pixels(desk / "kept.png")[..., 0] == 0
    assert np.array_equal(pixels(saved(desk)[5])[kept], pixels(pictures / "b.png")[kept])


def test_every_line_of_a_file_over_every_picture(models: Callable[[str | None], Path], desk: Path) -> None:
    (desk / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    text = "--init-img @picture.png --init-img @square.png --from-file @prompts.txt --seed 9 --skip_grid"
    assert edit("img2img", models(None), desk, text) == 0
    jobs = [load_png(path)[1]["job"] for path in saved(desk)]
    assert [(job["prompt"], Path(job["image"]).name, job["seed"]) for job in jobs] == [
        ("a cat", "picture.png", 9), ("a dog", "picture.png", 10),
        ("a cat", "square.png", 9), ("a dog", "square.png", 10),
    ]  # fmt: skip


# --- the original script ---------------------------------------------------------------------------------------------


def test_the_original_scripts_flags_and_defaults() -> None:
    args = drawing.original_script(img2img.ORIGINAL, "img2img.py", ["--init-img", "a.png"])
    assert (args.prompt, args.n_iter, args.n_samples) == ("a painting of a virus monster playing guitar", 1, 2)
    assert (args.steps, args.guidance, args.strength, args.seed) == (50, 5.0, 0.75, 42)
    assert (args.outdir, args.precision, args.n_rows) == ("outputs/img2img-samples", "autocast", 0)
    [[asked]] = drawing.asked_of(args)
    [job] = asked.jobs
    assert (job.image, job.sampler, job.count, job.strength, job.seed) == ("a.png", "ddim", 2, 0.75, 42)
    words = "--init-img a.png --plms --skip_grid --skip_save --fixed_code --C 4 --f 8 --n_rows 3 --precision full"
    args = drawing.original_script(img2img.ORIGINAL, "img2img.py", [*words.split(), "--ddim_eta", "0", "--scale", "7"])
    assert (args.plms, args.skip_grid, args.skip_save, args.fixed_code, args.n_rows) == (True, True, True, True, 3)
    [[asked]] = drawing.asked_of(args)
    [job] = asked.jobs
    assert (job.sampler, job.guidance, job.eta) == ("plms", 7.0, 0.0)


def test_the_original_script_runs(models: Callable[[str | None], Path], desk: Path) -> None:
    words = f"--prompt x --init-img {desk / 'picture.png'} --ddim_steps 4 --strength 0.5 --C 4 --f 2 --n_rows 1"
    command = [sys.executable, str(SCRIPT), *words.split(), "--ckpt", str(models(None)), "--outdir", str(desk / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == ["00000.png", "00001.png", "grid-0000.png"]
    assert pixels(desk / "out" / "samples" / "00000.png").shape == (HIGH, WIDE, 3)


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, text, concat", [
    ("img2img", "--image @picture.png --count 2 --sampler euler_a", None),
    ("img2img", "--image @picture.png --like diffusers --W 24 --H 20", None),
    ("img2img", "--image @picture.png", "picture"),
    ("inpaint", "--image @picture.png --mask @hard.png", None),
    ("inpaint", "--image @picture.png --mask @soft.png --mask-soft --only-masked", None),
    ("inpaint", "--image @see-through.png --fill fill", None),
    ("inpaint", "--image @picture.png --mask @hard.png", "inpaint"),
    ("outpaint", "--image @picture.png --left 4 --down 5 --count 2", None),
    ("depth2img", "--image @picture.png --depth @depth.png", "depth"),
    ("upscale", "--image @picture.png --strength 0.6", None),
    ("upscale", "--image @picture.png --factor 1.5 --upscaler bicubic", None),
    ("upscale", "--image @picture.png", "lowres"),
    ("txt2img", "--W 24 --H 20 --tile 16 --seamless x", None),
])  # fmt: skip
def test_every_tasks_picture_can_be_drawn_again(
    models: Callable[[str | None], Path], desk: Path, capsys: pytest.CaptureFixture[str], command: str, text: str,
    concat: str | None,
) -> None:  # fmt: skip
    assert edit(command, models(concat), desk, text) == 0
    path, made = saved(desk)[-1], load_png(saved(desk)[-1])[1]
    fields = [name for name in ("image", "mask", "depth") if f"--{name} " in text]
    assert sorted(made.get("pictures", {})) == sorted(fields) and made["index"] == len(saved(desk)) - 1
    capsys.readouterr()
    assert main(["replay", str(path), "--ckpt", str(models(concat))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: every pixel"


@pytest.mark.parametrize("name", ["image", "mask"])
def test_replay_tells_of_a_picture_that_is_another_now(
    models: Callable[[str | None], Path], desk: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, name: str,
) -> None:  # fmt: skip
    assert edit("inpaint", models(None), desk, "--image @picture.png --mask @hard.png") == 0
    changed = desk / {"image": "picture.png", "mask": "hard.png"}[name]
    Image.fromarray(np.roll(pixels(changed), 4, axis=1)).save(changed)
    capsys.readouterr()
    assert main(["replay", str(saved(desk)[0]), "--ckpt", str(models(None))]) == 1
    assert f"{name}: {str(changed)!r} is not the picture that this was drawn from" in caplog.text
    assert "different:" in capsys.readouterr().out


def test_replay_without_its_picture_is_one_line(
    models: Callable[[str | None], Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("img2img", models(None), desk, "--image @picture.png") == 0
    (desk / "picture.png").unlink()
    assert main(["replay", str(saved(desk)[0]), "--ckpt", str(models(None))]) == 2
    line = one_line(capsys)
    assert "picture.png" in line and "no such file" in line


# --- unusual files ---------------------------------------------------------------------------------------------------


def test_pictures_of_unusual_kinds_are_drawn_over(models: Callable[[str | None], Path], desk: Path) -> None:
    """Of an animation the first frame; 16 bits and four inks become 8 bits of sRGB."""
    frames = [Image.fromarray(np.full((16, 16, 3), colour, np.uint8)) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(desk / "moving.gif", save_all=True, append_images=frames[1:])
    depth = pixels(desk / "square.png")[..., 0]
    Image.fromarray(depth.astype(np.uint16) * 257).save(desk / "deep.png")
    with Image.open(desk / "square.png") as picture:
        picture.convert("CMYK").save(desk / "inks.tif")
        inks = np.asarray(picture.convert("CMYK").convert("RGB"))
    for name, expected in (("moving.gif", np.asarray(frames[0])), ("deep.png", depth[..., None].repeat(3, axis=2)),
                           ("inks.tif", inks)):  # fmt: skip
        assert edit("img2img", models(None), desk, f"--image @{name} --strength 0") == 0
        assert nearly(pixels(saved(desk)[-1]), decoded(models(None), expected)), name


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ("img2img", "", ["image:", "--image"]),
    ("img2img", "--image @none.png", ["image=", "none.png", "no such file"]),
    ("img2img", "--image @notes.txt", ["image=", "notes.txt", "not a picture"]),
    ("img2img", "--image @cut.jpg", ["image=", "cut.jpg", "damaged or cut short"]),
    ("img2img", "--image @wide.png", ["20000", "8192"]),
    ("img2img", "--image @empty", ["image=", "holds no picture", ".png"]),
    ("img2img", "--image @picture.png --strength -0.1", ["strength=-0.1", "0 to 1"]),
    ("img2img", "--image @picture.png --strength 1.5", ["strength=1.5", "0 to 1"]),
    ("img2img", "--image @picture.png --strength nan", ["strength=nan", "0 to 1"]),
    ("img2img", "--image @picture.png --resize magic", ["resize='magic'", "keep", "crop"]),
    ("img2img", "--image @picture.png --W 16 --H 16 --resize keep", ["21 x 18", "16 x 16"]),
    ("img2img", "--image @picture.png --tile 7", ["tile=7", "multiple of 4"]),
    ("img2img", "--image @picture.png --tile 8 --overlap 6", ["overlap=6", "2 to 4"]),
    ("img2img", "--image @picture.png --overlap 4", ["overlap=4", "no tiles"]),
    ("img2img", "--image @picture.png --only-masked", ["only_masked", "no mask"]),
    ("img2img", "--image @picture.png --mask-invert", ["mask_invert", "no mask"]),
    ("img2img", "--image @picture.png --depth @depth.png", ["depth=", "sees no depth", "tiny"]),
    ("img2img", "--image @picture.png --loopback 0", ["loopback=0"]),
    ("img2img", "--image @picture.png --loopback 2 --skip_save", ["loopback", "--skip_save"]),
    ("img2img", "--image @picture.png --loopback 2 --strength 0.5 --loopback-strength 7", ["loopback_strength=7"]),
    ("img2img", "--image @picture.png --loopback 2 --strength 0.5 --loopback-strength nan", ["loopback_strength=nan"]),
    ("img2img", "--image @picture.png --loopback 2 --loopback-strength 0.5", ["loopback_strength=0.5", "--strength"]),
    ("img2img", "--image @picture.png --strength 0.5 --loopback-strength 0.5", ["loopback_strength=0.5", "--loopback"]),
    ("img2img", "--image @picture.png --mask @hard.png --loopback 2 --resize crop", ["resize='crop'", "--loopback"]),
    ("img2img", "--image @picture.png --outdir @hard.png/x", ["outdir=", "cannot be written"]),
    ("inpaint", "--image @picture.png", ["picture.png", "nowhere transparent", "mask"]),
    ("inpaint", "--image @picture.png --mask @none.png", ["mask=", "none.png", "no such file"]),
    ("inpaint", "--image @picture.png --mask @large+mask.png", ["42 x 36", "21 x 18", "mask_resize"]),
    ("inpaint", "--image @picture.png --mask @black.png", ["mask=", "black all over", "nothing to draw"]),
    ("inpaint", "--image @picture.png --mask @black.png --mask-soft", ["mask=", "black all over", "nothing to draw"]),
    ("inpaint", "--image @picture.png --mask @white.png --mask-invert", ["white all over", "mask_invert", "black"]),
    ("inpaint", "--image @picture.png --mask @dim.png", ["dim.png", "half grey", "mask_soft"]),
    ("inpaint", "--image @see-through.png --loopback 2", ["loopback", "transparent", "mask"]),
    ("inpaint", "--image @picture.png --mask @empty", ["mask=", "no mask of picture.png", "picture_mask.png"]),
    ("inpaint", "--image @pictures --mask @masks", ["mask=", "no mask of b.png", "b_mask.png"]),
    ("inpaint", "--image @picture.png --mask @hard.png --fill magic", ["fill='magic'", "original"]),
    ("inpaint", "--image @picture.png --mask @hard.png --mask-blur-x -1", ["mask_blur_x=-1"]),
    ("outpaint", "--image @picture.png", ["--left", "--down"]),
    ("outpaint", "--image @picture.png --left -5", ["left=-5", "0 to 8192"]),
    ("outpaint", "--image @picture.png --up 9000", ["up=9000", "8192"]),
    ("upscale", "--image @picture.png --factor 0.5", ["upscale=0.5", "1 to 16"]),
    ("upscale", "--image @picture.png --factor 99", ["upscale=99", "1 to 16"]),
    ("upscale", "--image @picture.png --upscaler magic", ["upscaler='magic'", "lanczos", "file"]),
    ("upscale", "--image @picture.png --overlap 12", ["overlap=12", "2 to 8"]),
]  # fmt: skip


@pytest.fixture
def messy(desk: Path) -> Path:
    """The desk with damaged files and folders that lack something."""
    (desk / "notes.txt").write_text("not a picture")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(desk / "a.jpg")
    whole = (desk / "a.jpg").read_bytes()
    (desk / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((40, 20000, 3), np.uint8)).save(desk / "wide.png")
    for name in ("empty", "pictures", "masks"):
        (desk / name).mkdir()
    for name in ("pictures/a.png", "pictures/b.png"):
        Image.fromarray(pixels(desk / "picture.png")).save(desk / name)
    Image.fromarray(pixels(desk / "hard.png")).save(desk / "masks" / "a_mask.png")
    return desk


@pytest.mark.parametrize("command, text, words", BAD, ids=[f"{command} {text}" for command, text, _ in BAD])
def test_bad_input_is_one_line_and_saves_nothing(
    models: Callable[[str | None], Path], messy: Path, capsys: pytest.CaptureFixture[str], command: str, text: str,
    words: list[str],
) -> None:  # fmt: skip
    assert edit(command, models(None), messy, text) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not list((messy / "out").rglob("*.png"))


@pytest.mark.parametrize("command, text, concat, words", [
    ("depth2img", "--image @picture.png", "depth", ["--depth"]),
    ("depth2img", "--image @picture.png --depth @grey.png", "depth", ["depth=", "same grey everywhere"]),
    ("depth2img", "--image @picture.png --depth @none.png", "depth", ["depth=", "none.png", "no such file"]),
    ("depth2img", "--image @picture.png --depth @none.onnx", "depth", ["depth=", "none.onnx", "no such file"]),
    ("img2img", "--image @picture.png", "depth", ["depth=None", "depth map"]),
    ("txt2img", "", "depth", ["image=None", "picture"]),
    ("txt2img", "", "picture", ["image=None", "picture"]),
    ("txt2img", "", "lowres", ["image=None", "picture"]),
    ("img2img", "--image @picture.png", "lowres", ["enlarges", "upscale"]),
    ("upscale", "--image @picture.png --factor 2", "lowres", ["upscale=2", "4"]),
])  # fmt: skip
def test_what_a_model_cannot_do(
    models: Callable[[str | None], Path], desk: Path, capsys: pytest.CaptureFixture[str], command: str, text: str,
    concat: str, words: list[str],
) -> None:  # fmt: skip
    assert edit(command, models(concat), desk, text) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not list((desk / "out").rglob("*.png"))


def test_a_bad_mask_in_a_folder_is_told_before_the_first_is_drawn(
    models: Callable[[str | None], Path], messy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(pixels(messy / "black.png")).save(messy / "masks" / "b_mask.png")
    assert edit("inpaint", models(None), messy, "--image @pictures --mask @masks") == 2
    assert "b_mask.png" in one_line(capsys)
    assert not list((messy / "out").rglob("*.png"))


def test_an_empty_path_is_no_folder(
    models: Callable[[str | None], Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--image", ""], ["--image", str(desk / "picture.png"), "--mask", ""]):
        assert main(["img2img", "--ckpt", str(models(None)), "--prompt", "x", *words]) == 2
        assert f"{words[-2].removeprefix('--')}='': the path of a picture is needed" in one_line(capsys)


@pytest.mark.parametrize("fields, words", [
    ({"mask": "m.png"}, "mask='m.png': an image is needed"),
    ({"strength": 0.5}, "strength=0.5: an image is needed"),
    ({"left": 5}, "left=5: an image is needed"),
    ({"upscale": 2.0}, "upscale=2.0: an image is needed"),
    ({"depth": "d.png"}, "depth='d.png': an image is needed"),
    ({"image": "a.png", "mask": "m.png", "steps": 0}, "image='a.png': no such file"),
])  # fmt: skip
def test_jobs_that_lack_their_picture(models: Callable[[str | None], Path], fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pipeline.from_pretrained(models(None)).draw(replace(Job("x"), **fields))


def test_enlarging_alone_says_nothing_of_prompts(
    models: Callable[[str | None], Path], desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert edit("upscale", models(None), desk, "--image @picture.png --prompt=") == 0
        assert "unconditionally" not in caplog.text
        assert edit("img2img", models(None), desk, "--image @picture.png --prompt=") == 0
        assert "unconditionally" in caplog.text
    assert pixels(saved(desk)[0]).shape == (2 * HIGH, 2 * WIDE, 3)
    assert np.array_equal(pixels(saved(desk)[0]), fitted(pixels(desk / "picture.png"), 2 * WIDE, 2 * HIGH, "stretch"))


def test_replay_takes_a_source_that_was_moved(tiny_checkpoint, tmp_path, desk, capsys):
    saved = tmp_path / "out" / "samples" / "00000.png"
    flags = ["--ckpt", str(tiny_checkpoint), "--prompt", "x", "--steps", "2", "--outdir", str(tmp_path / "out")]
    assert main(["img2img", "--image", str(desk / "picture.png"), *flags]) == 0
    (desk / "picture.png").rename(desk / "elsewhere.png")
    assert main(["replay", str(saved), "--ckpt", str(tiny_checkpoint)]) == 2
    assert "no such file" in capsys.readouterr().err
    moved = ["--image", str(desk / "elsewhere.png")]
    assert main(["replay", str(saved), *moved, "--ckpt", str(tiny_checkpoint)]) == 0
    assert "equal: every pixel" in capsys.readouterr().out


def test_the_memory_plan_is_for_the_image_and_not_the_models_size(tiny_checkpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    Image.new("RGB", (512, 512)).save(tmp_path / "large.png")
    flags = ["--ckpt", str(tiny_checkpoint), "--prompt", "x", "--strength", "0", "--outdir", str(tmp_path)]
    estimates = []
    for more in (["--W", "16", "--H", "16"], []):
        caplog.clear()
        assert main(["img2img", "--image", str(tmp_path / "large.png"), *flags, *more, "--vram", "2"]) == 0
        [line] = [text for text in caplog.messages if text.startswith("plan for")]
        estimates.append(line)
    assert estimates[0] != estimates[1]
