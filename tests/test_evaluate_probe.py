"""The probe: its intervals, what readers say of colours that are known, resuming, and bad questions in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from sfumato.cli.main import main
from sfumato.evaluate.features import Network, open_features
from sfumato.evaluate.probe import (
    Asked,
    Drawing,
    Probe,
    Tally,
    evenness,
    folder_name,
    pictures_of,
    pooled,
    probed,
    told,
    wilson,
)
from sfumato.evaluate.probe_files import montage, read_probe, table
from sfumato.evaluate.readers import Classes, ZeroShot, reader_of
from sfumato.images import load_png
from sfumato.pipeline import Pipeline

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


class Means(nn.Module):
    """Mean colour of pictures, with a parameter so that it has a device."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images.mean((2, 3))


def colour_reader(classes):
    """Logits of classes 0 to 2 are ten times the mean of red, green and blue."""
    network = Network("means", "0" * 16, Means(), 8, 3, ((0.0,) * 3, (1.0,) * 3), lambda features: 10 * features)
    return Classes(network, classes)


def plain(name, side=10):
    return np.broadcast_to(np.array(COLOURS[name], np.uint8), (side, side, 3)).copy()


@pytest.mark.parametrize("hits, total", [(0, 1), (0, 20), (1, 20), (10, 20), (20, 20), (999, 1000)])
def test_wilson_is_scipys(hits, total):
    wanted = binomtest(hits, total).proportion_ci(method="wilson")
    assert wilson(hits, total) == pytest.approx((wanted.low, wanted.high), abs=1e-7)


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="hits=3: 0 to 2"):
        wilson(3, 2)


def test_evenness():
    assert evenness([5, 5, 5]) == pytest.approx(1) and evenness([9, 0, 0]) == 0 and evenness([0, 0]) == 0
    assert evenness([3, 1]) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2))


def test_classes_read_colours_and_add_up_options():
    reader = colour_reader({"colour": {"red": 0, "other": [1, 2]}, "cold": {"blue": [2], "green": [1]}})
    pictures = [plain("red"), plain("green", 30), plain("blue")]
    read = reader.read(pictures)
    assert read["colour"].argmax(-1).tolist() == [0, 1, 1]
    logits = 10 * torch.tensor([COLOURS[name] for name in COLOURS]).float() / 255
    sums = torch.stack([logits.softmax(-1)[:, 0], logits.softmax(-1)[:, 1:].sum(-1)], -1)
    assert torch.allclose(read["colour"], sums, atol=1e-5)
    assert read["cold"][2, 0] > 0.99 and torch.allclose(read["cold"][0], torch.tensor([0.5, 0.5]), atol=1e-5)


def test_zero_shot_is_the_mean_direction_of_texts(clip_file):
    clip = open_features(f"clip:{clip_file}")
    options = {"kind": {"a": ["a cat", "the cat"], "b": "a dog"}}
    reader = reader_of(clip, options)
    assert isinstance(reader, ZeroShot)
    pictures = [plain(name, 16) for name in COLOURS]
    texts = F.normalize(clip.texts(["a cat", "the cat", "a dog"]), dim=-1)
    directions = F.normalize(torch.stack([texts[:2].mean(0), texts[2]]), dim=-1)
    images = F.normalize(clip(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255), dim=-1)
    assert torch.allclose(reader.read(pictures)["kind"], (100 * images @ directions.T).softmax(-1), atol=1e-5)
    assert reader.facts["reader"] == "clip" and len(reader.facts["hash"]) == 16
    assert reader.read([])["kind"].shape == (0, 2)


@pytest.mark.parametrize("texts", [[], [3], "", None])
def test_zero_shot_needs_texts(clip_file, texts):
    with pytest.raises(ValueError, match=r"attributes\.kind\.a="):
        reader_of(open_features(f"clip:{clip_file}"), {"kind": {"a": texts, "b": "a dog"}})


@pytest.mark.parametrize("numbers", [[], [3], [-1], "red", [True]])
def test_classes_need_numbers_of_classes(numbers):
    with pytest.raises(ValueError, match=r"attributes\.kind\.a=.*0 to 2"):
        colour_reader({"kind": {"a": numbers, "b": [0]}})


def test_a_network_without_classes_cannot_read():
    network = Network("means", "0" * 16, Means(), 8, 3, ((0.0,) * 3, (1.0,) * 3))
    with pytest.raises(ValueError, match="no classes"):
        reader_of(network, {"kind": {"a": [0], "b": [1]}})


def test_counts_shares_and_groups():
    one = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    asked = [{"k": torch.full((4,), 1)}, {"k": torch.tensor([0, 0]), "z": torch.tensor([0, 0])}]
    tallies = [Tally("x", 4, {"k": one}, asked[0], "g"), Tally("y", 2, {"k": one[:2], "z": one[:2]}, asked[1], "g")]
    found = told(tallies[0], {"k": ("a", "b")})["attributes"]["k"]
    assert [found["options"][name]["count"] for name in "ab"] == [3, 1]
    assert found["options"]["a"]["mean"] == pytest.approx(0.6)
    assert (found["asked"]["option"], found["asked"]["share"]) == ("b", 0.25)
    assert (found["asked"]["low"], found["asked"]["high"]) == wilson(1, 4)
    (group,) = pooled(tallies)
    assert group.name == "g" and group.pictures == 6 and list(group.read) == list(group.asked) == ["k"]
    found = told(group, {"k": ("a", "b")})["attributes"]["k"]
    assert found["options"]["a"]["count"] == 4
    assert (found["asked"]["option"], found["asked"]["count"]) == (None, 2)  # one of x, one of y


QUESTIONS = """
prompts = ["a thing", {prompt = "a red thing", reads = ["colour"], asks = {colour = "red"}, group = "told"}]
[attributes.colour]
red = ["a red picture"]
green = "a green picture"
blue = ["a blue picture", "blue"]
[attributes.bright]
dark = ["a dark picture"]
light = ["a light picture"]
"""


@pytest.fixture
def questions(tmp_path):
    pytest.importorskip("tomllib")
    path = tmp_path / "probe.toml"
    path.write_text(QUESTIONS)
    return path


def test_reading_questions_as_toml_and_as_json(questions, tmp_path):
    probe, options = read_probe(questions)
    assert [asked.prompt for asked in probe.prompts] == ["a thing", "a red thing"]
    assert probe.attributes == {"colour": ("red", "green", "blue"), "bright": ("dark", "light")}
    assert probe.read_of(probe.prompts[0]) == ("colour", "bright") and probe.read_of(probe.prompts[1]) == ("colour",)
    prompts = ["a thing", {"prompt": "a red thing", "reads": ["colour"], "asks": {"colour": "red"}, "group": "told"}]
    (tmp_path / "probe.json").write_text(json.dumps({"prompts": prompts, "attributes": options}))
    assert read_probe(tmp_path / "probe.json") == (probe, options)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "a table"),
        ("{", "damaged"),
        ('{"prompts": ["a"], "attrs": {}}', "'attrs' is not known"),
        ('{"prompts": []}', "one or more"),
        ('{"prompts": ["a", "a"]}', "comes twice"),
        ('{"prompts": [""]}', "prompts, 1"),
        ('{"prompts": ["a", {"prompt": "b", "ask": 1}]}', "prompts, 2: 'ask' is not known"),
        ('{"prompts": [{"prompt": "b", "reads": ["x"]}]}', "names the attribute 'x'"),
        ('{"prompts": [{"prompt": "b", "reads": "x"}]}', "reads='x'"),
        ('{"prompts": ["b"], "attributes": {"x": {"one": ["1"]}}}', "two options"),
        (
            '{"prompts": [{"prompt": "b", "asks": {"x": "c"}}], "attributes": {"x": {"a": "", "b": ""}}}',
            "one of a, b",
        ),
        ('{"prompts": [{"prompt": "b", "group": 1}]}', "group=1"),
        ('{"prompts": ["b"], "attributes": {"x": ["a", "b"]}}', "tables of options"),
    ],
)
def test_bad_questions_are_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "probe.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_probe(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def counted(monkeypatch):
    """How many pictures are drawn."""
    count = []
    original = Pipeline.draw_many
    monkeypatch.setattr(Pipeline, "draw_many", lambda self, jobs, *rest: (count.extend(jobs), original(self, jobs))[1])
    return count


def test_pictures_are_kept_and_only_what_lacks_is_drawn(tiny_checkpoint, tmp_path, counted):
    pipeline, drawing = Pipeline.from_pretrained(tiny_checkpoint, "cpu"), Drawing(5, steps=2, batch=2)
    first = pictures_of(tmp_path, pipeline, "a thing", drawing, lambda n: None)
    assert len(counted) == 5 and len({job.seed for job in counted}) == 5
    paths = sorted(tmp_path.glob("*.png"))
    paths[3].write_bytes(paths[3].read_bytes()[:50])
    paths[4].unlink()
    again = pictures_of(tmp_path, pipeline, "a thing", drawing, lambda n: None)
    assert len(counted) == 8  # the chunk of the damaged one, and the last one
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(load_png(paths[3])[0], first[3])
    more = pictures_of(tmp_path, pipeline, "a thing", Drawing(6, steps=2, batch=2), lambda n: None)
    assert len(counted) == 10 and all(np.array_equal(a, b) for a, b in zip(first, more, strict=False))
    with pytest.raises(ValueError, match="other settings; another folder"):
        pictures_of(tmp_path, pipeline, "a thing", Drawing(5, steps=3, batch=2), lambda n: None)


def test_a_prompts_noise_is_its_own():
    a, b = (Drawing(2, seed=1).jobs(prompt, range(2)) for prompt in ("a", "b"))
    assert (
        a == Drawing(9, seed=1).jobs("a", range(2))
        and len({a[0].seed, b[0].seed, Drawing(2).jobs("b", range(2))[0].seed}) == 3
    )
    assert folder_name("A cat!") != folder_name("a cat") and folder_name("猫").startswith("prompt-")


def test_a_reader_that_answers_another_question_is_refused(tiny_checkpoint, tmp_path):
    class Strange:
        def __init__(self):
            self.facts = {"reader": "strange"}

        def read(self, pictures):
            return {"kind": torch.zeros(len(pictures), 3)}

    pipeline, probe = Pipeline.from_pretrained(tiny_checkpoint, "cpu"), Probe((Asked("a"),), {"kind": ("a", "b")})
    with pytest.raises(ValueError, match=r"attributes\.kind: the reader gave \(1, 3\)"):
        list(probed(tmp_path, pipeline, probe, Drawing(1, steps=2), Strange(), lambda n: None))


def test_a_montage_shows_every_picture():
    pictures = [plain(name, 24) for name in COLOURS]
    sheet = montage("three", [("a row with a long label " * 3, pictures), ("another", [plain("red", 300)] * 3)])
    found = {tuple(int(level) for level in pixel) for pixel in sheet.reshape(-1, 3)}
    assert set(COLOURS.values()) <= found and sheet.shape[1] < 3 * 300  # large ones are made smaller


def probe(*words):
    return main(["evaluate", "probe", *map(str, words), "--device", "cpu"])


def test_the_command_from_file_to_table(questions, clip_file, tiny_checkpoint, tmp_path, capsys, counted):
    words = ["--prompts", questions, "--features", f"clip:{clip_file}", "--ckpt", tiny_checkpoint, "--samples", 4,
             "--steps", 2, "--out", tmp_path / "out"]  # fmt: skip
    assert probe(*words) == 0
    folder = tmp_path / "out" / "tiny"
    content = json.loads((folder / "results.json").read_text())
    assert content["drawing"]["samples"] == 4 and content["reader"]["reader"] == "clip"
    thing, red = content["prompts"]
    assert list(thing["attributes"]) == ["colour", "bright"] and list(red["attributes"]) == ["colour"]
    assert sum(share["count"] for share in thing["attributes"]["colour"]["options"].values()) == 4
    asked = red["attributes"]["colour"]["asked"]
    assert asked["option"] == "red" and asked["share"] == red["attributes"]["colour"]["options"]["red"]["share"]
    assert [group["name"] for group in content["groups"]] == ["told"] and "model hash" in content
    printed, written = capsys.readouterr().out, (folder / "table.md").read_text()
    assert written in printed and "| a red thing | 4 | colour | red:" in written and "| told | 4 |" in written
    with Image.open(folder / "montage.png") as sheet:
        assert sheet.width > 4 * 16 and sheet.height > 2 * 16
    assert len(counted) == 8
    # other texts are read of the same pictures
    questions.write_text(QUESTIONS.replace("a dark picture", "the night"))
    assert probe(*words) == 0 and len(counted) == 8
    again = json.loads((folder / "results.json").read_text())["prompts"][0]["attributes"]
    assert again["colour"] == thing["attributes"]["colour"] and again["bright"] != thing["attributes"]["bright"]


def test_the_table_escapes_what_would_break_it():
    entry = {"name": "a|b\nc", "pictures": 1, "attributes": {"k": {"options": {}, "evenness": 0.0}}}
    assert "| a\\|b c | 1 | k |" in table([entry])


@pytest.mark.parametrize(
    "change, message",
    [
        (["--features"], "expected at least one argument"),
        (["--prompts", "none.toml"], "prompts='none.toml'"),
        (["--guidance", "1,2"], "guidance='1,2': a probe has one"),
        (["--shown", "0"], "shown=0"),
        (["--samples", "0"], "samples=0"),
        (["--features", "mobilenet-v2", "efficientnet-lite0"], "one network"),
    ],
)
def test_bad_flags_are_one_line(questions, clip_file, tiny_checkpoint, tmp_path, capsys, change, message):
    words = ["--prompts", questions, "--features", f"clip:{clip_file}", "--ckpt", tiny_checkpoint, "--out", tmp_path]
    try:
        code = probe(*words, *change)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
