"""What the network is told at each step of a job: its prompts read, encoded and joined into a plan of guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.diffusion.guidance import Guidance, Options, Weighted, Window, plan
from sfumato.families import Model
from sfumato.families.conditioning import Sizes, TextOptions, alike, describe, encode
from sfumato.models.reuse import reuse_of
from sfumato.prompts.networks import Network, extract
from sfumato.prompts.prompt import Part, parse
from sfumato.tasks.extras import Extras
from sfumato.tasks.profiles import Profile, find_profile
from sfumato.types import Cond, Job

PICTURE_GUIDANCE = 1.5  # InstructPix2Pix's usual one
Entries = Sequence[tuple[int, Cond]]


def guidance_of(
    job: Job, model: Model, concat: Tensor | None = None, label: int | None = None, extras: Extras | None = None
) -> Guidance:
    """The plan of a complete job; `concat` (1, Cc, h, w) is what the U-Net sees beside x, `label` its class.

    What the job names beside the model comes from `extras`; without them ValueError where it names anything.
    """
    profile, options = find_profile(job.like), guidance_options(job, model)
    texts = TextOptions(job.weighting or profile.weighting, job.clip_skip, long=profile.long)
    steps = int(job.steps or 1)
    positive, networks = read(job.prompt, steps, profile)
    guided = options.scale != 1.0 or options.picture is not None
    negative = read(job.negative, steps, profile, negative=True)[0] if guided else []
    extras = Extras(model) if extras is None else extras
    garments = extras.garments(networks)
    extras.wear(tuple(garment.what for garment in garments))  # the text encoders read with them on
    steered, steered_negative = extras.steered(job)
    wide = sizes(job), sizes(job, negative=True)
    conds: dict[tuple[str, bool], Cond] = {}
    for part, is_negative in [*((part, False) for part in positive), *((part, True) for part in negative)]:
        for _, text in part.timeline:
            if (text, is_negative) not in conds:
                zero = is_negative and profile.zero_negative
                words = extras.embeddings
                conds[text, is_negative] = encode(model, text, wide[is_negative], texts, zero, words)
    even = {
        key: replace(cond, concat=concat, worn=garments, steered=steered_negative if key[1] else steered)
        for key, cond in zip(conds, alike(list(conds.values())), strict=True)
    }
    if label is not None:
        even = {key: replace(cond, vector=torch.tensor([label], device=model.device)) for key, cond in even.items()}
    late = 1 - profile.first_step  # where schedules count from 0, everything holds for one step more

    def told(part: Part, is_negative: bool) -> Entries:
        return [(until + late, even[text, is_negative]) for until, text in part.timeline]

    parts = [Weighted(told(part, False), part.weight) for part in positive]
    return plan(parts, told(negative[0], True) if negative else None, options, model.family.prediction)


def read(text: str, steps: int, profile: Profile, negative: bool = False) -> tuple[Sequence[Part], Sequence[Network]]:
    """A prompt's parts and the networks that its tags name; of other grammar as the profile has it."""
    if not profile.grammar:
        bare, networks = (text, ()) if negative else extract(text)
        return [Part(1.0, ((steps, bare),))], networks
    prompt = parse(text, steps, negative=negative)
    return prompt.parts, prompt.networks


def networks_of(job: Job) -> tuple[Network, ...]:
    """The networks that a job's prompts name, those of its second pass behind the first's."""
    profile, steps = find_profile(job.like), int(job.steps or 1)
    prompts = [job.prompt, *([job.hires.prompt] if job.hires is not None and job.hires.prompt else [])]
    return tuple(dict.fromkeys(network for prompt in prompts for network in read(prompt, steps, profile)[1]))


def named_files(job: Job, model: Model, extras: Extras) -> dict[str, str]:
    """SHA-256 of every file beside the model that a complete job is drawn with, by "kind:name"."""
    profile, steps = find_profile(job.like), int(job.steps or 1)
    found = extras.hashes(networks_of(job), job.controls)
    if not extras.embeddings:
        return found
    second = [] if job.hires is None else [(job.hires.prompt, False), (job.hires.negative, True)]
    options = TextOptions(job.weighting or profile.weighting, job.clip_skip, long=profile.long)
    for prompt, negative in [(job.prompt, False), (job.negative, True), *second]:
        for part in read(prompt or "", steps, profile, negative)[0]:
            for _, text in part.timeline:
                found |= {f"embedding:{name}": hash for name, hash in describe(model, text, options, extras.embeddings)}
    return found


def guidance_options(job: Job, model: Model) -> Options:
    """The job's fields of guidance, as the model's family can use them."""
    picture = None
    if model.family.concat == "picture":
        picture = PICTURE_GUIDANCE if job.image_guidance is None else job.image_guidance
    high = math.inf if job.guidance_high is None else job.guidance_high
    return Options(
        scale=float(job.guidance if job.guidance is not None else 1.0),
        window=Window(job.guidance_low, high, job.guidance_start, job.guidance_end, job.guidance_thin),
        pag=job.pag,
        sag=job.sag,
        rescale=job.rescale,
        percentile=job.threshold,
        mimic=job.mimic,
        picture=picture,
        seamless=("x" in job.seamless, "y" in job.seamless),
        freeu=None if job.freeu is None else tuple(job.freeu),  # type: ignore[arg-type]
        reuse=None if job.reuse is None else reuse_of(job.reuse),
        tome=job.tome,
    )


def sizes(job: Job, negative: bool = False) -> Sizes:
    """What XL is told of sizes, in pixels, for the prompt or the negative prompt of a complete job."""
    height, width = int(job.height or 0), int(job.width or 0)
    score = job.negative_aesthetic if negative else job.aesthetic
    usual = 2.5 if negative else 6.0  # the refiner's published defaults
    return {
        "original": (job.original_height or height, job.original_width or width),
        "crop": (job.crop_top or 0, job.crop_left or 0),
        "target": (height, width),
        "aesthetic": (usual if score is None else score,),
    }
