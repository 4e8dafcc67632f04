"""What a U-Net is told in training: texts, XL's pooled vector and sizes, a hint, a masked picture; and its loss.

Knows no adapter and no file. Letters: B pictures, L tokens, D width, E width of the pooled vector, V of the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Model
from sfumato.families.conditioning import encode_pooled, size_vector
from sfumato.train.data import LatentBatch
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, FramedBatch, States, Texts, frozen

AESTHETIC = 6.0  # what XL's refiner is told of pictures of which nothing is known, its own default


@dataclass(frozen=True)
class Told:
    """What a network is told beside x and t: context (B, L, D), vector (B, V), hint (B, 3, H, W) in [0, 1].

    `beside` (B, Cc, h, w) are more channels of x, of models that inpaint, edit or see depth.
    """

    context: Tensor
    vector: Tensor | None = None
    hint: Tensor | None = None
    beside: Tensor | None = None


Predict = Callable[[Tensor, Tensor, Told], Tensor]


def check_trainable(model: Model, sees: Sequence[str] = ("inpaint",)) -> None:
    """ValueError, in a line, for families whose U-Net sees more than a text and one of these beside x."""
    family = model.family
    if family.concat not in (None, *sees) or family.unet.num_classes is not None:
        known = "told of a text alone, or inpaint" if "inpaint" in sees else "told of a text alone"
        raise ValueError(
            f"ckpt={model.name!r}: {family.name}'s U-Net sees more than a text; only models that are {known} are "
            "trained here"
        )


def text_states(model: Model, captions: Sequence[str], words: Sequence[Mapping[str, Tensor]] = ()) -> Texts:
    """What all text encoders say of plain captions, cut after one chunk. Gradients reach them.

    `words` are the vectors (n, D) of new words by name, for each text encoder. Where the family's empty negative prompt
    is zeros, so are empty captions, as those that are dropped.
    """
    new = words or [{}] * len(model.texts)
    towers = zip(model.family.texts, model.texts, model.tokenizers, new, strict=True)
    found = [encode_pooled(tower, text, tokenizer, captions, each) for tower, text, tokenizer, each in towers]
    context = torch.cat([states for states, _ in found], dim=-1)
    pooled = found[-1][1] if model.family.unet.vector_dim is not None else None
    if model.family.zero_empty_negative:
        kept = torch.tensor([float(bool(caption)) for caption in captions], device=context.device)
        context = context * kept[:, None, None]
        pooled = None if pooled is None else pooled * kept[:, None]
    return Texts(context, pooled)


def vector_of(model: Model, pooled: Tensor, frames: Tensor) -> Tensor:
    """pooled (B, E) and frames (B, 6) -> (B, V), as Podell et al. 2023, section 2.2, tell the U-Net."""
    family = model.family
    rows = []
    for height, width, top, left, tall, wide in frames.tolist():
        sizes = {"original": (height, width), "crop": (top, left), "target": (tall, wide), "aesthetic": (AESTHETIC,)}
        rows.append(size_vector(family.size_cond, sizes, family.size_dim))
    return torch.cat([pooled, torch.cat(rows).to(pooled)], dim=1)


def telling(model: Model) -> Callable[[LatentBatch, States], Told]:
    """(batch, its captions' states) -> Told. Of latents without frames it is said that nothing was cut off."""
    factor = model.family.autoencoder.factor

    def tell(batch: LatentBatch, states: States) -> Told:
        framed = batch if isinstance(batch, FramedBatch) else None
        hints = None if framed is None or framed.hints is None else framed.hints.float() / 255
        beside = None if framed is None else framed.beside
        if model.family.concat is not None and beside is None:
            raise ValueError(f"data: {model.family.name}'s U-Net sees more than a text, these latents come without")
        if isinstance(states, Tensor):
            return Told(states, None, hints, beside)
        if states.pooled is None:
            return Told(states.context, None, hints, beside)
        frames = None if framed is None else framed.frames
        if frames is None:
            tall, wide = (factor * length for length in batch.mean.shape[2:])
            frames = torch.tensor([[tall, wide, 0, 0, tall, wide]] * len(batch.mean))
        return Told(states.context, vector_of(model, states.pooled, frames), hints, beside)

    return tell


def predicting(model: Model) -> Predict:
    """The U-Net itself as (x, t, told) -> prediction."""

    def predict(x: Tensor, t: Tensor, told: Told) -> Tensor:
        seen = x if told.beside is None else torch.cat([x, told.beside.to(x)], dim=1)
        out: Tensor = model.unet(seen, t, told.context, told.vector)
        return out

    return predict


def objective_of(
    model: Model,
    network: nn.Module,
    predict: Predict,
    config: DiffusionConfig,
    train_text: bool = False,
    states: Callable[[list[str]], Texts] | None = None,
) -> DiffusionObjective:
    """The model's own loss for what is in `network`; gradients reach the text encoders only with `train_text`.

    `states` is what they say instead of `text_states`, asked anew each time.
    """
    family = model.family

    def usual(captions: list[str]) -> Texts:
        return text_states(model, captions)

    denoiser = Denoiser[Told](predict, NoiseSchedule(family.schedule), family.prediction)
    context = states or (usual if train_text else frozen(usual))
    objective = DiffusionObjective(network, denoiser, context, family.latent_scale, config, tell=telling(model))
    objective.partial = train_text  # a text encoder's last layers may be left out, or its pooled vector
    return objective


def rest(model: Model) -> None:
    """Every network of the model in evaluation and without gradients."""
    for network in model.networks.values():
        network.eval().requires_grad_(False)
