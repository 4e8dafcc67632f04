"""What the editing tasks promise, on tiny models: every sampler draws, what a mask keeps stays to the bit, and how many
steps a strength means in each profile. The distance from the picture is measured with the model in the box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.families import Family
from sfumato.images import Picture, picture_from, to_uint8
from sfumato.images.fitting import fitted
from sfumato.images.masks import blurred
from sfumato.pipeline import Pipeline
from sfumato.tasks.checks import complete
from sfumato.tasks.redraw import Levels, levels_of
from sfumato.tasks.scenes import Drawn, sigmas_of
from sfumato.tasks.studio import Studio
from sfumato.types import Job
from sfumato.weights.checkpoint import build, save_checkpoint
from tests.conftest import TINY, randomise

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

HIGH, WIDE = 18, 21  # px, no multiples of the tiny model's step of 4
IN_CHANNELS = {"inpaint": 9, "depth": 5, "picture": 8, "lowres": 7}
BASE = Job("a red apple", steps=3, seed=5, guidance=2.0)


def kin(concat: str | None) -> Family:
    """The tiny family, of a U-Net that sees something beside x."""
    if concat is None:
        return TINY
    unet = replace(TINY.unet, in_channels=IN_CHANNELS[concat], num_classes=1000 if concat == "lowres" else None)
    levels = (1, 2, 2) if concat == "lowres" else (1, 2)
    autoencoder = replace(TINY.autoencoder, channel_mult=levels)
    return replace(TINY, name=f"tiny-{concat}", unet=unet, autoencoder=autoencoder, concat=concat)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Pipeline]:
    """The pipeline of a tiny model of each kind, made when it is first asked for."""
    folder, found = tmp_path_factory.mktemp("kin"), dict[str | None, Pipeline]()

    def pipe(concat: str | None) -> Pipeline:
        if concat not in found:
            torch.manual_seed(0)
            family, path = kin(concat), folder / f"{concat}.safetensors"
            parts = {name: randomise(module).state_dict() for name, module in build(family).items()}
            save_checkpoint(path, family, parts, torch.float32)
            found[concat] = Pipeline.from_pretrained(path)
        return found[concat]

    return pipe


def painted(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """A mask (H, W, 3) uint8, white in a rectangle."""
    mask = np.zeros((height, width, 3), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def make_pictures() -> dict[str, Picture]:
    """A picture of coloured noise, of which every pixel tells when it is touched, and masks for it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)
    hard = painted(HIGH, WIDE, 5, 12, 7, 16)
    soft = np.zeros_like(hard)
    soft[3:14, 4:18] = np.linspace(0, 255, 14).astype(np.uint8)[None, :, None]
    depth = np.repeat(np.linspace(0, 255, WIDE).astype(np.uint8)[None, :, None], HIGH, axis=0).repeat(3, axis=2)
    arrays = {"picture": pixels, "hard": hard, "soft": soft, "depth": depth}
    arrays |= {"kept": 255 - hard, "square": rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)}
    arrays["corner"] = painted(24, 32, 0, 5, 0, 7)
    found = {name: Picture(array) for name, array in arrays.items()}
    return found | {"see-through": Picture(pixels, 255 - hard[..., 0])}


PICTURES = make_pictures()


class Case(NamedTuple):
    """A task: the kind of model, the job's fields, and (height, width) of what comes out."""

    fields: Mapping[str, Any]
    concat: str | None = None
    size: tuple[int, int] = (HIGH, WIDE)


MASKED = {
    "inpaint": Case({"image": "picture", "mask": "hard"}),
    "inpaint, soft": Case({"image": "picture", "mask": "soft", "mask_soft": True}),
    "inpaint, only masked": Case({"image": "picture", "mask": "hard", "only_masked": True, "padding": 3}),
    "inpaint, alpha": Case({"image": "see-through", "from_alpha": True}),
    "inpaint, inverted": Case({"image": "picture", "mask": "kept", "mask_invert": True}),
    "inpaint, 9 channels": Case({"image": "picture", "mask": "hard"}, "inpaint"),
}
CASES = MASKED | {
    "img2img": Case({"image": "picture"}),
    "outpaint": Case({"image": "picture", "left": 5, "down": 6}, size=(HIGH + 6, WIDE + 5)),
    "depth2img": Case({"image": "picture", "depth": "depth"}, "depth"),
    "edit by words": Case({"image": "picture"}, "picture"),
    "upscale by tiles": Case(
        {"image": "picture", "upscale": 2.0, "strength": 0.4, "steps": 5}, size=(2 * HIGH, 2 * WIDE)
    ),
    "upscale by latents": Case({"image": "picture", "upscale": 4.0}, "lowres", (4 * HIGH, 4 * WIDE)),
    "tiles": Case({"width": 24, "height": 20, "tile": 16, "overlap": 8}, size=(20, 24)),
    "seamless": Case({"seamless": "xy"}, size=(16, 16)),
}


@pytest.fixture(scope="module")
def drawn(pipes: Callable[[str | None], Pipeline]) -> Callable[[str], dict[str, np.ndarray]]:
    """The pictures of a case by sampler, each (H, W, 3); those of a case are drawn together, once."""
    found = dict[str, dict[str, np.ndarray]]()

    def draw(name: str) -> dict[str, np.ndarray]:
        if name not in found:
            case = CASES[name]
            jobs = [replace(BASE, sampler=sampler, **case.fields) for sampler in SAMPLERS]
            results = pipes(case.concat).draw_many(jobs, pictures=PICTURES)
            found[name] = {sampler: result.images[0] for sampler, result in zip(SAMPLERS, results, strict=True)}
        return found[name]

    return draw


@pytest.mark.parametrize("name", CASES)
def test_every_task_draws_with_every_sampler(drawn: Callable[[str], dict[str, np.ndarray]], name: str) -> None:
    pictures = drawn(name)
    assert set(pictures) == set(SAMPLERS)
    for sampler, picture in pictures.items():
        assert picture.shape == (*CASES[name].size, 3) and picture.dtype == np.uint8, sampler
        assert picture.std() > 5, f"{sampler}: one colour is no picture"  # what is not finite is refused by decoding
    assert len({picture.tobytes() for picture in pictures.values()}) > len(SAMPLERS) // 2, "samplers differ"


# --- what a mask keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKED)
def test_outside_the_mask_every_bit_stays(drawn: Callable[[str], dict[str, np.ndarray]], name: str) -> None:
    fields, old = CASES[name].fields, PICTURES["picture"].pixels
    kept = PICTURES["soft" if "mask_soft" in fields else "hard"].pixels[..., 0] == 0
    assert 0.2 < kept.mean() < 0.9
    for sampler, picture in drawn(name).items():
        assert np.array_equal(picture[kept], old[kept]), sampler
        assert (picture[~kept] != old[~kept]).any(axis=1).mean() > 0.5, f"{sampler}: what is free is drawn"


def test_outpainting_keeps_the_old_picture(drawn: Callable[[str], dict[str, np.ndarray]]) -> None:
    for sampler, picture in drawn("outpaint").items():
        assert np.array_equal(picture[:HIGH, 5:], PICTURES["picture"].pixels), sampler
        new = np.concatenate([picture[:, :5].reshape(-1, 3), picture[HIGH:].reshape(-1, 3)])
        assert len(np.unique(new, axis=0)) > len(new) // 2, f"{sampler}: the new ground is drawn"


@pytest.mark.parametrize("fields", [
    {"mask_blur_x": 0.0, "mask_blur_y": 0.0}, {"mask_blur_x": 3.0}, {"fill": "fill"}, {"fill": "noise"},
    {"fill": "nothing"}, {"strength": 1.0}, {"strength": 0.0}, {"tile": 8}, {"like": "comfy"}, {"like": "diffusers"},
    {"like": "compvis"}, {"only_masked": True, "width": 24, "height": 16, "padding": 0},
    {"only_masked": True, "padding": 300}, {"only_masked": True, "mask_blur_x": 2.0, "mask": "soft"}, {"count": 3},
    {"only_masked": True, "mask": "soft", "mask_soft": True, "padding": 1},
], ids=str)  # fmt: skip
def test_what_is_kept_does_not_depend_on_how(
    pipes: Callable[[str | None], Pipeline], fields: Mapping[str, Any]
) -> None:
    job = replace(BASE, **{"image": "picture", "mask": "hard", **fields})
    if job.like in ("comfy", "diffusers", "compvis"):  # those round sizes down; the others keep the picture's own
        job = replace(job, width=24, height=20, resize="keep")
    old, kept = PICTURES["picture"].pixels, PICTURES[str(job.mask)].pixels[..., 0] == 0
    for picture in pipes(None).draw(job, pictures=PICTURES).images:
        assert picture.shape == old.shape and np.array_equal(picture[kept], old[kept])


def test_like_a1111_all_stays_where_the_blurred_mask_does_not_reach(pipes: Callable[[str | None], Pipeline]) -> None:
    """Its blur of 4 px goes outwards: int(2.5 * 4 + 0.5) = 10 px beyond the mask."""
    old, corner = PICTURES["square"].pixels, PICTURES["corner"].pixels[..., 0].astype(np.float32) / 255
    reached = blurred(corner, 4.0, 4.0) > 0
    assert reached[:15, :17].all() and not reached[15:].any() and not reached[:, 17:].any()
    jobs = [replace(BASE, image="square", mask="corner", like="a1111", width=32, height=24, sampler=sampler)
            for sampler in SAMPLERS]  # fmt: skip
    for sampler, result in zip(SAMPLERS, pipes(None).draw_many(jobs, pictures=PICTURES), strict=True):
        assert np.array_equal(result.images[0][~reached], old[~reached]), sampler
        assert not np.array_equal(result.images[0], old), sampler


def test_a_picture_made_to_fit_is_kept_as_it_was_made(pipes: Callable[[str | None], Pipeline]) -> None:
    picture, mask = PICTURES["picture"].pixels, PICTURES["hard"].pixels[..., 0].astype(np.float32) / 255
    for fit in ("stretch", "crop", "fill", "latent"):
        job = replace(BASE, image="picture", mask="hard", width=32, height=16, resize=fit)
        found = pipes(None).draw(job, pictures=PICTURES).images[0]
        kept = fitted(mask, 32, 16, fit, "bilinear") < 0.5
        assert np.array_equal(found[kept], fitted(picture, 32, 16, fit)[kept]), fit
        assert found.shape == (16, 32, 3) and not np.array_equal(found, fitted(picture, 32, 16, fit))


# --- strength ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def through_the_autoencoder(pipe: Pipeline, pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 encoded and decoded by the networks alone, which may round the last bit otherwise."""
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return to_uint8(pipe.model.autoencoder.decode(pipe.model.autoencoder.encode(images).mean))[0]


def nearly(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two pictures differ in no more than the rounding of a few values."""
    apart = np.abs(found.astype(int) - expected.astype(int))
    return bool(apart.max() <= 1 and apart.mean() < 0.01)


@pytest.mark.parametrize("like", ["sfumato", "comfy", "compvis"])
def test_strength_0_is_what_the_autoencoder_makes_of_it(pipes: Callable[[str | None], Pipeline], like: str) -> None:
    pipe, old = pipes(None), PICTURES["square"].pixels
    studio = Studio(pipe.model)
    for fields in ({}, {"sampler": "euler_a"}, {"exact_steps": True}):
        job = replace(BASE, image="square", strength=0.0, like=like, **fields)
        with torch.inference_mode():
            exact = studio.decode(Drawn(studio.encode(old[None], job), 0.0), job)
        assert np.array_equal(pipe.draw(job, pictures=PICTURES).images, exact)
        for picture in pipe.draw(replace(job, count=2), pictures=PICTURES).images:
            assert nearly(picture, through_the_autoencoder(pipe, old))


def test_the_distance_grows_with_strength() -> None:
    """Ten strengths over a picture that the box drew: mean absolute difference from it, over three seeds."""
    pipe = Pipeline.from_pretrained()
    old = pipe("a red apple on a white background", seed=1, steps=8).images[0]
    job = Job("a red apple on a white background", image="old", steps=20, seed=11, count=3)
    jobs = [replace(job, strength=tenths / 10) for tenths in range(11)]
    still, *results = [result.images for result in pipe.draw_many(jobs, pictures={"old": Picture(old)})]
    assert all(nearly(picture, through_the_autoencoder(pipe, old)) for picture in still)
    apart = [float(np.abs(images.astype(int) - old.astype(int)).mean()) for images in results]
    # 4.3, 5.8, 8.5, 11.6, 14.1, 15.1, 15.5, 16.0, 16.3, 16.5 when this was written
    assert apart[-1] > 3 * apart[0]
    assert all(stronger > 0.97 * weaker for weaker, stronger in pairwise(apart)), apart
    assert all(stronger > weaker for weaker, stronger in pairwise(apart[::3])), apart


# --- how many steps a strength means -----------------------------------------------------------------------------

# (strength, steps) -> steps taken, worked out by hand from the rule of each program.
TAKEN = {
    "sfumato": {  # round(strength * steps), one at least
        (0.75, 30): 22, (0.5, 4): 2, (0.01, 10): 1, (1.0, 10): 10, (0.35, 8): 3, (0.04, 1): 1, (1.0, 1): 1, (0.0, 9): 0,
    },
    "a1111": {  # int(min(strength, 0.999) * steps) + 1
        (0.75, 20): 16, (0.5, 20): 11, (1.0, 20): 20, (0.3, 10): 4, (0.29, 100): 29, (0.05, 10): 1, (0.0, 20): 1,
    },
    "diffusers": {  # min(int(steps * strength), steps)
        (0.8, 50): 40, (0.5, 3): 1, (1.0, 3): 3, (0.1, 9): 0, (0.99, 20): 19, (0.0, 50): 0,
    },
    "compvis": {  # int(strength * steps)
        (0.75, 50): 37, (0.8, 50): 40, (0.3, 10): 3, (0.05, 10): 0, (0.99, 20): 19, (0.0, 50): 0,
    },
    "comfy": {  # all of the steps, the last ones of int(steps / strength)
        (1.0, 20): 20, (0.5, 20): 20, (0.3, 7): 7, (0.9, 1): 1, (0.0, 20): 0,
    },
}  # fmt: skip


def levels(pipe: Pipeline, **fields: Any) -> Levels:
    job = replace(BASE, image="square", **fields)
    return levels_of(complete(job, pipe.model.family, (24, 32)), pipe.model)


@pytest.mark.parametrize(
    "like, strength, steps, taken",
    [(like, *pair, taken) for like, pairs in TAKEN.items() for pair, taken in pairs.items()],
)
def test_how_many_steps_a_strength_means(
    pipes: Callable[[str | None], Pipeline], like: str, strength: float, steps: int, taken: int
) -> None:
    for sampler in ("euler", "ddim", "dpm_2", "heun"):
        if like == "diffusers" and sampler in ("dpm_2", "heun"):
            continue  # those of diffusers count two calls of the network as two steps
        found = levels(pipes(None), like=like, strength=strength, steps=steps, sampler=sampler)
        assert max(0, len(found.sigmas) - 1) == taken, sampler
        if taken:
            assert found.sigmas[-1] < 0.03, "the end: nothing, or DDIM's first timestep"
            assert all(high > low for high, low in pairwise(found.sigmas)), sampler
            if like != "compvis":
                assert (found.scale, found.shrink) == (found.sigmas[0], 1.0), sampler
            twice = levels(pipes(None), like=like, strength=strength, steps=steps, sampler=sampler,
                           noise_multiplier=1.5)  # fmt: skip
            assert twice.scale == pytest.approx(1.5 * found.scale) and twice.sigmas == found.sigmas


@pytest.mark.parametrize("like", [like for like in TAKEN if like != "a1111"])
def test_the_usual_strength_of_each_program(pipes: Callable[[str | None], Pipeline], like: str) -> None:
    usual = {"sfumato": 0.75, "comfy": 1.0, "diffusers": 0.8, "compvis": 0.75}[like]
    assert levels(pipes(None), like=like, steps=20) == levels(pipes(None), like=like, steps=20, strength=usual)
    other = levels(pipes(None), like=like, steps=20, strength=usual - 0.3)
    assert levels(pipes(None), like=like, steps=20).sigmas[0] > other.sigmas[0]


@pytest.mark.parametrize("like", ["sfumato", "a1111", "diffusers", "compvis"])
@pytest.mark.parametrize("strength, longer", [(0.5, 20), (0.3, 33), (0.75, 13), (1.0, 10), (0.01, 999)])
def test_exact_steps_are_the_last_of_a_longer_schedule(
    pipes: Callable[[str | None], Pipeline], like: str, strength: float, longer: int
) -> None:
    """int(10 / min(strength, 0.999)), no more than the model has timesteps."""
    job = {"like": like, "sampler": "euler", "strength": strength, "steps": 10, "exact_steps": True}
    every = sigmas_of(complete(replace(BASE, like=like, sampler="euler", steps=longer), TINY), pipes(None).model)
    assert levels(pipes(None), **job).sigmas == every[-11:]


def test_comfy_takes_the_last_of_a_longer_schedule(pipes: Callable[[str | None], Pipeline]) -> None:
    every = sigmas_of(complete(replace(BASE, like="comfy", steps=40), TINY), pipes(None).model)
    assert levels(pipes(None), like="comfy", strength=0.5, steps=20).sigmas == every[-21:]


def test_compvis_begins_a_level_higher(pipes: Callable[[str | None], Pipeline]) -> None:
    """Its DDIM timesteps are 1, 21, ... 981. Of 37 steps the first is at the 37th, its noise is the 38th's."""
    config = TINY.schedule
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)[1::20]
    found = levels(pipes(None), like="compvis", strength=0.75, steps=50)
    assert found.sigmas[0] == pytest.approx(((1 - alphas[36]) / alphas[36]) ** 0.5, rel=1e-4)
    # sqrt(a) x0 + sqrt(1 - a) noise of level 38, in the scale in which level 37 has x0 unscaled
    assert found.shrink == pytest.approx((alphas[37] / alphas[36]) ** 0.5, rel=1e-4)
    assert found.scale == pytest.approx(((1 - alphas[37]) / alphas[36]) ** 0.5, rel=1e-4)
    top = levels(pipes(None), like="compvis", strength=1.0, steps=50)
    assert (top.scale, top.shrink) == (top.sigmas[0], 1.0), "there is no higher level"


# -- what a review found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_thin_strokes_are_drawn(pipes: Callable[[str | None], Pipeline], width: int) -> None:
    pipe, mask = pipes(None), painted(16, 16, 0, 16, 6, 6 + width)
    source = np.full((16, 16, 3), 128, np.uint8)
    job = {"prompt": "a", "image": source, "mask": mask, "strength": 1.0, "steps": 2, "fill": "noise"}
    drawn = pipe(**job, mask_blur_x=2.0).images[0].astype(int)
    whole = pipe(**job, mask_blur_x=0.0).images[0].astype(int)
    middle = 6 + width // 2
    assert np.array_equal(drawn[:, middle], whole[:, middle]), "the middle of a stroke is all drawn"
    assert (drawn[:, [*range(6), *range(6 + width, 16)]] == 128).all()


def test_depth_lies_where_the_picture_lies() -> None:
    """A map of any size is the whole picture's; padding continues it, a crop cuts it."""
    from sfumato.tasks.canvas import canvas_over

    family = kin("depth")
    step = family.size_step
    ramp = np.linspace(0, 1, 18, dtype=np.float32)[None].repeat(18, 0)
    pixels = np.zeros((18, 18, 3), np.uint8)
    whole = complete(Job(image="x"), family, (18, 18))
    carried = canvas_over(pixels, None, whole, family).carried(ramp[::2, ::2])
    assert step == 4 and carried.shape == (20, 20)
    assert np.abs(carried[:18, :18] - ramp).max() < 0.1
    assert np.array_equal(carried[:18, 18:], carried[:18, 16:18][:, ::-1]), "mirrored as the pixels are"
    free = painted(18, 18, 8, 11, 13, 16)[..., 0].astype(np.float32) / 255
    part = complete(Job(image="x", mask="m", only_masked=True, padding=2, width=step, height=step), family, (18, 18))
    crop = canvas_over(pixels, free, part, family).carried(ramp)
    assert crop.min() > 0.5, "the crop lies at the right"


def test_tiles_of_an_upscale_have_noise_of_their_own(pipes: Callable[[str | None], Pipeline]) -> None:
    """What an ancestral sampler adds is neither the noise that it began from nor that of another tile."""
    from sfumato.tasks.catalogue import task_of
    from sfumato.tasks.pictures import Pictures
    from sfumato.tasks.scenes import Drawn
    from sfumato.tasks.studio import Studio

    pipe, pixels = pipes(None), np.full((16, 16, 3), 90, np.uint8)
    pictures = Pictures({"x": picture_from(pixels)})
    job = complete(Job("a", image="x", upscale=2.0, strength=0.5, sampler="euler_a"), pipe.model.family, (16, 16))
    task = task_of(job, Studio(pipe.model, pictures))
    found = []
    scene = next(task)
    for _ in range(3):
        assert scene.noise is not None
        found += [scene.noise(), scene.noise()]
        scene = task.send(Drawn(torch.zeros_like(found[-1]), 0.0))
    assert all(not torch.equal(a, b) for index, a in enumerate(found) for b in found[:index])


def test_threads_do_not_change_each_others_networks(pipes: Callable[[str | None], Pipeline]) -> None:
    from threading import Thread

    pipe = pipes(None)
    plain = pipe("a beach", steps=2, seed=6).images
    threads = [Thread(target=pipe, args=("a beach",), kwargs={"steps": 2, "seamless": "xy"}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(pipe("a beach", steps=2, seed=6).images, plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"upscale": 2.0, "left": 8},
        {"upscale": 2.0, "mask": "m"},
        {"left": 8, "only_masked": True, "mask": "m"},
        {"left": 8, "width": 32},
        {"upscaler": "lanczos"},
        {"fill": "noise"},
        {"mask_blur_x": 3.0},
        {"padding": 5},
        {"falloff": 2.0},
        {"left": 8, "seamless": "x"},
        {"seamless": "x"},
        {"image_guidance": 2.0},
        {"upscale": 16.0},
    ],
)
def test_what_says_nothing_is_said(pipes: Callable[[str | None], Pipeline], fields: dict) -> None:
    pipe = pipes(None)
    size = (6000, 6001) if fields == {"upscale": 16.0} else (18, 22)
    with pytest.raises(ValueError, match="|".join([*fields, "image"])):
        complete(Job("a", image="x", **fields), pipe.model.family, size)
    with pytest.raises(ValueError, match="from_alpha"):
        complete(Job("a", from_alpha=True), pipe.model.family)
