"""Plots: axes as people write them, cells in order, a sheet whose boxes hold the pictures, and each drawn again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.cli.main import main
from sfumato.cli.plot import read_plot
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.images import load_png, save_png
from sfumato.pipeline import Pipeline
from sfumato.tasks.plot import Axis, matrix_axes, plot_of, read_axis, split_prompt
from sfumato.tasks.sheet import MIN_WIDTH, Names, Sheet, _font, shortened, wrapped
from sfumato.types import Hires, Job


def plot(ckpt: Path, out: Path, *flags: str, prompt: str = "a cat") -> int:
    return main(["plot", "--ckpt", str(ckpt), "--out", str(out), "--prompt", prompt, "--steps", "2", *flags])


def error_of(capsys) -> str:
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("steps=5", (5,)),
        ("steps= 5 , 10,20", (5, 10, 20)),
        ("steps=1-5", (1, 2, 3, 4, 5)),
        ("steps=1-5 (+2)", (1, 3, 5)),
        ("steps=1-6 (+2), 40", (1, 3, 5, 40)),
        ("steps=10-0 (-5)", (10, 5, 0)),
        ("steps=3-1", (3, 2, 1)),
        ("steps=1-10 [5]", (1, 3, 5, 7, 10)),
        ("steps=1-3 [5]", (1, 2, 3)),
        ("steps=7-9 [1]", (7,)),
        ("steps=none, 7", (None, 7)),
        ("guidance=1-2 (+0.25)", (1.0, 1.25, 1.5, 1.75, 2.0)),
        ("guidance=0.1-0.5 (+0.1)", (0.1, 0.2, 0.3, 0.4, 0.5)),
        ("guidance=0-1 [3]", (0.0, 0.5, 1.0)),
        ("guidance=1e-2, .5", (0.01, 0.5)),
        ("guidance=-1-1", (-1.0, 0.0, 1.0)),
        ("Clip-Skip=1,2", (1, 2)),
        ("hires.scale=1.5", (1.5,)),
        ("hires-steps=4", (4,)),
        ("options.s_churn=0-10 [2]", (0.0, 10.0)),
        ('freeu=none,"1.5,1.6,0.9,0.2"', (None, (1.5, 1.6, 0.9, 0.2))),
        ("sampler=DPM++ 2M, Euler a", ("DPM++ 2M", "Euler a")),
        ("sampler=ALL", tuple(SAMPLERS)),
        ('prompt="cat, old", dog', ("cat, old", "dog")),
        ("negative=,blue", ("", "blue")),
        ("prompt=a=b", ("a=b",)),
    ],
)
def test_axes(text, values):
    axis = read_axis("x", text)
    assert axis.values == values
    assert all(type(one) is type(other) for one, other in zip(axis.values, values, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps", ["x='steps'", "FIELD=VALUES"]),
        ("steps=", ["steps=''", "no values"]),
        ("steps= ", ["no values"]),
        ("prompt=", ["no values"]),
        ("stepz=5", ["x='stepz'", "did you mean steps"]),
        ("zzzz=5", ["there are", "guidance", "hires.scale", "options.NAME"]),
        ("hires=2", ["did you mean"]),
        ("hires.stepz=5", ["did you mean hires.steps"]),
        ("count=1,2", ["every cell is one picture"]),
        ("options=3", ["options.s_churn"]),
        ("steps=1.5", ["x: steps='1.5'", "a whole number", "1-9 (+2)"]),
        ("steps=5,,6", ["steps=''"]),
        ("guidance=nan", ["'nan'", "a number"]),
        ("steps=1-5 (+0.5)", ["'1-5 (+0.5)'", "whole numbers"]),
        ("steps=1-5 (+0)", ["do not lead from 1 to 5"]),
        ("steps=1-5 (-1)", ["do not lead from 1 to 5"]),
        ("steps=1-5 [0]", ["1 to 10000 values"]),
        ("steps=1-100000", ["1 to 10000 values"]),
        ("guidance=0-1e300 (+1e-300)", ["1 to 10000 values"]),
        ("guidance=0.1-0.5", ["say its steps"]),
        ("freeu=a", ["freeu='a'", "numbers between commas"]),
        ("seed=none", ["seed='none'", "a whole number"]),
    ],
)
def test_bad_axes(text, words):
    with pytest.raises(ValueError) as caught:
        read_axis("x", text)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_cells_in_order():
    made = plot_of(Job(prompt="a cat"), {"x": "steps=1,2,3", "y": "prompt=cat,dog", "z": "hires.scale=1.5,2"})
    cells = made.cells()
    assert len(cells) == 12
    told = [(cell.job.steps, cell.job.prompt, cell.job.hires.scale) for cell in cells[:5] + cells[-1:]]
    assert told == [
        (1, "a cat", 1.5),
        (2, "a cat", 1.5),
        (3, "a cat", 1.5),
        (1, "a dog", 1.5),
        (2, "a dog", 1.5),
        (3, "a dog", 2.0),
    ]
    assert cells[3].words == "steps=1, prompt=dog, hires.scale=1.5"
    assert {cell.job.seed for cell in cells} == {0}


def test_options_and_second_pass_as_axes():
    job = Job(options={"s_noise": 1.0}, hires=Hires(steps=3))
    made = plot_of(job, {"x": "options.s_churn=0,5", "y": "hires.strength=0.3,0.5"})
    assert [cell.job.options for cell in made.cells()[:2]] == [{"s_noise": 1.0, "s_churn": c} for c in (0.0, 5.0)]
    assert [cell.job.hires for cell in made.cells()[::2]] == [Hires(steps=3, strength=s) for s in (0.3, 0.5)]
    with pytest.raises(ValueError, match="hires.steps=5: it is the second pass's"):
        plot_of(Job(), {"x": "hires.steps=5"}).cells()


def test_two_words_of_a_prompt():
    made = plot_of(Job(prompt="a cat at night"), {"x": "prompt=cat,dog", "y": "prompt=at night,in snow"})
    prompts = ["a cat at night", "a dog at night", "a cat in snow", "a dog in snow"]
    assert [cell.job.prompt for cell in made.cells()] == prompts


@pytest.mark.parametrize(
    ("job", "texts", "words"),
    [
        (Job(), {}, ["--x steps=5"]),
        (Job(count=3), {"x": "steps=5"}, ["count=3", "1"]),
        (Job(), {"x": "steps=5", "y": "steps=6"}, ["y: steps", "along x"]),
        (Job(prompt="a cat"), {"x": "prompt=cat,dog", "y": "prompt=cat,owl"}, ["y: prompt", "along x"]),
        (Job(prompt="a cat"), {"x": "prompt=dog,cat"}, ["x: prompt='dog'", "must occur", "'a cat'"]),
        (Job(prompt="a cat"), {"x": "prompt=,cat"}, ["prompt=''", "must occur"]),
        (Job(), {"x": "seed=1-1000", "y": "steps=1-11"}, ["11000 cells", "10000"]),
    ],
)
def test_bad_plots(job, texts, words):
    with pytest.raises(ValueError) as caught:
        plot_of(job, texts)
    assert all(word in str(caught.value) for word in words), caught.value


def test_matrix():
    prompt = "a {cat|dog}, [fe|]male | in (snow|ice) | at night|"
    assert split_prompt(prompt) == ["a {cat|dog}, [fe|]male", "in (snow|ice)", "at night", ""]
    assert split_prompt(r"a \( cat|b") == [r"a \( cat", "b"]
    assert matrix_axes(["b"], "xyz") == {"x": Axis("matrix", ((), ("b",)))}
    job = Job(prompt="a cat|in snow|at night")
    made = plot_of(job, {}, matrix=True)
    assert (made.x.labels(), made.y.labels()) == (["none", "in snow"], ["none", "at night"])
    prompts = [cell.job.prompt for cell in made.cells()]
    assert prompts == ["a cat", "a cat, in snow", "a cat, at night", "a cat, in snow, at night"]
    with_steps = plot_of(job, {"x": "steps=1,2"}, matrix=True)
    assert with_steps.y.labels() == ["none", "in snow", "at night", "in snow, at night"]
    replaced = plot_of(job, {"x": "prompt=snow,sand"}, matrix=True)
    assert [cell.job.prompt for cell in replaced.cells()][-2:] == [
        "a cat, in snow, at night",
        "a cat, in sand, at night",
    ]
    with pytest.raises(ValueError, match="matrix: x, y and z are taken"):
        plot_of(job, {"x": "steps=1", "y": "seed=1", "z": "guidance=1"}, matrix=True)
    with pytest.raises(ValueError, match="matrix: the prompt has 0 parts"):
        plot_of(Job(prompt="a cat"), {}, matrix=True)


@pytest.mark.parametrize(
    "text", ["", "a", "dpmpp_2m_sde_heun", "one two three four five", "x" * 90, "a\nb\tc  d", "é—ß"]
)
@pytest.mark.parametrize("width", [20, 64, 200])
def test_labels_fit(text, width):
    font = _font(12)
    lines = wrapped(text, font, width)
    assert 1 <= len(lines) <= 3 and all(font.getlength(line) <= width for line in lines)
    if not lines[-1].endswith("…"):
        assert "".join("".join(lines).split()) == "".join(text.split())
    assert font.getlength(shortened(text, font, width)) <= width


def test_labels_break_at_signs():
    assert wrapped("dpmpp_2m_sde", _font(12), 64) == ["dpmpp_", "2m_sde"]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    columns=st.none() | st.integers(1, 5),
    labels=st.sampled_from(["", "a", "a long label of several words", "_" * 40]),
    sides=st.lists(st.integers(1, 60), min_size=2, max_size=9),
)
def test_boxes_are_apart_and_inside(shape, columns, labels, sides):
    nx, ny, nz = shape
    num = nx * ny * nz
    sizes = [(sides[i % len(sides)], sides[(i + 1) % len(sides)]) for i in range(num)]
    sheet = Sheet(("title", ", seed 1"), Names("x", "y", "z"), tuple([labels] * n for n in shape), sizes, columns)
    height, width, _ = sheet.pixels.shape
    taken = np.zeros((height, width), int)
    for index, (left, top, right, bottom) in enumerate(sheet.boxes):
        assert (right - left, bottom - top) == sizes[index]
        assert 0 < left < right < width and 0 < top < bottom < height
        taken[top:bottom, left:right] += 1
        sheet.paste(index, np.full((bottom - top, right - left, 3), index, np.uint8))
    assert taken.max() == 1 and width >= MIN_WIDTH
    ink = (sheet.pixels != 255).any(axis=2)  # text and edges end before the paper does
    assert not ink[0].any() and not ink[-1].any() and not ink[:, -1].any()


def test_rows_columns_and_blocks():
    def sheet(shape, columns=None):
        sizes = [(16, 16)] * (shape[0] * shape[1] * shape[2])
        return Sheet(("t", ""), Names("x", "y", "z"), tuple([str(i) for i in range(n)] for n in shape), sizes, columns)

    plain = sheet((3, 2, 1)).boxes
    assert plain[0][1] == plain[2][1] < plain[3][1] and plain[0][0] == plain[3][0] < plain[1][0]
    stacked, beside = sheet((2, 1, 2)).boxes, sheet((2, 1, 2), 2).boxes
    assert stacked[2][0] == stacked[0][0] and stacked[2][1] > stacked[0][1]
    assert beside[2][1] == beside[0][1] and beside[2][0] > beside[1][0]
    broken = sheet((5, 1, 1), 2).boxes
    assert [box[0] for box in broken[::2]] == [broken[0][0]] * 3 and broken[4][1] > broken[2][1] > broken[0][1]


def test_a_sheet_that_is_too_large():
    with pytest.raises(ValueError, match="pixels; 170000000 in all"):
        Sheet(("t", ""), Names("x"), (["a"] * 100, [""], [""]), [(2048, 2048)] * 100)
    with pytest.raises(ValueError, match="cell 1: a picture"):
        Sheet(("t", ""), Names("x"), (["a"], [""], [""]), [(16, 16)]).paste(0, np.zeros((8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint, tmp_path_factory):
    """A plot of eight cells in groups of three, and the cells as pictures of their own."""
    folder = tmp_path_factory.mktemp("plot")
    flags = ["--x", "sampler=euler,DPM++ 2M Karras", "--y", "steps=1,3", "--z", "seed=7,8", "--together", "3"]
    assert plot(tiny_checkpoint, folder / "plot.png", *flags, "--cells", str(folder / "cells")) == 0
    return folder


def test_boxes_hold_the_cells(drawn):
    pixels, made = load_png(drawn / "plot.png")
    assert made["plot"]["axes"]["y"] == {"field": "steps", "values": [1, 3]}
    cells = made["plot"]["cells"]
    jobs = [cell["recipe"]["job"] for cell in cells]
    assert [(job["seed"], job["steps"], job["sampler"]) for job in jobs] == [
        (seed, steps, sampler) for seed in (7, 8) for steps in (1, 3) for sampler in ("euler", "dpmpp_2m")
    ]
    assert [cell["together"] for cell in cells] == [[1, 3]] * 3 + [[4, 6]] * 3 + [[7, 8]] * 2
    pictures = sorted((drawn / "cells").iterdir())
    assert [path.name for path in pictures] == [f"cell-000{number}.png" for number in range(1, 9)]
    for cell, path in zip(cells, pictures, strict=True):
        left, top, right, bottom = cell["box"]
        own, recipe = load_png(path)
        assert np.array_equal(pixels[top:bottom, left:right], own) and own.std() > 0
        assert {name: recipe[name] for name in cell["recipe"]} == cell["recipe"]


def test_cells_are_what_txt2img_draws(tiny_checkpoint, tmp_path):
    assert plot(tiny_checkpoint, tmp_path / "p.png", "--x", "steps=1,2", "--seed", "5", "--together", "1") == 0
    flags = ["--ckpt", str(tiny_checkpoint), "--outdir", str(tmp_path), "--steps", "2", "--seed", "5"]
    assert main(["txt2img", "--prompt", "a cat", *flags]) == 0
    single, _ = load_png(tmp_path / "samples" / "00000.png")
    pixels, entries = read_plot(tmp_path / "p.png")
    left, top, right, bottom = entries[1]["box"]
    assert np.array_equal(pixels[top:bottom, left:right], single)


@pytest.mark.parametrize("number", [2, 7])
def test_replay_of_a_cell(drawn, tiny_checkpoint, capsys, number):
    ckpt = ["--ckpt", str(tiny_checkpoint)]
    assert main(["replay", str(drawn / "plot.png"), "--cell", str(number), *ckpt]) == 0
    assert main(["replay", str(drawn / "cells" / f"cell-000{number}.png"), *ckpt]) == 0
    assert capsys.readouterr().out.splitlines() == ["equal: every pixel"] * 2


def test_replay_tells_a_changed_cell(drawn, tiny_checkpoint, tmp_path, capsys):
    pixels, made = load_png(drawn / "plot.png")
    pixels = pixels.copy()
    left, top, _, _ = made["plot"]["cells"][3]["box"]
    pixels[top, left, 0] ^= 16
    save_png(tmp_path / "p.png", pixels, made)
    assert main(["replay", str(tmp_path / "p.png"), "--cell", "4", "--ckpt", str(tiny_checkpoint)]) == 1
    assert "different: 1 of 256 pixels, by 16" in capsys.readouterr().out


def test_read_back(drawn, tmp_path, capsys):
    assert main(["plot", "--read", str(drawn / "plot.png"), "--cells", str(tmp_path / "c")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    for path in (drawn / "cells").iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()
    assert main(["plot", "--read", str(drawn / "plot.png"), "--cells", str(tmp_path / "c")]) == 2
    assert "holds cells already" in error_of(capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: {"plot": [1]}, ["damaged"]),
        (lambda made: {"plot": {"cells": [{}]}}, ["damaged", "box"]),
        (lambda made: {"plot": {"cells": [cell(made, box=[0, 0, 9999, 9])]}}, ["damaged", "9999"]),
        (lambda made: {"plot": {"cells": [cell(made, box=[0, 0, 1e999, 9])]}}, ["damaged"]),
        (lambda made: {"plot": {"cells": [cell(made, together=[1, 2])]}}, ["damaged", "together=[1, 2]"]),
        (lambda made: {"plot": {"cells": [cell(made, recipe={})]}}, ["damaged", "job"]),
        (lambda made: {"plot": {"cells": [cell(made, recipe={"job": [1]})]}}, ["damaged"]),
        (lambda made: {"plot": {"cells": []}}, ["cell=1", "cells 1 to 0"]),
        (lambda made: {"job": {}}, ["not a plot"]),
    ],
)
def test_damaged_plots(drawn, tmp_path, capsys, change, words):
    pixels, made = load_png(drawn / "plot.png")
    save_png(tmp_path / "p.png", pixels, change(made))
    assert main(["replay", str(tmp_path / "p.png"), "--cell", "1"]) == 2
    line = error_of(capsys)
    assert all(word in line for word in ["p.png" if "cell=1" not in words else "cell=1", *words]), line


def cell(made, **parts):
    return made["plot"]["cells"][0] | {"together": [1, 1]} | parts


def test_a_damaged_cell_that_was_drawn_with_others(drawn, tmp_path, capsys):
    pixels, made = load_png(drawn / "cells" / "cell-0002.png")
    for together in ([], {"jobs": []}, {"jobs": [], "place": 0}, made["together"] | {"place": 0}):
        save_png(tmp_path / "c.png", pixels, made | {"together": together})
        assert main(["replay", str(tmp_path / "c.png")]) == 2
        assert "damaged" in error_of(capsys)


def test_bad_cells_to_replay(drawn, capsys):
    for number in ("0", "9"):
        assert main(["replay", str(drawn / "plot.png"), "--cell", number]) == 2
        assert f"cell={number}: the plot has cells 1 to 8" in error_of(capsys)
    assert main(["replay", str(drawn / "plot.png")]) == 2
    assert "--cell N" in error_of(capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--x", "sampler=lcm,euler", "--y", "steps=4,60"], ["cell sampler=lcm, steps=60: steps=60", "1 to 50"]),
        (["--x", "sampler=euler,eulr"], ["cell sampler=eulr: sampler='eulr'", "did you mean euler"]),
        (["--x", "eta=0,0.5", "--sampler", "heun"], ["cell eta=0.5: eta=0.5", "heun"]),
        (["--x", "hires.scale=1,9"], ["cell hires.scale=9: hires.scale=9"]),
        (["--x", "hires.scale=1,2", "--width", "8000"], ["cell hires.scale=2: width=16000"]),
        (["--x", "options.s_chun=1"], ["s_chun"]),
        (["--x", "steps=1,2", "--count", "2"], ["count=2", "1"]),
        (["--x", "steps=1", "--columns", "0"], ["columns=0"]),
        (["--x", "steps=1", "--together", "-1"], ["together=-1"]),
        (["--x", "width=8192,8000", "--height", "8192", "--y", "steps=1,2"], ["pixels", "170000000"]),
        (["--x", "steps=1", "--like", "none"], ["like='none'"]),
        ([], ["x: say what varies"]),
    ],
)
def test_nothing_is_drawn_before_all_is_checked(tiny_checkpoint, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(Pipeline, "draw_many", lambda *_: pytest.fail("it draws"))
    assert plot(tiny_checkpoint, tmp_path / "p.png", *flags) == 2
    line = error_of(capsys)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_bad_places(tiny_checkpoint, drawn, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for out, word in ((tmp_path / "p.jpg", ".png"), (tmp_path, ".png"), (tmp_path / "file" / "p.png", "written")):
        assert plot(tiny_checkpoint, out, "--x", "steps=1") == 2
        line = error_of(capsys)
        assert "out=" in line and word in line
    assert plot(tiny_checkpoint, tmp_path / "p.png", "--x", "steps=1", "--cells", str(drawn / "cells")) == 2
    assert "holds cells already" in error_of(capsys)
    assert main(["plot", "--read", str(drawn / "plot.png")]) == 2
    assert "--cells DIR" in error_of(capsys)
    assert main(["plot", "--x", "steps=1"]) == 2
    assert "prompt" in error_of(capsys)


def test_what_is_finished_is_kept(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    original, groups = Pipeline.draw_many, []

    def interrupted(self, jobs, progress=None):
        groups.append(len(jobs))
        if len(groups) == 2:
            raise KeyboardInterrupt
        return original(self, jobs, progress)

    monkeypatch.setattr(Pipeline, "draw_many", interrupted)
    assert plot(tiny_checkpoint, tmp_path / "p.png", "--x", "steps=1-5", "--together", "2") == 130
    monkeypatch.undo()
    pixels, entries = read_plot(tmp_path / "p.png")
    assert len(entries) == 2
    assert main(["replay", str(tmp_path / "p.png"), "--cell", "2", "--ckpt", str(tiny_checkpoint)]) == 0


def test_cells_of_different_sizes(tiny_checkpoint, tmp_path):
    flags = ["--x", "width=16,24", "--y", "hires.scale=1,1.5", "--hires-steps", "1", "--hires", "1"]
    assert plot(tiny_checkpoint, tmp_path / "p.png", *flags) == 0
    _, entries = read_plot(tmp_path / "p.png")
    sizes = [(right - left, bottom - top) for left, top, right, bottom in (entry["box"] for entry in entries)]
    assert sizes == [(16, 16), (24, 16), (24, 24), (36, 24)]


def test_choices_are_drawn_from_each_cells_seed(tiny_checkpoint, tmp_path):
    prompt = "a {red|blue|green|black} {cat|dog}"
    assert plot(tiny_checkpoint, tmp_path / "p.png", "--x", "seed=1-8", "--y", "steps=1,2", prompt=prompt) == 0
    _, entries = read_plot(tmp_path / "p.png")
    prompts = [entry["recipe"]["job"]["prompt"] for entry in entries]
    assert prompts[:8] == prompts[8:] and len(set(prompts)) > 2 and not any("{" in text for text in prompts)


def test_large_pictures_are_drawn_fewer_at_once():
    from sfumato.cli.plot import groups

    sizes = [(1024, 1024)] * 10
    assert [len(group) for group in groups(sizes, None)] == [4, 4, 2]
    assert [len(group) for group in groups(sizes, 6)] == [6, 4]
    small = [(64, 64)] * 20
    assert [list(group) for group in groups(small, None)] == [list(range(16)), list(range(16, 20))]


def test_the_recipe_is_plain_json(drawn):
    _, made = load_png(drawn / "plot.png")
    assert json.loads(json.dumps(made)) == made
