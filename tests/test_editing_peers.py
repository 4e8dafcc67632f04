"""Drawing over pictures, held against diffusers' own editing pipelines: the same weights, picture and seed.

Tiny random folders that both load; `Job(like="diffusers")` through the pipeline, latents and pixels of the results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato import Pipeline
from sfumato.tasks.studio import Studio
from tests.test_cache import write_folder
from tests.tiny import TINIES

# diffusers says so of every one picture that serves many prompts
pytestmark = pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")

HEIGHT, WIDTH, SEED = 64, 128, 7
TEXTS = {"prompt": "a red apple", "negative": "blue, dull"}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "plms": "PNDMScheduler",
}


@dataclass(frozen=True)
class Drawing:
    """Pictures (B, H, W, 3) uint8 and the latents (B, C, h, w) that they were decoded from, in diffusers' scale."""

    images: np.ndarray
    latents: Tensor


class Pair:
    """diffusers' parts and our pipeline, of one folder; what is replaced to look inside is put back at once."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = Pipeline.from_pretrained(folder)
        absent = {"depth_estimator": None, "feature_extractor": None} if "depth" in folder.name else {}
        self._loaded = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
        self.patch = monkeypatch

    def draw(self, count: int = 1, **fields: Any) -> Drawing:
        """Ours."""
        seen: list[Tensor] = []
        decode = Studio.decode

        def recording(studio, drawn, job):
            seen.append(drawn.latents * (1 + drawn.last**2) ** -0.5)
            return decode(studio, drawn, job)

        with self.patch.context() as patch:
            patch.setattr(Studio, "decode", recording)
            images = self.ours(**TEXTS, **fields, count=count, seed=SEED, like="diffusers").images
        return Drawing(images, seen[-1])

    def peer(self, kind: type, sampler: str) -> Any:
        """A pipeline of diffusers, with another scheduler on it."""
        pipe = kind.from_pipe(self._loaded)
        pipe.set_progress_bar_config(disable=True)
        # the published folders of SD 1.x and 2.x say no spacing, so each scheduler has its own
        config = dict(self._loaded.scheduler.config)
        if not isinstance(
            pipe, diffusers.StableDiffusionXLImg2ImgPipeline | diffusers.StableDiffusionXLInpaintPipeline
        ):
            del config["timestep_spacing"]
        pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config)
        return pipe

    def draw_theirs(self, pipe: Any, count: int = 1, **arguments: Any) -> Drawing:
        """diffusers'."""
        seen: list[Tensor] = []
        decode = pipe.vae.decode

        def recording(z, **rest):
            seen.append(z * pipe.vae.config.scaling_factor)
            return decode(z, **rest)

        with self.patch.context() as patch:
            patch.setattr(pipe.vae, "decode", recording)
            images = pipe(
                TEXTS["prompt"],
                negative_prompt=TEXTS["negative"],
                num_images_per_prompt=count,
                generator=torch.Generator().manual_seed(SEED),
                output_type="np",
                **arguments,
            ).images
        return Drawing((images * 255).round().astype(np.uint8), seen[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """The pair of a kind of family, made once."""
    made: dict[str, Pair] = {}
    with pytest.MonkeyPatch.context() as patch:

        def pair(kind: str) -> Pair:
            if kind == "sd2-upscaler":  # its noise level, 20, is a class
                family = TINIES[kind]
                patch.setitem(TINIES, kind, replace(family, unet=replace(family.unet, num_classes=30)))
            if kind not in made:
                made[kind] = Pair(write_folder(tmp_path_factory.mktemp(kind), kind), patch)
            return made[kind]

        yield pair


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8: soft random blots."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def agree(ours: Drawing, theirs: Drawing, where: np.ndarray | None = None, tolerance: float = 3e-3) -> None:
    """Pixels within 2 of 255, in all the picture or where a mask says, and latents everywhere."""
    assert theirs.latents.std() > 0.1 and theirs.images.std() > 10, "they must say something"
    assert ours.latents.shape == theirs.latents.shape
    apart = float((ours.latents - theirs.latents).abs().max() / theirs.latents.std())
    inside = np.abs(ours.images.astype(int) - theirs.images)[:, slice(None) if where is None else where]
    assert apart < tolerance
    assert inside.max() <= 2


# -- img2img ----------------------------------------------------------------------------------------------------------

EVERY = [(sampler, strength) for sampler in SCHEDULERS if sampler != "plms" for strength in (0.3, 0.55, 0.8, 1.0)]


@pytest.mark.parametrize(
    "kind, sampler, strength",
    [
        *(("sd1", *one) for one in EVERY),
        *(("sd2", *one) for one in EVERY[1::5]),
        *(("xl", *one) for one in EVERY[3::5]),
    ],
)
def test_img2img(folders, kind: str, sampler: str, strength: float) -> None:
    pair = folders(kind)
    count = 2 if strength in (0.55, 1.0) else 1
    peer = diffusers.StableDiffusionXLImg2ImgPipeline if kind == "xl" else diffusers.StableDiffusionImg2ImgPipeline
    theirs = pair.draw_theirs(
        pair.peer(peer, sampler), count, image=Image.fromarray(picture()), strength=strength, num_inference_steps=7,
        guidance_scale=4.0,
    )  # fmt: skip
    ours = pair.draw(count, image=picture(), strength=strength, steps=7, guidance=4.0, sampler=sampler)
    agree(ours, theirs)


@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_img2img_by_pndm(folders, strength: float) -> None:
    """PNDM visits its second timestep twice, and diffusers' img2img (`get_timesteps`) counts that as a step.

    Below full strength it so adds the noise of one level too many, visits nothing twice, and treats x as one level
    cleaner than it is. We begin where DDIM begins, which is what it does when it is handed those timesteps.
    """
    pair, count = folders("sd1"), 2 if strength == 0.55 else 1
    arguments = {
        "image": Image.fromarray(picture()),
        "strength": strength,
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
    }
    ours = pair.draw(count, image=picture(), strength=strength, steps=7, guidance=4.0, sampler="plms")
    peer = pair.peer(diffusers.StableDiffusionImg2ImgPipeline, "plms")
    if strength == 1:
        return agree(ours, pair.draw_theirs(peer, count, **arguments))
    theirs = pair.draw_theirs(peer, count, **arguments)
    assert (ours.latents - theirs.latents).abs().max() > theirs.latents.std(), "the peer was mended"

    def begins_like_ddim(num_steps: int, strength: float, device: torch.device) -> tuple[Tensor, int]:
        every, taken = peer.scheduler.timesteps.unique().flip(0), int(num_steps * strength)
        times = every[num_steps - taken :]
        return torch.cat([times[:2], times[1:]]), taken

    with pair.patch.context() as patch:
        patch.setattr(peer, "get_timesteps", begins_like_ddim)
        agree(ours, pair.draw_theirs(peer, count, **arguments))


# -- inpainting by any model ------------------------------------------------------------------------------------------


def hole(aligned: bool = True) -> np.ndarray:
    """(H, W) bool: what is to be drawn; along latent cells, or across them."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    if aligned:
        mask[16:48, 40:104] = True
    else:
        mask[13:35, 33:79] = True
        mask[47:50, 3:40] = True
        mask[50:55, 90:120] = True  # no cell of diffusers' begins here, so nothing is drawn
    return mask


def as_picture(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)


def inpaint(pair: Pair, sampler: str, strength: float | None, count: int, mask: np.ndarray) -> tuple[Drawing, Drawing]:
    """Ours and theirs."""
    xl = pair.ours.model.family.size_cond
    peer = diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline
    told = {} if strength is None else {"strength": strength}
    theirs = pair.draw_theirs(
        pair.peer(peer, sampler), count, image=Image.fromarray(picture()),
        mask_image=Image.fromarray(as_picture(mask)), height=HEIGHT, width=WIDTH, num_inference_steps=7,
        guidance_scale=4.0, **told,
    )  # fmt: skip
    ours = pair.draw(
        count, image=picture(), mask=as_picture(mask), steps=7, guidance=4.0, sampler=sampler, **told
    )  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize(
    "kind, sampler, strength",
    [
        *(("sd1", *one) for one in EVERY if one[1] != 0.8),
        ("sd1", "plms", 1.0),
        ("sd1", "ddim", None),
        *(("xl", *one) for one in EVERY[2::8]),
        ("xl", "ddim", 1.0),
    ],
)
def test_inpainting_with_four_channels(folders, kind: str, sampler: str, strength: float | None) -> None:
    """The picture is kept by the sampler. What of it is decoded around the mask counts in the latents alone: in pixels
    ours is the picture itself there, and diffusers' what the autoencoder makes of it.
    """
    pair, mask = folders(kind), hole(aligned=strength == 0.3)
    count = 2 if strength in (0.55, 1.0) else 1
    ours, theirs = inpaint(pair, sampler, strength, count, mask)
    agree(ours, theirs, mask)
    assert (ours.images[:, ~mask] == picture()[~mask]).all()


# -- inpainting by models that see the mask ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, sampler, strength",
    [
        *(("sd1-inpaint", "ddim", strength) for strength in (None, 0.3, 0.8, 1.0)),
        *(("sd1-inpaint", "euler_a", strength) for strength in (0.55, 1.0)),
        *(("sd2-inpaint", "heun", strength) for strength in (None, 0.55)),
        *(("xl-inpaint", "euler", strength) for strength in (0.8, 1.0)),
    ],
)
def test_inpainting_with_nine_channels(folders, kind: str, sampler: str, strength: float | None) -> None:
    """The model sees the mask; at full strength diffusers does not encode the picture, so the noise is drawn first."""
    pair, mask = folders(kind), hole(aligned=False)
    count = 2 if strength in (0.55, 1.0) else 1
    ours, theirs = inpaint(pair, sampler, strength, count, mask)
    agree(ours, theirs, mask)
    assert (ours.images[:, ~mask] == picture()[~mask]).all()


def test_a_model_that_sees_the_mask_begins_from_what_is_filled_in(folders) -> None:
    pair, mask = folders("sd1-inpaint"), hole()
    told = {"image": picture(), "mask": as_picture(mask), "steps": 7, "strength": 0.55, "sampler": "ddim"}
    plain, filled = (pair.draw(**told, fill=fill).images for fill in ("original", "nothing"))
    assert np.abs(plain.astype(int) - filled)[:, mask].max() > 10
    assert (plain[:, ~mask] == filled[:, ~mask]).all()


# -- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, strength", [("ddim", None), ("ddim", 0.55), ("dpmpp_2m", 0.3), ("dpmpp_2m", 1.0)])
def test_depth(folders, sampler: str, strength: float | None) -> None:
    pair = folders("sd2-depth")
    count = 2 if strength in (0.55, 1.0) else 1
    told = {} if strength is None else {"strength": strength}
    depth = picture()[..., 0]
    theirs = pair.draw_theirs(
        pair.peer(diffusers.StableDiffusionDepth2ImgPipeline, sampler), count, image=Image.fromarray(picture()),
        depth_map=torch.from_numpy(depth / np.float32(255))[None], num_inference_steps=7, guidance_scale=4.0, **told,
    )  # fmt: skip
    grey = np.repeat(depth[..., None], 3, axis=2)
    ours = pair.draw(count, image=picture(), depth=grey, steps=7, guidance=4.0, sampler=sampler, **told)
    agree(ours, theirs)


# -- instructions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, count, guidance, image_guidance",
    [("ddim", 1, 7.5, 1.5), ("euler_a", 2, 4.0, 1.0), ("heun", 1, 2.0, 3.0), ("dpmpp_2m", 2, 4.0, 2.0)],
)
def test_editing_by_instruction(folders, sampler: str, count: int, guidance: float, image_guidance: float) -> None:
    """diffusers guides by both scales or, where guidance is 1 or image guidance less than 1, by none
    (`do_classifier_free_guidance`); ours always guides by both, as the paper does.
    """
    pair = folders("sd1-edit")
    theirs = pair.draw_theirs(
        pair.peer(diffusers.StableDiffusionInstructPix2PixPipeline, sampler), count,
        image=Image.fromarray(picture()), num_inference_steps=7, guidance_scale=guidance,
        image_guidance_scale=image_guidance,
    )  # fmt: skip
    ours = pair.draw(
        count, image=picture(), steps=7, guidance=guidance, image_guidance=image_guidance, sampler=sampler
    )  # fmt: skip
    agree(ours, theirs)


# -- four times larger ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, count", [("ddim", 1), ("ddim", 2), ("euler_a", 2)])
def test_the_x4_upscaler(folders, sampler: str, count: int) -> None:
    """The small picture's noise is drawn from the same generator, before that of the latents."""
    pair, small = folders("sd2-upscaler"), picture(32, 48)
    theirs = pair.draw_theirs(
        pair.peer(diffusers.StableDiffusionUpscalePipeline, sampler), count, image=Image.fromarray(small),
        noise_level=20, num_inference_steps=7, guidance_scale=4.0,
    )  # fmt: skip
    ours = pair.draw(count, image=small, upscale=4.0, steps=7, guidance=4.0, sampler=sampler)
    agree(ours, theirs)
