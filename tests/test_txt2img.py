"""Jobs through the whole pipeline on the tiny model: every sampler, changing prompts, noise, second pass, profiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.diffusion.samplers import SAMPLERS, find_sampler
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.pipeline import Pipeline
from sfumato.tasks.checks import complete, job_from_dict, job_to_dict
from sfumato.types import Hires, Job
from sfumato.weights.checkpoint import save_checkpoint
from tests.tiny import TINIES, random_parts

BASE = Job(prompt="a red apple", negative="blue", steps=3, seed=5, guidance=20.0)  # large: its text tower says little


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint)


def images(pipe: Pipeline, **fields) -> np.ndarray:
    return pipe.draw(replace(BASE, **fields)).images


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline, name: str) -> None:
    mild = replace(BASE, sampler=name, guidance=3.0)
    four = pipe.draw(replace(mild, count=4)).images
    assert four.shape == (4, 16, 16, 3)
    assert apart(four[2:3], pipe.draw(replace(mild, seed=7)).images) <= 1
    assert apart(four[0], four[1]) > 20, "seeds matter"
    other = pipe.draw_many([replace(mild, seed=7), replace(BASE, sampler="euler", steps=2, prompt="x")])
    assert apart(other[0].images[0], four[2]) <= 1, "nor on what else is drawn"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_draws(pipe: Pipeline, schedule: str) -> None:
    assert images(pipe, sampler="euler", schedule=schedule).std() > 1


def test_merged_jobs_of_every_kind_equal_lone_ones(pipe: Pipeline) -> None:
    jobs = [
        replace(BASE, prompt="a cat AND a dog :0.5"),
        replace(BASE, prompt="[a cat:a dog:0.5]", sampler="heun", steps=4),
        replace(BASE, prompt="(very:1.4) " + "long words, " * 60, pag=2.0),
        replace(BASE, guidance=1.0, sampler="dpmpp_2m_sde"),
        replace(BASE, sag=0.7, rescale=0.5),
        replace(BASE, guidance_start=0.4, freeu=(1.2, 1.3, 0.9, 0.4)),
        replace(BASE, hires=Hires(scale=2.0, strength=0.6)),
    ]
    together = pipe.draw_many(jobs)
    for job, result in zip(jobs, together, strict=True):
        assert apart(result.images, pipe.draw(job).images) <= 1, job
    pictures = [result.images for result in together[:-1]]
    assert all(apart(a, b) > 2 for i, a in enumerate(pictures) for b in pictures[:i]), "each says something"


def test_prompts_that_change(pipe: Pipeline) -> None:
    plain = images(pipe, prompt="a cat", steps=4)
    assert np.array_equal(images(pipe, prompt="[a cat:a dog:4]", steps=4), plain), "the change comes after the end"
    assert np.array_equal(images(pipe, prompt="[a dog:a cat:0]", steps=4), plain)
    assert apart(images(pipe, prompt="[a cat:a dog:2]", steps=4), plain) > 2
    assert apart(images(pipe, prompt="[a cat|a dog]", steps=4), plain) > 2
    late = images(pipe, prompt="[a dog:a cat:1]", steps=4, like="a1111", noise="cpu", sampler="euler")
    assert apart(late, images(pipe, prompt="[a dog:a cat:1]", steps=4, sampler="euler")) > 0, "A1111 counts from 0"
    assert np.array_equal(images(pipe, prompt="a cat AND a dog :0"), images(pipe, prompt="a cat"))
    assert np.array_equal(images(pipe, prompt="a cat # a comment"), images(pipe, prompt="a cat"))


def test_weights(pipe: Pipeline) -> None:
    plain, heavy = images(pipe, prompt="a cat"), images(pipe, prompt="a (cat:1.8)")
    assert apart(plain, heavy) > 2
    ways = ("original", "no norm", "comfy", "none")
    found = [images(pipe, prompt="a (cat:1.8)", weighting=way) for way in ways]
    assert all(apart(a, b) > 0 for i, a in enumerate(found) for b in found[:i])
    assert np.array_equal(images(pipe, prompt="a (cat:1.8)", weighting="ignore"), plain)
    assert apart(images(pipe, clip_skip=2), images(pipe)) > 2


def test_long_prompts_and_programs_that_cut_them(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    words = " ".join(["a"] * 75)
    assert apart(images(pipe, prompt=f"{words} zebra"), images(pipe, prompt=words)) > 0
    assert not caplog.text
    cut = images(pipe, prompt=f"{words} zebra", like="diffusers", sampler="euler")
    assert "what fell off: zebra" in caplog.text
    assert np.array_equal(cut, images(pipe, prompt=words, like="diffusers", sampler="euler"))


def test_noise(pipe: Pipeline) -> None:
    base = images(pipe)
    assert apart(images(pipe, noise="philox"), base) > 20
    assert np.array_equal(images(pipe, noise="device"), base), "the device is the CPU"
    near = images(pipe, variation_seed=99, variation_strength=0.1)
    far = images(pipe, variation_seed=99, variation_strength=0.9)
    assert 0 < np.abs(near.astype(int) - base).mean() < np.abs(far.astype(int) - base).mean()
    assert apart(images(pipe, variation_seed=99, variation_strength=1.0), images(pipe, seed=99)) <= 1
    both = images(pipe, variation_seed=99, variation_strength=0.5, count=2)
    assert apart(both[1:], images(pipe, variation_seed=100, variation_strength=0.5)) <= 1
    assert apart(images(pipe, noise_width=8, noise_height=8), base) > 20
    assert np.array_equal(images(pipe, ensd=31337, sampler="euler"), images(pipe, sampler="euler"))
    assert apart(images(pipe, ensd=31337, sampler="euler_a"), images(pipe, sampler="euler_a")) > 2


@pytest.mark.parametrize("upscaler", ["latent", "latent nearest", "lanczos"])
def test_second_pass(pipe: Pipeline, upscaler: str) -> None:
    large = images(pipe, hires=Hires(scale=2.0, upscaler=upscaler, strength=0.5), count=2)
    assert large.shape == (2, 32, 32, 3)
    kept = images(pipe, hires=Hires(scale=2.0, upscaler=upscaler, strength=0.0), count=2)
    assert apart(large, kept) > 2
    told = images(
        pipe, hires=Hires(scale=2.0, upscaler=upscaler, strength=0.5, prompt="a dog", sampler="heun"), count=2
    )
    assert apart(large, told) > 2
    calls: list[tuple[int, int]] = []
    pipe.draw(replace(BASE, hires=Hires(steps=2)), lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5), "the bar counts both passes"


def test_profiles(pipe: Pipeline) -> None:
    found = {name: images(pipe, like=name, count=2) for name in ("sfumato", "a1111", "comfy", "diffusers", "compvis")}
    pictures = list(found.values())
    assert all(apart(a, b) > 0 for i, a in enumerate(pictures) for b in pictures[:i])
    generator = torch.Generator().manual_seed(5)
    both = torch.randn(2, 4, 8, 8, generator=generator)
    from sfumato.tasks.scenes import noise_of

    job = complete(replace(BASE, like="comfy", count=2), pipe.model.family)
    assert torch.equal(noise_of(job, pipe.model)(), both), "one generator draws the whole batch"


def test_like_diffusers_is_its_pipeline(tmp_path: Path) -> None:
    """The plain Job and the door with diffusers' names draw the same."""
    from sfumato import StableDiffusionPipeline

    family = TINIES["sd1"]
    save_checkpoint(tmp_path / "a.safetensors", family, random_parts(family), torch.float32)
    door = StableDiffusionPipeline.from_pretrained(tmp_path / "a.safetensors")
    door.set_progress_bar_config(disable=True)
    pipe = Pipeline.from_pretrained(tmp_path / "a.safetensors")
    for sampler, steps in (("plms", 7), ("ddim", 7), ("euler", 4)):
        door.scheduler = sampler
        theirs = door("a cat", negative_prompt="blue", num_inference_steps=steps, guidance_scale=4.0,
                      num_images_per_prompt=2, generator=torch.Generator().manual_seed(3)).images  # fmt: skip
        job = Job("a cat", "blue", steps=steps, guidance=4.0, sampler=sampler, seed=3, count=2, like="diffusers")
        ours = pipe.draw(job).images
        assert apart(ours, np.stack([np.asarray(image) for image in theirs])) <= 1, sampler


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sampler": "dpm++2m karas"}, r"sampler='dpm\+\+2m karas': did you mean"),
        ({"sampler": "eulr"}, "euler"),
        ({"schedule": "karas"}, "karras"),
        ({"steps": 0}, "steps=0"),
        ({"steps": float("nan")}, "steps=nan"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"width": 17}, "width=17: a multiple of 4"),
        ({"seed": 2**65}, "seed=36893488147419103232"),
        ({"seed": -1}, "seed=-1"),
        ({"clip_skip": 9}, "clip_skip=9"),
        ({"weighting": "heavy"}, "weighting='heavy': one of original"),
        ({"noise": "loud"}, "noise='loud': one of cpu"),
        ({"like": "comfyui"}, "like='comfyui'.*did you mean comfy"),
        ({"variation_strength": 0.5}, "variation_seed is needed"),
        ({"variation_strength": 1.5}, "variation_strength=1.5"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start=0.6"),
        ({"rescale": 2}, "rescale=2"),
        ({"threshold": 0.9}, "threshold=0.9.*mimic"),
        ({"freeu": (1.0, 2.0)}, "freeu"),
        ({"options": {"s_churn": 1.0}, "sampler": "plms"}, "plms has no 's_churn'"),
        ({"options": {"s_churn": "x"}, "sampler": "euler"}, "s_churn='x'"),
        ({"eta": 0.5, "sampler": "plms"}, "eta=0.5"),
        ({"hires": Hires(scale=0.5)}, "hires.scale=0.5"),
        ({"hires": Hires(upscaler="magic")}, "hires.upscaler='magic'"),
        ({"hires": Hires(strength=2.0)}, "hires.strength=2.0"),
        ({"sampler": "lcm", "steps": 60, "schedule": "lcm"}, "steps=60"),
    ],
)
def test_bad_jobs_say_what_is_allowed(pipe: Pipeline, fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        images(pipe, **fields)
    assert "\n" not in str(caught.value)


def test_a_network_that_breaks_down_says_where(tiny_checkpoint: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_checkpoint)
    calls = 0

    def break_down(module, args, out):
        nonlocal calls
        calls += 1
        return out * float("nan") if calls > 2 else out

    pipe.model.unet.register_forward_hook(break_down)
    with pytest.raises(ValueError, match=r"not finite at step 3 of 5 \(sigma [\d.]+\)"):
        pipe.draw(replace(BASE, steps=5, sampler="euler"))


def test_jobs_as_json() -> None:
    job = Job("a", options={"s_churn": 2.0}, sampler="euler", hires=Hires(scale=1.5), freeu=(1.0, 1.0, 1.0, 1.0))
    assert job_from_dict(job_to_dict(job)) == job
    assert job_to_dict(Job("a")) == {"prompt": "a", "count": 1}
    for wrong, words in (({"prompts": "a"}, "prompts"), ({"hires": {"size": 2}}, "hires.size")):
        with pytest.raises(ValueError, match=words):
            job_from_dict(wrong)


def test_every_label_of_other_programs_is_known() -> None:
    """The names of interfaces that people use, with their schedule behind or not."""
    for label in ("DPM++ 2M Karras", "DPM++ SDE", "Euler a", "DPM2 a Karras", "DPM fast", "UniPC", "Restart", "LCM"):
        job = complete(Job(sampler=label), TINIES["sd1"])
        assert find_sampler(str(job.sampler))
        assert (job.schedule == "karras") == label.endswith("Karras") or label in ("DPM++ SDE", "Restart")
