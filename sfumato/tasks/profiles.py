"""Profiles: what makes the same settings give another picture in another program, each in one place.

`like` names one. A profile fills what a job leaves open, and says how prompts are read and noise is drawn.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """How a program reads prompts, draws noise and chooses what is not said; None is the family's own.

    `grammar`: A1111's grammar is read, else the prompt is plain text. `long`: prompts may have more than one chunk.
    `first_step` is what prompt schedules count from. `one_generator`: all pictures of a job come from one generator,
    else picture i from that of seed + i. `schedule` is what samplers without a schedule of their own get.
    `zero_negative`: an empty negative prompt is zeros where the family says so. `diffusers_levels`: samplers visit the
    levels, and start from the scale, of diffusers' schedulers of their names.

    Of drawing over a picture: `strength` is the usual one and `strength_rule` how steps follow from it (redraw.RULES);
    `picture_size` is that of a job which says none: the picture's own ("keep"), rounded down ("floor") or the model's
    ("native"); `sampled`: latents are a sample of the autoencoder's posterior. `mask_blur` (px; None: a quarter of a
    latent cell) stays inside the mask where it is `mask_inward`. `noise_at_full`: a masked picture is begun at strength
    1, from noise alone, and the first noise is shown around the mask at every level; `blends_inpainting`: the picture
    is kept around the mask also by models that see it.
    """

    name: str
    summary: str
    grammar: bool = True
    long: bool = True
    first_step: int = 1
    weighting: str = "original"
    noise: str = "cpu"
    one_generator: bool = False
    sampler: str | None = None
    schedule: str | None = None
    steps: int | None = None
    guidance: float | None = None
    zero_negative: bool = True
    diffusers_levels: bool = False
    strength: float = 0.75
    strength_rule: str = "round"
    picture_size: str = "keep"
    sampled: bool = False
    mask_blur: float | None = None
    mask_inward: bool = True
    noise_at_full: bool = False
    blends_inpainting: bool = False


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("sfumato", "this program's own ways"),
        Profile(
            "a1111",
            "AUTOMATIC1111's web UI on a CUDA card: its grammar, noise of each seed as the card draws it",
            first_step=0,
            noise="philox",
            sampler="dpmpp_2m",
            steps=20,
            guidance=7.0,
            zero_negative=False,
            strength_rule="a1111",
            picture_size="native",
            mask_blur=4.0,
            mask_inward=False,
            blends_inpainting=True,
        ),
        Profile(
            "comfy",
            "ComfyUI: weights interpolated from the empty prompt, one CPU generator for a batch",
            weighting="comfy",
            one_generator=True,
            sampler="euler",
            schedule="normal",
            steps=20,
            guidance=8.0,
            zero_negative=False,
            strength=1.0,
            strength_rule="whole",
            picture_size="floor",
            mask_blur=0.0,
            blends_inpainting=True,
        ),
        Profile(
            "diffusers",
            "diffusers' pipelines: plain prompts of 75 tokens, one CPU generator for a batch, the published scheduler",
            grammar=False,
            long=False,
            weighting="none",
            one_generator=True,
            diffusers_levels=True,
            steps=50,
            strength=0.8,
            strength_rule="diffusers",
            picture_size="floor",
            sampled=True,
            mask_blur=0.0,
            noise_at_full=True,
        ),
        Profile(
            "compvis",
            "the original scripts on a CUDA card: plain prompts of 75 tokens, PLMS or DDIM",
            grammar=False,
            long=False,
            weighting="none",
            noise="philox",
            one_generator=True,
            sampler="ddim",
            steps=50,
            guidance=7.5,
            strength_rule="compvis",
            picture_size="floor",
            mask_blur=0.0,
        ),
    )
}


def find_profile(name: str | None) -> Profile:
    """The profile of a name (None: this program's own); ValueError lists the names."""
    key = "sfumato" if name is None else name.lower()
    if key not in PROFILES:
        near = difflib.get_close_matches(key, PROFILES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"like={name!r}: one of {', '.join(PROFILES)}{hint}")
    return PROFILES[key]
