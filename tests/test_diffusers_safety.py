"""Safety checkers in diffusers' pipelines' ways: None, ours, theirs, a function; flagged pictures come back black."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from sfumato.cli.main import main
from sfumato.diffusers_style import StableDiffusionPipeline
from sfumato.diffusers_style.looking import looked_at
from sfumato.images import to_uint8
from sfumato.safety.checking import Verdict

CALL = {"num_inference_steps": 1, "num_images_per_prompt": 2}


class Second:
    """Flags the second picture, and keeps what it was shown."""

    name = "second"

    def __init__(self):
        self.seen = None

    def check(self, pixels):
        self.seen = pixels
        return [Verdict(index == 1, {}, self.name) for index in range(len(pixels))]


def draw(pipe, **more):
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL, **more)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)


@pytest.fixture
def pipe(loaded):
    loaded.safety_checker = None
    return loaded


def test_without_one_nothing_is_looked_at(pipe):
    out = draw(pipe)
    assert out.nsfw_content_detected is None and len(out.images) == 2 and out[1] is None


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_the_flagged_picture_is_black_and_the_other_as_it_was(pipe, kind):
    free = draw(pipe, output_type=kind).images
    pipe.safety_checker = checker = Second()
    out = draw(pipe, output_type=kind)
    assert out.nsfw_content_detected == [False, True]
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(free[0]))
    assert not np.asarray(out.images[1]).any() and np.asarray(free[1]).any()
    assert checker.seen.shape == (2, 16, 16, 3) and checker.seen.dtype == np.uint8
    assert draw(pipe, output_type=kind, return_dict=False)[1] == [False, True]


def test_latents_are_not_looked_at(pipe):
    pipe.safety_checker = Second()
    assert draw(pipe, output_type="latent").nsfw_content_detected is None


def test_one_that_is_given_when_loading(tiny_checkpoint):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=Second(), feature_extractor=None)
    assert draw(pipe).nsfw_content_detected == [False, True]


@pytest.mark.parametrize("flags", [[False, False], [True, False], False, True])
def test_a_function_as_people_write_it(pipe, flags):
    pipe.safety_checker = lambda images, **kwargs: (images, flags)
    assert draw(pipe).nsfw_content_detected == (flags if isinstance(flags, list) else [flags, flags])


@pytest.mark.parametrize("threshold", [-2.0, 2.0])
def test_theirs(pipe, threshold):
    """The published network of diffusers, as a checker."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
             "image_size": 224, "patch_size": 56}  # fmt: skip
    torch.manual_seed(0)
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=shape, projection_dim=16)).eval()
    with torch.no_grad():
        theirs.concept_embeds_weights.fill_(threshold)
        theirs.special_care_embeds_weights.fill_(2.0)
    pipe.safety_checker = theirs
    assert draw(pipe).nsfw_content_detected == [threshold < 0] * 2


def test_bad_checkers_are_told(pipe):
    with pytest.raises(ValueError, match=r"^safety_checker=.*None, a checker such as"):
        pipe.safety_checker = "opennsfw"
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="1 verdicts for 2 pictures"):
        looked_at(lambda images, clip_input: (images, [True]), images)
    with pytest.raises(ValueError, match="it gave None; a list"):
        looked_at(lambda images, clip_input: (images, None), images)
    same, flags = looked_at(lambda images, clip_input: (images, [False, False]), images)
    assert torch.equal(same, images) and flags == [False, False] and to_uint8(same).shape == (2, 8, 8, 3)


# -- the folder's own -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A folder with a checker that flags everything, as diffusers writes it."""
    path = tmp_path_factory.mktemp("own") / "folder"
    assert main(["convert", str(tiny_checkpoint), str(path)]) == 0
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
             "image_size": 224, "patch_size": 56}  # fmt: skip
    torch.manual_seed(0)
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=shape, projection_dim=16))
    with torch.no_grad():
        theirs.concept_embeds_weights.fill_(-2.0)
        theirs.special_care_embeds_weights.fill_(2.0)
    theirs.save_pretrained(path / "safety_checker")
    return path


def named(folder, entry):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"safety_checker": entry}))


def test_a_folders_own_is_loaded_unless_none_is_said(folder):
    named(folder, ["stable_diffusion", "StableDiffusionSafetyChecker"])
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    out = draw(pipe)
    assert out.nsfw_content_detected == [True, True] and not np.asarray(out.images[0]).any()
    assert StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).safety_checker is None
    given = Second()
    assert StableDiffusionPipeline.from_pretrained(folder, safety_checker=given).safety_checker is given


def test_a_folder_that_names_none_has_none(folder, caplog):
    named(folder, [None, None])
    assert StableDiffusionPipeline.from_pretrained(folder).safety_checker is None
    assert "safety checker" not in caplog.text


def test_one_that_is_named_and_not_there_is_told(folder, tmp_path, caplog):
    named(folder, ["stable_diffusion", "StableDiffusionSafetyChecker"])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "safety_checker" / "model.safetensors").unlink()
    assert StableDiffusionPipeline.from_pretrained(copy).safety_checker is None
    assert "copy names a safety checker whose weights are not there" in caplog.text
