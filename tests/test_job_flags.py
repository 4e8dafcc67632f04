"""Flags of a Job's fields: none is missing, each arrives, its help is true; styles and choices before drawing."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import pytest

from sfumato.cli import depth2img, img2img, inpaint, outpaint, txt2img, upscale
from sfumato.cli.job_flags import (
    GROUPS,
    Texts,
    add_job_flags,
    flag_names,
    help_of,
    job_from_flags,
    texts_from_flags,
)
from sfumato.cli.main import main
from sfumato.images import load_png
from sfumato.tasks.checks import complete
from sfumato.tasks.plot import field_kinds, with_field
from sfumato.types import Control, Hires, Job

FLAGS = {name: flag for group in GROUPS.values() for name, flag in group.items()}
VALUES = {str: ("some text", "some text"), int: ("3", 3), float: ("0.5", 0.5)}
ODD = {"options": ("s-churn=5", {"s_churn": 5.0}), "freeu": ("1.5,1.6,0.9,0.2", (1.5, 1.6, 0.9, 0.2)),
       "controls": ("edges, image=a.png,annotate=canny,weight=.5,end=0.8,low=50",
                    (Control("edges", "a.png", "canny", {"low": 50.0}, 0.5, end=0.8),))}  # fmt: skip


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_job_flags(parser)
    return parser.parse_args(flags)


def test_no_field_without_a_flag():
    assert sorted(FLAGS) == sorted(field_kinds())
    dests: set[str] = set()
    for command in (txt2img, img2img, inpaint, outpaint, depth2img, upscale):
        parser = argparse.ArgumentParser()
        command.add_flags(parser)
        dests |= {{"n_samples": "count", "images": "image"}.get(action.dest, action.dest) for action in parser._actions}
    assert set(field_kinds()) <= dests
    assert len(parser.format_help()) > 5000


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_each_flag_arrives(name):
    text, value = ODD.get(name) or VALUES.get(field_kinds()[name].type, (None, True))
    job = Job(hires=Hires()) if name.startswith("hires.") else Job()
    job = replace(job, options=value) if name == "options" else with_field(job, name, value)
    second = ["--hires", "2"] if name.startswith("hires.") and name != "hires.scale" else []
    for flag in flag_names(name):
        assert job_from_flags(parsed(*second, flag, *([] if text is None else [text]))) == job


def test_nothing_given_is_an_empty_job():
    assert job_from_flags(parsed()) == Job()
    assert job_from_flags(parsed("--seed", "3"), seed=4, sampler=None) == Job(seed=4)


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_help_names_the_range_and_the_default(name, tiny_family):
    """What the help allows is allowed, and nothing beyond it."""
    text = help_of(name, FLAGS[name], {})
    assert FLAGS[name].help in text and "None" not in text
    found = re.search(r"\((\S+) to (\S+); default", text)
    if found is None:
        return
    low, high = (field_kinds()[name].type(float(number)) for number in found.groups())
    job = Job(noise_width=8, noise_height=8, variation_seed=1, guidance_high=1e4)
    second = name.startswith("hires.")
    job = replace(job, width=16, height=16, hires=Hires()) if second else replace(job, image="some picture")

    def is_allowed(value: float) -> bool:
        try:
            complete(with_field(job, name, value), tiny_family, (16, 16))
        except ValueError as error:
            return "number from" not in str(error)
        return True

    assert not is_allowed(low - 1) and not is_allowed(high + 1)
    assert is_allowed(low) and is_allowed(high)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--option", "s_churn"], ["option='s_churn'", "NAME=NUMBER"]),
        (["--option", "=3"], ["option='=3'"]),
        (["--option", "s_churn=much"], ["option='s_churn=much'"]),
        (["--freeu", "1,2,x,4"], ["freeu='1,2,x,4'", "numbers"]),
        (["--hires-strength", "0.5"], ["hires-strength=0.5", "--hires SCALE"]),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(ValueError) as caught:
        job_from_flags(parsed(*flags))
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_option_is_taken():
    job = job_from_flags(parsed("--option", "s_churn=5", "--option", "s-noise=1.01"))
    assert job.options == {"s_churn": 5.0, "s_noise": 1.01}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with styles and wildcards, in which the command runs."""
    (tmp_path / "styles.csv").write_text("name,prompt,negative_prompt\nink,{prompt} in ink,blurry\nold,very old,new\n")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "animal.txt").write_text("fox\nowl\nbear\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(*flags: str) -> Texts:
    return texts_from_flags(parsed(*flags))


def test_styles(folder):
    job = Job(prompt="a cat", negative="dog", hires=Hires(prompt="a sharp cat"))
    [styled] = texts("--style", "ink", "--style", "old").jobs(job)
    assert (styled.prompt, styled.negative) == ("a cat in ink, very old", "dog, blurry, new")
    assert styled.hires == Hires(prompt="a sharp cat in ink, very old")


def test_texts_without_styles_or_choices_stay(folder):
    job = Job(prompt="a cat # {not|comment", negative="[a|b] {x}", count=3, hires=Hires())
    assert texts().jobs(job) == [job]


def test_choices_make_a_job_for_each_picture(folder):
    job = Job(prompt="{red|blue|green|black} {cat|dog}", negative="{red|blue|green|black}", seed=5, count=12)
    jobs = texts().jobs(job)
    assert [(one.seed, one.count) for one in jobs] == [(seed, 1) for seed in range(5, 17)]
    assert len({one.prompt for one in jobs}) > 3
    assert all(one.prompt.startswith(one.negative) and "{" not in one.prompt for one in jobs)
    assert texts().jobs(replace(job, seed=8, count=1)) == [jobs[3]]


def test_pictures_of_a_variation_share_their_choice(folder):
    job = Job(prompt="{red|blue|green|black|white}", seed=5, count=4, variation_seed=9, variation_strength=0.1)
    jobs = texts().jobs(job)
    assert [(one.seed, one.variation_seed) for one in jobs] == [(5, 9), (5, 10), (5, 11), (5, 12)]
    assert len({one.prompt for one in jobs}) == 1


def test_whose_braces_they_are(folder):
    job = Job(prompt="a {red|blue} __animal__", like="a1111")
    assert texts().jobs(job) == [job]
    assert texts("--no-choices").jobs(replace(job, like=None)) == [replace(job, like=None)]
    [drawn] = texts("--wildcards", "words").jobs(job)
    assert re.fullmatch("a (red|blue) (fox|owl|bear)", drawn.prompt)
    [partly] = texts().jobs(replace(job, like="sfumato"))
    assert re.fullmatch("a (red|blue) __animal__", partly.prompt)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--style", "inc"], ["styles=inc", "did you mean ink"]),
        (["--style", "ink", "--styles", "none.csv"], ["styles='none.csv'", "no such file"]),
        (["--wildcards", "none"], ["wildcards='none'", "no such folder"]),
        (["--wildcards", "words", "--no-choices"], ["wildcards='words'", "--no-choices"]),
    ],
)
def test_bad_texts(folder, flags, words):
    with pytest.raises(ValueError) as caught:
        texts(*flags)
    assert all(word in str(caught.value) for word in words), caught.value


def test_txt2img_keeps_what_was_chosen(folder, tiny_checkpoint, capsys):
    flags = ["--ckpt", str(tiny_checkpoint), "--outdir", "out", "--steps", "2", "--seed", "1", "--rescale", "0.5"]
    prompt = "{red|blue|green|black} {cat|dog}"
    assert main(["txt2img", "--prompt", prompt, "--count", "4", "--style", "ink", *flags]) == 0
    jobs = [load_png(path)[1]["job"] for path in sorted((folder / "out" / "samples").iterdir())]
    assert [(job["seed"], job["count"], job["rescale"]) for job in jobs] == [(seed, 1, 0.5) for seed in (1, 2, 3, 4)]
    assert all(re.fullmatch(r"\w+ (cat|dog) in ink", job["prompt"]) for job in jobs)
    assert len({job["prompt"] for job in jobs}) > 1
    path = str(folder / "out" / "samples" / "00002.png")
    capsys.readouterr()
    assert main(["replay", path, "--ckpt", str(tiny_checkpoint)]) == 0
