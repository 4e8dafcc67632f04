"""The Python doors: ours, and diffusers' names on it, held against diffusers itself with the same random weights.

The weights are a tiny folder that both load, so configs, schedule and key tables are in the comparison as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, autocast
from transformers import CLIPTextModel

import sfumato
from sfumato import Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from sfumato.diffusers_style.noise import BatchNoise, Share
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import FAMILIES
from sfumato.tasks.diffusers_scheduler import Scheduler, scheduler_of, usual_scheduler
from tests.test_cache import write_folder

PROMPTS, NEGATIVES = ["a red apple", "a dog on the moon"], ["blue", "bad"]
CALL = {"prompt": PROMPTS, "negative_prompt": NEGATIVES, "guidance_scale": 5.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory):
    """For a kind of family: diffusers' pipeline and ours of the same folder, made once; schedulers as they were."""
    made: dict[str, tuple] = {}

    def pair(kind: str):
        if kind not in made:
            folder = write_folder(tmp_path_factory.mktemp(kind), kind)
            theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
            theirs.set_progress_bar_config(disable=True)
            ours_class = StableDiffusionXLPipeline if kind == "xl" else StableDiffusionPipeline
            made[kind] = theirs, ours_class.from_pretrained(folder), theirs.scheduler
        theirs, ours, scheduler = made[kind]
        theirs.scheduler = scheduler
        ours.scheduler = scheduler
        return theirs, ours

    return pair


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def set_scheduler(theirs, ours, name: str | None) -> None:
    if name is not None:
        theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
        ours.scheduler = theirs.scheduler


def agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Latents within `tolerance` of their largest value."""
    assert theirs.std() > 0.1, "the latents must say something"
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


# -- the published example --------------------------------------------------------------------------------------------


def test_the_published_example_with_the_import_changed(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(use_auth_token=True).to("cpu")
    prompt = "a photo of an astronaut riding a horse on mars"
    with autocast("cpu"):
        image = pipe(prompt, num_inference_steps=2)["sample"][0]
    image.save(tmp_path / "astronaut_rides_horse.png")
    assert image.size == (128, 128) and image.mode == "RGB"
    assert isinstance(pipe(prompt, num_inference_steps=1).images[0], Image.Image)


def test_importing_the_package_is_light_and_its_names_are_found():
    heavy = {"torch", "numpy", "PIL", "sfumato.pipeline"}
    code = f"import sys, sfumato as s; assert not {heavy} & set(sys.modules) and set(s.__all__) <= set(dir(s))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(sfumato, name) is not None for name in sfumato.__all__)
    with pytest.raises(AttributeError, match="'sfumato' has no attribute 'StableDiffusion'"):
        sfumato.StableDiffusion  # noqa: B018


def test_the_stub_for_type_checkers_names_the_same():
    stub = Path(sfumato.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert all(name in stub for name in sfumato.__all__)
    assert f"__all__ = {json.dumps(sfumato.__all__)}" in stub


# -- equal to diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, scheduler, steps, eta",
    [
        ("sd1", None, 6, 0.0),  # PNDM; 6 does not divide 1000
        ("sd1", "DDIMScheduler", 5, 0.0),
        ("sd1", "DDIMScheduler", 7, 0.6),
        ("sd1", "EulerDiscreteScheduler", 6, 0.0),
        ("sd1", "EulerAncestralDiscreteScheduler", 6, 0.0),
        ("sd1", "LMSDiscreteScheduler", 6, 0.0),
        ("sd1", "HeunDiscreteScheduler", 4, 0.0),
        ("sd1", "DPMSolverMultistepScheduler", 8, 0.0),
        ("sd2", None, 6, 0.0),  # DDIM, v prediction
        ("sd2", "PNDMScheduler", 6, 0.0),  # its multi-steps are of v
        ("sd2-base", None, 6, 0.0),
        ("sd2", "EulerDiscreteScheduler", 6, 0.0),
        ("xl", None, 6, 0.0),  # Euler
        ("xl", "EulerAncestralDiscreteScheduler", 6, 0.0),
        ("xl", "DPMSolverMultistepScheduler", 6, 0.0),
    ],
)
def test_the_same_generator_gives_the_same_latents_and_pictures(pairs, kind, scheduler, steps, eta):
    theirs, ours = pairs(kind)
    set_scheduler(theirs, ours, scheduler)
    call = CALL | {"num_inference_steps": steps, "eta": eta}
    latents = theirs(**call, generator=seeded(), output_type="latent").images
    # Between whole timesteps diffusers' Euler interpolates sigma linearly, and we find t of it in its logarithm.
    between = scheduler in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
    tolerance = 2e-4 if between and kind == "sd2" else 1e-4
    agree(ours(**call, generator=seeded(), output_type="latent").images, latents, tolerance)
    expected = theirs(**call, generator=seeded(), output_type="np").images
    got = ours(**call, generator=seeded(), output_type="np").images
    assert expected.std() > 0.1 and np.abs(got - expected).max() < 2 / 255


def test_torchs_own_generator_serves_where_none_is_given(pairs):
    theirs, ours = pairs("sd1")
    call = CALL | {"num_inference_steps": 2, "output_type": "latent"}
    torch.manual_seed(3)
    expected = theirs(**call).images
    torch.manual_seed(3)
    agree(ours(**call).images, expected)


def test_a_generator_for_each_picture_makes_it_independent_of_the_others(pairs):
    theirs, ours = pairs("sd1")
    set_scheduler(theirs, ours, "DDIMScheduler")
    call = CALL | {"num_inference_steps": 3, "eta": 1.0, "num_images_per_prompt": 2, "output_type": "latent"}
    got = ours(**call, generator=[seeded(seed) for seed in range(4)]).images
    agree(got, theirs(**call, generator=[seeded(seed) for seed in range(4)]).images)
    alone = call | {"prompt": PROMPTS[1], "negative_prompt": NEGATIVES[1], "num_images_per_prompt": 1}
    torch.testing.assert_close(ours(**alone, generator=seeded(3)).images, got[3:], rtol=1e-4, atol=1e-4)


def test_given_latents_are_the_starting_noise(pairs):
    theirs, ours = pairs("xl")
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    call = CALL | {"num_inference_steps": 3, "latents": latents, "output_type": "latent"}
    agree(ours(**call).images, theirs(**call).images)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_guidance_up_to_one_is_none(pairs, scale):
    theirs, ours = pairs("sd1")
    call = CALL | {"num_inference_steps": 2, "guidance_scale": scale, "output_type": "latent"}
    agree(ours(**call, generator=seeded()).images, theirs(**call, generator=seeded()).images)


@pytest.mark.parametrize(
    "kind, option",
    [
        ("sd1", {"clip_skip": 1, "guidance_scale": 1.0}),  # of the negative prompt diffusers skips none, we do
        ("sd2", {"clip_skip": 1, "guidance_scale": 1.0}),
        ("sd1", {"guidance_rescale": 0.7}),
        ("sd2", {"guidance_rescale": 0.7}),
        ("xl", {"guidance_rescale": 0.7}),
    ],
)
def test_skipping_text_layers_and_rescaling_guidance(pairs, monkeypatch, kind, option):
    theirs, ours = pairs(kind)
    # where diffusers looks for the last norm, which transformers 5 has moved
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda model: model), raising=False)
    call = CALL | {"num_inference_steps": 3, "output_type": "latent"}
    plain = ours(**call, generator=seeded()).images
    got = ours(**call | option, generator=seeded()).images
    agree(got, theirs(**call | option, generator=seeded()).images)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_prompts_are_read_as_diffusers_reads_them(pairs):
    """Brackets are text, and what is beyond 75 tokens falls off."""
    theirs, ours = pairs("sd1")
    for prompt in ("a (red:1.5) [apple|pear] AND a dog", "apple " * 100):
        call = {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        agree(ours(**call, generator=seeded()).images, theirs(**call, generator=seeded()).images)


def test_xl_is_told_its_sizes(pairs):
    theirs, ours = pairs("xl")
    sizes = {"original_size": (300, 200), "crops_coords_top_left": (10, 20), "target_size": (64, 64)}
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    plain = ours(**call, generator=seeded()).images
    sized = ours(**call, **sizes, generator=seeded()).images
    agree(plain, theirs(**call, generator=seeded()).images)  # no negative prompt: zeros
    agree(sized, theirs(**call, **sizes, generator=seeded()).images)
    assert not torch.allclose(plain, sized, atol=1e-3)
    with pytest.raises(ValueError, match=r"^target_size=\(1024, 1024\): only the picture's own, \(64, 64\)"):
        ours("x", height=64, width=64, target_size=(1024, 1024))
    with pytest.raises(ValueError, match=r"^original_size=1024: two numbers are needed"):
        ours("x", original_size=1024)


# -- what comes back --------------------------------------------------------------------------------------------------


def test_the_result_in_all_its_forms(pairs):
    ours = pairs("sd1")[1]

    def draw(**more):
        return ours("x", height=64, width=64, num_inference_steps=1, generator=seeded(), **more)

    out = draw()
    assert out.images is out["images"] is out["sample"] is out[0]
    assert out.nsfw_content_detected is None and out["nsfw_content_detected"] is None
    with pytest.raises(KeyError):
        out["pictures"]
    images, nsfw = draw(return_dict=False)
    assert nsfw is None and images[0].tobytes() == out.images[0].tobytes()
    array, tensor = draw(output_type="np").images, draw(output_type="pt").images
    assert array.shape == (1, 64, 64, 3) and tensor.shape == (1, 3, 64, 64) and not tensor.is_inference()
    np.testing.assert_array_equal(np.asarray(out.images[0]), np.rint(array[0] * 255).astype(np.uint8))
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())


# -- callbacks --------------------------------------------------------------------------------------------------------

WATCHED = [
    ("sd1", None),
    ("sd1", "DDIMScheduler"),
    ("xl", None),
    ("sd1", "LMSDiscreteScheduler"),
    ("sd1", "EulerAncestralDiscreteScheduler"),
]


@pytest.mark.parametrize("kind, scheduler", [*WATCHED, ("sd1", "DPMSolverMultistepScheduler")])
def test_a_callback_is_told_what_diffusers_tells(pairs, kind, scheduler):
    theirs, ours = pairs(kind)
    set_scheduler(theirs, ours, scheduler)
    told: dict[object, list] = {theirs: [], ours: []}

    def callback(pipe, step, timestep, values):
        told[pipe].append((step, float(timestep), values["latents"].clone()))
        return values

    for pipe in (theirs, ours):
        pipe(**CALL, num_inference_steps=4, generator=seeded(), callback_on_step_end=callback)
    assert [each[0] for each in told[ours]] == [each[0] for each in told[theirs]]
    for (_, t, latents), (_, t_theirs, expected) in zip(told[ours], told[theirs], strict=True):
        assert t == pytest.approx(t_theirs, abs=1e-2)
        agree(latents, expected)


@pytest.mark.parametrize("kind, scheduler", WATCHED)
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_callback_may_change_the_latents(pairs, kind, scheduler, step):
    theirs, ours = pairs(kind)
    set_scheduler(theirs, ours, scheduler)

    def callback(pipe, i, timestep, values):
        return {"latents": values["latents"].flip(3) * 0.5} if i == step else values

    call = CALL | {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": callback}
    plain = ours(**call | {"callback_on_step_end": None}, generator=seeded()).images
    got = ours(**call, generator=seeded()).images
    agree(got, theirs(**call, generator=seeded()).images)
    assert not torch.allclose(got, plain, atol=0.1)


def test_a_change_that_a_sampler_would_not_see_is_refused(pairs):
    ours = pairs("sd1")[1]
    ours.scheduler = "dpmpp_2m"
    with pytest.raises(ValueError, match=r"^callback_on_step_end: it changed the latents, which only ddim, .* allow"):
        ours("x", num_inference_steps=2, callback_on_step_end=lambda *a: {"latents": a[3]["latents"] + 1})
    ours("x", num_inference_steps=2, callback_on_step_end=lambda *a: None)
    ours.scheduler = "dpm_adaptive"
    with pytest.raises(ValueError, match="^callback_on_step_end: with dpm_adaptive each picture takes its own steps"):
        ours("x", callback_on_step_end=lambda *a: None)


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_a_callback_may_interrupt(pairs, kind):
    theirs, ours = pairs(kind)
    steps: list[int] = []

    def callback(pipe, step, timestep, values):
        if pipe is ours:
            steps.append(step)
        pipe._interrupt = step == 1
        return values

    call = CALL | {"num_inference_steps": 5, "output_type": "latent", "callback_on_step_end": callback}
    agree(ours(**call, generator=seeded()).images, theirs(**call, generator=seeded()).images)
    assert steps == [0, 1]
    assert len(ours("x", num_inference_steps=2).images) == 1, "the next call runs to its end"


# -- schedulers -------------------------------------------------------------------------------------------------------


SD1 = NoiseSchedule(FAMILIES["sd1"].schedule)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = dict(BETAS, skip_prk_steps=True, steps_offset=1)


def check_levels(found: Scheduler, theirs, n: int) -> None:
    """Against the levels of a scheduler of diffusers, each step's own and where the last one ends."""
    theirs.set_timesteps(n)
    levels = found.levels(SD1, n)
    if hasattr(theirs, "sigmas"):
        np.testing.assert_allclose(levels, theirs.sigmas.double().numpy(), rtol=2e-4)
    else:
        t = list(dict.fromkeys(theirs.timesteps.tolist()))
        np.testing.assert_allclose(levels[:-1], SD1.sigmas[t])
        np.testing.assert_allclose(
            levels[-1], ((1 - theirs.final_alpha_cumprod) / theirs.final_alpha_cumprod) ** 0.5, rtol=1e-4
        )


@pytest.mark.parametrize("n", [2, 7, 30])
@pytest.mark.parametrize(
    "name, config",
    [
        ("PNDMScheduler", PNDM),
        ("PNDMScheduler", PNDM | {"set_alpha_to_one": True}),
        ("DDIMScheduler", BETAS),
        ("DDIMScheduler", BETAS | {"timestep_spacing": "trailing", "set_alpha_to_one": False}),
        *((name, BETAS | {"timestep_spacing": spacing, "steps_offset": 1})
          for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
                       "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
          for spacing in ("leading", "linspace", "trailing")),
        ("EulerDiscreteScheduler", BETAS | {"final_sigmas_type": "sigma_min"}),
    ],
)  # fmt: skip
def test_levels_are_those_of_diffusers(name, config, n):
    theirs = getattr(diffusers, name)(**config)
    found = scheduler_of(theirs, FAMILIES["sd1"])
    check_levels(found, theirs, n)
    again = getattr(diffusers, found.config["_class_name"]).from_config(found.config)
    check_levels(found, again, n)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc_bh2"])
def test_a_single_step_begins_at_the_top(name):
    """Of one step diffusers' Euler begins at the lowest level, which draws nothing."""
    assert scheduler_of(name, FAMILIES["sd1"]).levels(SD1, 1) == [SD1.sigma_max, 0.0]


@pytest.mark.parametrize(
    "kind, sampler, spacing",
    [
        ("sd1", "plms", "leading"),
        ("sd2", "ddim", "leading"),
        ("sd2-base", "plms", "leading"),
        ("xl", "euler", "leading"),
    ],
)
def test_a_family_without_a_scheduler_config_has_the_published_one(kind, sampler, spacing):
    found = usual_scheduler(FAMILIES[kind], {})
    assert (found.sampler, found.schedule, found.spacing) == (sampler, None, spacing)


@pytest.mark.parametrize(
    "wanted, sampler, schedule",
    [
        ("ddim", "ddim", None),
        ("PNDMScheduler", "plms", None),
        ("Euler a", "euler_a", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Euler Karras", "euler", "karras"),
        (diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **BETAS), "dpmpp_2m", "karras"),
    ],
)
def test_a_scheduler_is_a_name_or_an_object_of_diffusers(wanted, sampler, schedule):
    found = scheduler_of(wanted, FAMILIES["sd1"])
    assert (found.sampler, found.schedule) == (sampler, schedule) and scheduler_of(found, FAMILIES["sd1"]) is found
    assert (found.levels(SD1, 5) is None) == (schedule is not None)


def test_other_samplers_go_on_our_schedules(pairs):
    ours = pairs("sd1")[1]
    box = usual_scheduler(FAMILIES["box"], {})
    assert (box.sampler, box.schedule, box.levels(SD1, 5)) == ("dpmpp_2m", "karras", None)
    ours.scheduler = "dpmpp_sde"
    again = [ours("x", num_inference_steps=2, generator=seeded(), output_type="np").images for _ in range(2)]
    np.testing.assert_array_equal(*again)


@pytest.mark.parametrize("wanted", ["dimm", 3, diffusers.FlowMatchEulerDiscreteScheduler()])
def test_an_unknown_scheduler_is_one_line(wanted):
    with pytest.raises(ValueError, match="^(sampler|scheduler)=") as caught:
        scheduler_of(wanted, FAMILIES["sd1"])
    assert "\n" not in str(caught.value)


def test_a_scheduler_of_other_noise_levels_is_refused():
    with pytest.raises(ValueError, match=r"^scheduler: its beta_start is 0.0001, the model has 0.00085; make it with"):
        scheduler_of(diffusers.DDIMScheduler(), FAMILIES["sd1"])


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"num_steps": 3}, TypeError, "^num_steps: no such argument; did you mean num_inference_steps"),
        ({"original_size": (8, 8)}, TypeError, "^original_size: no such argument"),
        ({"clip_skip": "2"}, ValueError, "^clip_skip='2': a whole number"),
        ({"guidance_rescale": 7}, ValueError, "^guidance_rescale=7: a number from 0 to 1 is needed$"),
        ({"cross_attention_kwargs": {"scale": 1}}, ValueError, "^cross_attention_kwargs: not there yet$"),
        ({"prompt_embeds": torch.ones(2)}, ValueError, "^prompt_embeds: not there yet$"),
        ({"output_type": "numpy"}, ValueError, "^output_type='numpy': one of pil, np, pt, latent$"),
        ({"num_inference_steps": 0}, ValueError, "^num_inference_steps=0: a whole number from 1 to 999 is needed$"),
        ({"guidance_scale": "7"}, ValueError, "^guidance_scale='7': a number"),
        ({"num_images_per_prompt": 0}, ValueError, "^num_images_per_prompt=0: "),
        ({"height": 65}, ValueError, "^height=65: a multiple of 64 is needed$"),
        ({"prompt": None}, ValueError, "^prompt=None: a text or a list of texts is needed$"),
        ({"prompt": []}, ValueError, r"^prompt=\[\]: a text or a list of texts is needed$"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "^negative_prompt: 2 are given for 1 prompts$"),
        ({"generator": [seeded(), seeded()]}, ValueError, "^generator: 2 are given, 1 are needed"),
        ({"latents": torch.ones(1, 4, 4, 4)}, ValueError, r"^latents: the shape \(1, 4, 4, 4\) is given, \(1, 4, 8, 8"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, ValueError, "only 'latents' is there yet$"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(pairs, call, error, message):
    ours = pairs("sd1")[1]
    with pytest.raises(error, match=message):
        ours(**{"prompt": "x", "num_inference_steps": 1} | call)


def test_what_fails_inside_comes_out(pairs):
    ours = pairs("sd1")[1]
    for steps in (1, 3):
        with pytest.raises(ValueError, match="not finite at step 1 of"):
            ours(PROMPTS, num_inference_steps=steps, latents=torch.full((2, 4, 8, 8), torch.nan))


def test_arguments_that_ask_for_nothing_are_taken(pairs):
    ours = pairs("sd1")[1]
    ours(
        "x",
        num_inference_steps=1,
        clip_skip=None,
        guidance_rescale=0.0,
        cross_attention_kwargs=None,
        prompt_embeds=None,
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"torch_type": torch.float16}, TypeError, "^torch_type: no such argument; did you mean torch_dtype"),
        ({"safety_checker": object()}, ValueError, "^safety_checker=.*: None, a checker such as open_checker"),
        ({"torch_dtype": torch.int8}, ValueError, "^torch_dtype=torch.int8: one of torch.float32"),
        ({"vae": "no/such/vae"}, ValueError, "^vae='no/such/vae': no such file$"),
        ({"pretrained_model_name_or_path": "none.safetensors"}, ValueError, "^ckpt='none.safetensors': no such file$"),
    ],
)
def test_a_wrong_argument_of_loading_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message):
        StableDiffusionPipeline.from_pretrained(**call)


# -- places and precisions --------------------------------------------------------------------------------------------


def test_moving_and_handles(tiny_checkpoint):
    pipe = StableDiffusionPipeline.from_single_file(tiny_checkpoint, safety_checker=None, torch_dtype=torch.float32)
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    assert pipe.to(torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16} == {p.dtype for p in pipe.vae.parameters()}
    assert pipe.text_encoder.text_model.final_layer_norm.weight.dtype == torch.bfloat16
    pipe("x", num_inference_steps=1)
    assert pipe.to("cpu", torch.float32).dtype == pipe.to(device="cpu").dtype == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^device='cuda': not available here"):
            pipe.to("cuda")
    assert StableDiffusionPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float16).dtype == torch.float16


def test_autocast_on_a_cpu_costs_no_more_than_half_precision_does():
    pipe = StableDiffusionPipeline.from_pretrained()

    def draw() -> np.ndarray:
        call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
        return pipe("a red apple", generator=seeded(), **call).images

    exact = draw()
    with autocast("cpu", dtype=torch.bfloat16):
        cast = draw()
    pipe.to(torch.bfloat16)
    half = draw()
    error, half_error = np.abs(cast - exact), np.abs(half - exact)
    assert 0 < error.mean() < 2 / 255
    assert error.mean() < 1.5 * half_error.mean()


def test_memory_switches_change_no_picture(pairs):
    ours = pairs("sd1")[1]
    call = {"num_inference_steps": 2, "output_type": "np", "num_images_per_prompt": 2}
    plain = ours("x", **call, generator=seeded()).images
    ours.enable_attention_slicing()
    ours.enable_vae_slicing()
    ours.enable_vae_tiling()
    ours.enable_model_cpu_offload(device="cpu")
    sliced = ours("x", **call, generator=seeded()).images
    np.testing.assert_allclose(sliced, plain, atol=1e-3)
    ours.enable_vae_tiling(32)
    assert np.abs(ours("x", **call, generator=seeded()).images - plain).max() > 1e-3, "now it is tiled"
    ours.disable_attention_slicing()
    ours.disable_vae_slicing()
    ours.disable_vae_tiling()
    ours.to("cpu")
    np.testing.assert_allclose(ours("x", **call, generator=seeded()).images, plain, atol=1e-5)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_runs_share_the_draws_of_one_generator_whoever_asks_first():
    shape = (3, 2, 4, 4)
    batch = BatchNoise(shape, seeded(), torch.device("cpu"), torch.float32, scale=2.0)
    first, second = Share(batch, slice(0, 1)), Share(batch, slice(1, 3))
    got = [first(), first(), second(), second(), first()]
    generator = seeded()
    draws = [torch.randn(shape, generator=generator) for _ in range(3)]
    expected = [2 * draws[0][:1], draws[1][:1], 2 * draws[0][1:], draws[1][1:], draws[2][:1]]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_brownian_noise_comes_from_the_generator_too():
    def path(seed: int) -> Tensor:
        batch = BatchNoise((2, 1, 4, 4), seeded(seed), torch.device("cpu"), torch.float32)
        return Share(batch, slice(1, 2)).between(2.0, 1.0)

    assert torch.equal(path(1), path(1)) and not torch.equal(path(1), path(2)) and path(1).shape == (1, 1, 4, 4)


# -- our own door -----------------------------------------------------------------------------------------------------


def test_the_pipeline_takes_what_loading_takes(tiny_checkpoint, tmp_path):
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32", family=None, vae=tiny_checkpoint)
    assert pipeline.to("cpu", torch.bfloat16).model.precision == "bfloat16"
    assert pipeline("x", steps=1).images.shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="^family='sd9': one of sd1, "):
        Pipeline.from_pretrained(tiny_checkpoint, family="sd9")
    with pytest.raises(ValueError, match="use_ema"):
        Pipeline.from_pretrained(tiny_checkpoint, use_ema=True)
    folder = write_folder(tmp_path, "sd1")
    assert Pipeline.from_pretrained(folder, "cpu").model.family.unet.channels == 8
    with pytest.raises(ValueError, match="variant|fp16"):
        Pipeline.from_pretrained(folder, "cpu", variant="fp16")


def test_moving_keeps_what_names_the_model(tiny_checkpoint):
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu")
    name, digits, picture = pipeline.model.name, pipeline.model.hash, pipeline("x").images
    pipeline.to("cpu", torch.float64).to("cpu", torch.float32)
    assert (pipeline.model.name, pipeline.model.hash) == (name, digits)
    assert np.abs(pipeline("x").images.astype(int) - picture).max() <= 1
