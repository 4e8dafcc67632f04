"""What the tests of adapters share: tiny models with random weights, their peer pipelines, and both sides' outputs."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.families import Family, Model
from sfumato.models.deltas import LoRA
from sfumato.weights.checkpoint import load_model, open_whole, save_checkpoint
from sfumato.weights.parts import shapes_of
from sfumato.weights.writing import parts_of, write
from tests.tiny import TINIES, random_parts


@functools.cache
def checkpoint_of(name: str) -> Path:
    """A file of the tiny family with random weights; kept while the tests run."""
    folder = Path(tempfile.mkdtemp(prefix="sfumato-adapters-"))
    path = folder / f"{name}.safetensors"
    save_checkpoint(path, TINIES[name], random_parts(TINIES[name]), torch.float32)
    return path


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Model:
    """A fresh Model of it."""
    return load_model(checkpoint_of(name), dtype=dtype)


def pipe_of(name: str) -> Any:
    """diffusers' pipeline of the same weights, its networks fresh."""
    pipe = _pipe(name)
    fresh = {key: copy.deepcopy(part) if isinstance(part, nn.Module) else part for key, part in pipe.components.items()}
    return type(pipe)(**fresh, **({} if "xl" in name else {"requires_safety_checker": False}))


@functools.cache
def _pipe(name: str) -> Any:
    import diffusers  # seconds: only tests with a peer need it

    folder = checkpoint_of(name).parent / f"{name}-diffusers"
    if not folder.exists():
        whole = open_whole(checkpoint_of(name))
        write(folder, whole.family, parts_of(whole))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    for module in (pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.eval().requires_grad_(False)
    return pipe


def inputs(family: Family, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        "x": torch.randn(2, family.unet.in_channels, 16, 16, generator=generator),
        "t": torch.tensor([7.0, 500.0]),
        "context": torch.randn(2, 5, family.unet.context_dim, generator=generator),
        "ids": torch.randint(0, 590, (2, 9), generator=generator),
    }
    if family.unet.vector_dim:
        numbers = torch.randint(0, 64, (2, 6), generator=generator)
        found |= {"numbers": numbers, "pooled": torch.randn(2, 12, generator=generator)}
    return found


@torch.no_grad()
def unet_output(model: Model) -> Tensor:
    from sfumato.models.layers import timestep_embedding

    given, vector = inputs(model.family), None
    if "numbers" in given:
        sizes = timestep_embedding(given["numbers"].flatten().float(), model.family.size_dim).reshape(2, -1)
        vector = torch.cat([given["pooled"], sizes], dim=1).to(model.dtype)
    return model.unet(given["x"].to(model.dtype), given["t"], given["context"].to(model.dtype), vector)


@torch.no_grad()
def text_outputs(model: Model) -> list[Tensor]:
    """The states before the last norm of every text encoder, its last layer left out where a pipeline reads so."""
    return [text(inputs(model.family)["ids"], tower.skip_last, False) for text, tower in zip_towers(model)]


def zip_towers(model: Model) -> list[Any]:
    return list(zip(model.texts, model.family.texts, strict=True))


@torch.no_grad()
def peer_unet(pipe: Any, family: Family) -> Tensor:
    given, more = inputs(family), {}
    if "numbers" in given:
        more = {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": given["numbers"]}}
    return pipe.unet(given["x"], given["t"], given["context"], **more).sample


@torch.no_grad()
def peer_texts(pipe: Any, family: Family) -> list[Tensor]:
    """The same states of the peer's."""
    out = []
    for name, tower in zip(("text_encoder", "text_encoder_2"), family.texts, strict=False):
        states = getattr(pipe, name)(inputs(family)["ids"], output_hidden_states=True).hidden_states
        stored = len(states) - 1
        out.append(states[stored - tower.skip_last + (tower.config.num_layers - stored)])
    return out


def weights_of(model: Model) -> dict[tuple[str, str], Tensor]:
    return {
        (part, name): tensor.detach().clone()
        for part, network in model.networks.items()
        for name, tensor in network.state_dict().items()
    }


def same_bits(one: dict[tuple[str, str], Tensor], other: dict[tuple[str, str], Tensor]) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def random_lora(family: Family, rank: int = 4, seed: int = 0, parts: tuple[str, ...] = ()) -> dict[Any, Any]:
    """LoRAs on every linear layer and convolution of attention, in the form of `Adapter.changes`."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[Any, Any] = {}
    for part in parts or ("unet", *family.text_parts):
        for name, shape in shapes_of(family)[part].items():
            if name.endswith(".weight") and len(shape) in (2, 4) and ("attn" in name or "mlp" in name):
                up = 0.3 * torch.randn(shape[0], rank, generator=generator)
                down = 0.3 * torch.randn(rank, *shape[1:], generator=generator)
                changes[part, name] = (LoRA(up, down, rank / 2),)
    return changes


def randomised(module: nn.Module, pattern: str, seed: int = 0, scale: float = 0.3) -> None:
    """Random numbers in the parameters whose name holds the pattern."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if pattern in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
