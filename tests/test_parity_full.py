"""Whole models at full size against diffusers and transformers, the same random weights in both: `make parity`.

The weights are written once as a single file and once as a diffusers folder; both programs load both. Text embeddings,
one U-Net call, the autoencoder's two halves and whole pictures are compared. SFUMATO_PARITY_DIR keeps the files (some
GB a family; default: a temporary folder), SFUMATO_PARITY_SIDE draws at another size (1024: XL's own).
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from benchmarks.random_weights import write_random
from sfumato.families import Family, Model, find_family
from sfumato.families.conditioning import encode
from sfumato.pipeline import Pipeline
from sfumato.tasks.telling import sizes
from sfumato.types import Job
from sfumato.weights.checkpoint import load_model

log = logging.getLogger(__name__)  # figures are seen with --log-cli-level=INFO
pytestmark = pytest.mark.parity
PROMPT, NEGATIVE = "a photo of an astronaut riding a horse on mars", "blurry, watermark"
STEPS, GUIDANCE, SEED = 4, 5.0, 7
SIDE = int(os.environ.get("SFUMATO_PARITY_SIDE", "0"))
SCHEDULERS = {"ddim": DDIMScheduler, "plms": PNDMScheduler}


@dataclass(frozen=True)
class Subject:
    """A family, the precision that its weights are stored in, and the side of the pictures in pixels."""

    family: Family
    stored: torch.dtype
    side: int


SUBJECTS = {
    "sd1": Subject(find_family("sd1"), torch.float32, SIDE or 512),
    "sd2": Subject(find_family("sd2"), torch.float32, SIDE or 768),
    "xl": Subject(find_family("xl"), torch.bfloat16, SIDE or 512),
}


@dataclass
class Files:
    """One model in both layouts."""

    subject: Subject
    single: Path
    folder: Path


@pytest.fixture(scope="module", params=SUBJECTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    subject = SUBJECTS[request.param]
    kept = os.environ.get("SFUMATO_PARITY_DIR")
    base = Path(kept) if kept else tmp_path_factory.mktemp("parity")
    made = Files(subject, base / f"{request.param}.safetensors", base / request.param)
    for target in (made.single, made.folder):
        write_random(target, subject.family, subject.stored)
    return made


@dataclass
class Seen:
    """What a program makes of the same inputs."""

    context: Tensor
    unet: Tensor
    encoded: Tensor
    decoded: Tensor
    pictures: dict[str, np.ndarray]


def inputs(subject: Subject) -> dict[str, Tensor]:
    """Latents for a picture and for one U-Net call, and a picture to encode."""

    def randn(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    cells = subject.side // 8
    return {
        "noise": randn(1, 4, cells, cells, seed=SEED),
        "x": randn(2, 4, 32, 40, seed=1),
        "t": torch.tensor([981.0, 21.0]),
        "image": randn(1, 3, 256, 192, seed=2).clamp(-1, 1),
        "z": randn(1, 4, 32, 24, seed=3),
    }


def ours(files: Files) -> Seen:
    """Everything by Sfumato, from the single file."""
    subject, given = files.subject, inputs(files.subject)
    model = load_model(files.single, family=subject.family)
    job = Job(PROMPT, NEGATIVE, subject.side, subject.side, STEPS, GUIDANCE, seed=SEED, like="diffusers")
    with torch.inference_mode():
        conds = [encode(model, text, sizes(job)) for text in (PROMPT, NEGATIVE)]
        context = torch.cat([cond.context for cond in conds])
        vector = None if conds[0].vector is None else torch.cat([cond.vector for cond in conds])
        unet = model.unet(given["x"], given["t"], context, vector)
        encoded = model.autoencoder.encode(given["image"]).mean
        decoded = model.autoencoder.decode(given["z"])
    pipeline = Pipeline(model)
    pictures = {name: pipeline.draw(replace(job, sampler=name)).images[0] for name in SCHEDULERS}
    return Seen(context, unet, encoded, decoded, pictures)


def theirs(files: Files) -> Seen:
    """Everything by diffusers and transformers, from the folder."""
    subject, given = files.subject, inputs(files.subject)
    pipe = DiffusionPipeline.from_pretrained(files.folder, torch_dtype=torch.float32, safety_checker=None)
    assert isinstance(pipe, StableDiffusionXLPipeline if subject.family.size_cond else StableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        context, added = embeddings(pipe, subject)
        unet = pipe.unet(given["x"], given["t"], encoder_hidden_states=context, added_cond_kwargs=added).sample
        encoded = pipe.vae.encode(given["image"]).latent_dist.mean
        decoded = pipe.vae.decode(given["z"]).sample
    pictures = {}
    for name, scheduler in SCHEDULERS.items():
        odd = {"skip_prk_steps": True} if name == "plms" else {"clip_sample": False}
        pipe.scheduler = scheduler.from_config(
            pipe.scheduler.config, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading", **odd
        )
        pictures[name] = pipe(
            PROMPT, negative_prompt=NEGATIVE, height=subject.side, width=subject.side, num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, latents=given["noise"].clone(), output_type="np",
        ).images[0]  # fmt: skip
    return Seen(context, unet, encoded, decoded, pictures)


def embeddings(pipe: DiffusionPipeline, subject: Subject) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Rows of context for the prompt and the negative prompt, and what XL adds."""
    encoded = pipe.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=NEGATIVE
    )
    context = torch.cat(encoded[:2])
    if not subject.family.size_cond:
        return context, None
    side = float(subject.side)
    times = torch.tensor([[side, side, 0, 0, side, side]] * 2)
    return context, {"text_embeds": torch.cat(encoded[2:]), "time_ids": times}


@pytest.fixture(scope="module")
def seen(files: Files) -> Iterator[tuple[Seen, Seen]]:
    """Both programs, one after the other: there is no room for two XL U-Nets."""
    first = ours(files)
    gc.collect()
    second = theirs(files)
    gc.collect()
    yield first, second


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Euclidean."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("what", ["context", "unet", "encoded", "decoded"])
def test_networks(what: str, files: Files, seen: tuple[Seen, Seen]) -> None:
    a, b = (getattr(one, what) for one in seen)
    log.info("%s %s: relative difference %.1e", files.folder.name, what, relative(a, b))
    assert a.shape == b.shape
    assert 0.05 < float(b.std()) < 50, "the outputs must say something"
    assert relative(a, b) < 1e-4


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures(sampler: str, files: Files, seen: tuple[Seen, Seen]) -> None:
    a, b = seen[0].pictures[sampler].astype(float), seen[1].pictures[sampler] * 255
    worst = np.abs(a - b).max()
    log.info("%s %s at %d px: worst difference %.2f of 255", files.folder.name, sampler, files.subject.side, worst)
    assert a.shape == b.shape == (files.subject.side, files.subject.side, 3)
    assert b.std() > 10, "the picture must show something"
    assert worst <= 2


def test_both_layouts_hold_the_same(files: Files) -> None:
    """Our reader gives the same bits from both; diffusers reads our single file as it reads our folder."""
    stored = files.subject.stored  # as stored, they are views of the files
    one = load_model(files.single, dtype=stored, family=files.subject.family)
    other = load_model(files.folder, dtype=stored)
    assert other.family == files.subject.family
    assert_same(one, other)
    kind = StableDiffusionXLPipeline if files.subject.family.size_cond else StableDiffusionPipeline
    pipe = kind.from_single_file(
        str(files.single), config=str(files.folder), local_files_only=True, torch_dtype=files.subject.stored,
        safety_checker=None,
    )  # fmt: skip
    folder = kind.from_pretrained(files.folder, torch_dtype=files.subject.stored, safety_checker=None)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        a, b = getattr(pipe, name, None), getattr(folder, name, None)
        if b is None:
            continue
        ours_state, their_state = a.state_dict(), b.state_dict()
        assert set(ours_state) == set(their_state)
        assert all(torch.equal(ours_state[key], their_state[key]) for key in their_state), name


def assert_same(one: Model, other: Model) -> None:
    for part, module in one.networks.items():
        state = other.networks[part].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items()), part
