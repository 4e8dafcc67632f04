"""The recipes of personalising: their measures on pictures whose answer is known, and a trial at tiny size."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from recipes.box.judge import THINGS, Judge, as_input
from recipes.personal import page, trials
from recipes.personal.creature import HELD, SUBJECT
from recipes.personal.features import judge_features
from recipes.personal.measures import (
    Match,
    cosines,
    edge_match,
    likeness,
    likeness_within,
    mean_match,
    recognised,
)
from recipes.personal.pictures import chosen, says_style, write_character, write_edges, write_style
from recipes.personal.report import rounded
from recipes.personal.sheet import LINE, SIDE, save_sheet
from recipes.personal.training import COMMANDS, SPENT, as_given, trained
from recipes.personal.trials import Trial
from sfumato.cli.main import parser
from sfumato.models.controlnet import ControlNet
from sfumato.pipeline import Pipeline
from sfumato.train.controlnet import new_control
from sfumato.train.data import open_pictures
from tests.adapters import checkpoint_of, model_of

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parents[1] / "docs" / "personalising.md"


# -- measures ---------------------------------------------------------------------------------------------------------


def line(column: int, size: int = 32) -> np.ndarray:
    """An edge map with one upright line."""
    edges = np.zeros((size, size), np.uint8)
    edges[:, column] = 255
    return edges


def test_edges_within_the_tolerance_are_the_same():
    assert edge_match(line(10), line(10), 0) == Match(1.0, 1.0)
    assert edge_match(line(12), line(10), 2) == Match(1.0, 1.0)
    assert edge_match(line(13), line(10), 2) == Match(0.0, 0.0)
    assert edge_match(line(13), line(10), 2).f1 == 0.0


def test_precision_counts_what_is_drawn_and_recall_what_is_wanted():
    more = np.maximum(line(10), line(25))
    assert edge_match(more, line(10), 1) == Match(0.5, 1.0)
    assert edge_match(line(10), more, 1) == Match(1.0, 0.5)
    assert edge_match(more, line(10), 1).f1 == pytest.approx(2 / 3)


def test_maps_without_edges():
    empty = np.zeros((32, 32), np.uint8)
    assert edge_match(empty, line(3), 2) == edge_match(line(3), empty, 2) == Match(0.0, 0.0)
    assert edge_match(empty, empty, 2) == Match(1.0, 1.0)
    with pytest.raises(ValueError, match=r"drawn=\(32, 32\).*\(16, 16\)"):
        edge_match(line(3), line(3, 16), 2)


def test_means_are_of_each_pictures_own_f1():
    found = mean_match([Match(1.0, 1.0), Match(1.0, 0.0)])
    assert found == {"f1": 0.5, "precision": 1.0, "recall": 0.5}


def test_cosines_are_torchs():
    a, b = (torch.randn(count, 7, generator=torch.Generator().manual_seed(count)) for count in (4, 3))
    wanted = F.cosine_similarity(a[:, None].double(), b[None].double(), dim=2).numpy()
    np.testing.assert_allclose(cosines(a, b), wanted, atol=1e-12)
    assert likeness(a, b) == pytest.approx(wanted.mean())


def test_likeness_within_leaves_out_each_picture_itself():
    real = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert likeness_within(real) == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="real=1: 2 pictures"):
        likeness_within(real[:1])


def test_recognised_is_the_share_whose_nearest_is_real():
    real, others = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    drawn = torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 1.0, 5.0], [2.0, 0.0, 1.0]])
    assert recognised(drawn, real, others) == 0.5


def test_figures_are_rounded_wherever_they_lie():
    assert rounded({"a": {"b": 0.123456}, "c": 3, "d": "e"}) == {"a": {"b": 0.1235}, "c": 3, "d": "e"}


def test_the_judges_features_are_what_its_answers_are_made_of():
    torch.manual_seed(0)
    judge = Judge().eval()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), np.uint8)
    with torch.inference_mode():
        found = judge_features(judge, pixels)
        wanted = judge(as_input(pixels))["first"]
        torch.testing.assert_close(judge.heads["first"](found), wanted)
    assert found.shape == (3, 384) and not judge.hidden._forward_hooks
    small = judge_features(judge, [np.asarray(Image.fromarray(each).resize((64, 64))) for each in pixels])
    assert small.shape == (3, 384), "pictures of another size are resized"


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 64 px in a shard as the box's recipe writes them; every fourth is of two things."""
    folder = tmp_path_factory.mktemp("data") / "set"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for index in range(12):
            pixels = np.full((64, 64, 3), 40 + 10 * index, np.uint8)
            pixels[16:48, 12 + index : 40] = rng.integers(0, 255, 3)
            thing, style = THINGS[index], ("3d", "flat")[index % 2]
            facts = {"thing": thing, "style": style, "background": "white"} | (
                {"relation": "left", "second": THINGS[0]} if index % 4 == 3 else {}
            )
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            caption = f"a {style} {thing}" if index == 4 else f"a {thing} on white"
            for suffix, data in (
                ("png", png.getvalue()), ("txt", caption.encode()), ("json", json.dumps(facts).encode()),
            ):  # fmt: skip
                member = tarfile.TarInfo(f"{index:07}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def test_single_things_are_chosen_evenly(shards):
    found = chosen(shards, 3, lambda facts: True)
    assert [sample.thing for sample in found] == [THINGS[0], THINGS[4], THINGS[8]], "of the nine that show one thing"
    assert found[0].pixels.shape == (64, 64, 3) and found[0].caption == f"a {THINGS[0]} on white"
    with pytest.raises(ValueError, match="9 such pictures, 10 are needed"):
        chosen(shards, 10, lambda facts: True)


def test_captions_of_a_style_do_not_tell_it(shards, tmp_path):
    assert says_style("3D cat, pink background") and says_style("flat icon of a cat") and not says_style("a cat")
    samples = write_style(tmp_path, shards, "3d", 5)
    assert {sample.style for sample in samples} == {"3d"} and THINGS[4] not in {sample.thing for sample in samples}
    read = open_pictures(tmp_path / "style")
    assert len(read) == 5 and not any(says_style(str(read.facts(index)["caption"])) for index in range(5))


def test_the_character_is_written_with_the_captions_of_each_training(tmp_path):
    write_character(tmp_path, 32)
    told = {
        name: [str(read.facts(index)["caption"]) for index in range(len(read))]
        for name in ("subject", "held", "word")
        if (read := open_pictures(tmp_path / name))
    }
    assert told["subject"] == [pose.caption for pose in SUBJECT] and told["held"] == [pose.caption for pose in HELD]
    assert told["word"] == [f"{pose.background} background" for pose in SUBJECT]
    assert "a sks penguin on an orange background" in told["held"]


def test_a_sheet_has_a_row_for_each_label(tmp_path):
    rows = [("one", [np.full((64, 64, 3), 200, np.uint8)] * 3), ("two", [np.zeros((64, 64, 3), np.uint8)])]
    save_sheet(tmp_path / "a" / "sheet.png", rows, columns=2)
    with Image.open(tmp_path / "a" / "sheet.png") as page:
        seen = np.asarray(page.convert("RGB"))
    assert (seen[LINE + 9, 9] == 200).all() and (seen[-9, 9] == 0).all() and (seen[-9, -9] == 255).all()
    assert len(seen) == 2 * (LINE + SIDE + 3)


# -- commands and trials ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_commands_are_those_of_the_page(kind):
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = [shlex.split(each, comments=True) for each in text.splitlines() if each.startswith("sfumato train ")]
    for command in COMMANDS[kind]:
        words = shlex.split(command)
        assert words in shown
        parser("train").parse_args(words[1:])


def test_a_command_takes_the_model_and_other_steps():
    assert as_given("sfumato train lora --steps 600 --out a", None) == "sfumato train lora --steps 600 --out a"
    assert as_given("sfumato train lora --steps 600", "b.ckpt", 3) == "sfumato train lora --steps 3 --ckpt b.ckpt"


def test_a_training_is_timed_once_and_kept(shards, tmp_path):
    model = checkpoint_of("sd1")
    base = Pipeline.from_pretrained(model, adapters=[]).model.hash
    command = f"sfumato train lora --data {shards} --out {tmp_path / 'run'} --steps 1 --size 64 --rank 1 --ckpt {model}"
    run = trained(command, base)
    assert run.seconds > 0 and run.core_seconds > 0 and run.name == "run"
    assert (run.folder / "run.safetensors").exists() and (run.folder / SPENT).exists()
    assert trained(command, base) == run
    with pytest.raises(ValueError, match="of another command or model"):
        trained(command + " --seed 1", base)
    (run.folder / SPENT).unlink()
    with pytest.raises(ValueError, match="begun and not finished"):
        trained(command, base)
    with pytest.raises(ValueError, match="ended with code 2"):
        trained(command.replace("--rank 1", "--rank 0").replace("run --", "other --"), base)


@pytest.fixture
def judged(monkeypatch):
    """A judge that sees the fourth thing and the second style in everything."""
    judge = Judge()
    for head in judge.heads.values():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        judge.heads["first"].bias[4] = 9
        judge.heads["style"].bias[1] = 9
    monkeypatch.setattr(trials, "load_judge", lambda folder: judge.eval())


def test_the_judges_answers_become_shares(judged, shards):
    trial = Trial(None, [], shards, Path())
    pixels = np.zeros((4, 128, 128, 3), np.uint8)
    assert trial.right(pixels, [THINGS[4], THINGS[0], THINGS[4], THINGS[4]]) == 0.75
    assert trial.judged(pixels)["style"].tolist() == [1] * 4


def test_prompts_name_every_thing_and_the_held_out_backgrounds():
    trial = Trial(None, [], Path(), Path(), count=80)
    assert set(trial.asked) == set(THINGS) and len(trial.plain_prompts) == 80
    assert all(thing in prompt for thing, prompt in zip(trial.asked, trial.plain_prompts, strict=True))
    assert trial.prompts("a hat")[:2] == ["a hat on a gray background", "a hat on an orange background"]


def test_edges_are_measured_with_and_without_control(judged, shards, tmp_path):
    pytest.importorskip("cv2")
    model = checkpoint_of("sd1")
    base = Pipeline.from_pretrained(model, adapters=[]).model.hash
    write_edges(tmp_path, shards, 4)
    command = (
        f"sfumato train controlnet --data {tmp_path / 'edges'} --annotate canny --out {tmp_path / 'lines'} --steps 1 "
        f"--batch 2 --size 64 --ckpt {model}"
    )
    trial = Trial(str(model), [trained(command, base)], shards, Path(), count=3, steps=2, size=64)
    figures, rows = trials.edges(trial)
    assert set(figures["with control"]) == {"f1", "precision", "recall", "things right"}
    assert all(0 <= value <= 1 for name in ("with control", "without control") for value in figures[name].values())
    assert figures["without control"]["things right"] == pytest.approx(1 / 3), "the judge sees the fourth thing"
    assert [len(pictures) for _, pictures in rows] == [3] * 4
    assert len(list((tmp_path / "lines" / "hints").glob("*.png"))) == 3


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_told_what_the_reports_say(tmp_path):
    figures = {
        "real": {"judge": {"held-out to held-out": 0.9}},
        "before": {name: {"likeness": 0.25, "recognised": 0.0} for name in ("judge", "efficientnet-lite0")},
        "after": {name: {"likeness": 0.75, "recognised": 1.0} for name in ("judge", "efficientnet-lite0")},
        "other things": {"right before": 0.8, "right after": 0.7},
    }
    told = {"trained": [{"core seconds": 90.0}], "figures": figures}
    (tmp_path / "lora.json").write_text(json.dumps(told), encoding="utf-8")
    written = tmp_path / "page.md"
    written.write_text(f"above\n\n{page.BEGIN}old\n{page.END}\nbelow\n", encoding="utf-8")
    page.update(written, tmp_path)
    lines = written.read_text(encoding="utf-8").splitlines()
    assert "| lora | 1.5 | likeness to held-out pictures | 0.25 | 0.75 | 0.90 |" in lines
    assert "|  |  | recognised among other things | 0.00 | 1.00 |  |" in lines
    assert lines[0] == "above" and lines[-1] == "below" and "old" not in lines
    with pytest.raises(ValueError, match="needed once each"):
        page.update(tmp_path / "lora.json", tmp_path)


def test_the_page_of_the_repository_has_the_figures_of_its_reports():
    begun = PAGE.read_text(encoding="utf-8").split(page.BEGIN)[1].split(page.END)[0]
    assert begun.strip("\n") == page.table(PAGE.parent / "personal").strip("\n")


# -- a ControlNet's beginning -----------------------------------------------------------------------------------------


def test_a_hint_is_heard_by_the_last_layer_that_reads_it():
    model = model_of("sd1")
    hint = torch.zeros(1, 3, 64, 64)
    hint[..., 20:44, 20] = hint[..., 20:44, 43] = hint[..., 20, 20:44] = hint[..., 43, 20:44] = 1.0
    heard = []
    torch.manual_seed(0)
    for network in (ControlNet.from_unet(model.unet), new_control(model, 0).network):
        *reading, last = network.input_hint_block.children()
        x = hint
        with torch.no_grad():
            for part in reading:
                x = part(x)
        heard.append(x.std((2, 3)).mean().item())
        assert not last.weight.any() and not last.bias.any(), "it begins as no control at all"
    assert heard[1] > 0.03 > 10 * heard[0]
    again = new_control(model, 0).network.input_hint_block.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.input_hint_block.state_dict().items())
