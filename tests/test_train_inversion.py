"""Textual inversion and hypernetworks are learned at tiny size: the loss falls, only the right numbers change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.families.conditioning import encode
from sfumato.models.hypernetwork import HypernetworkConfig, worn
from sfumato.train.conditions import text_states, vector_of
from sfumato.train.data import LatentBatch
from sfumato.train.diffusion import FramedBatch
from sfumato.train.hypernetwork import HypernetworkObjective, hypernetwork_result, new_hypernetwork
from sfumato.train.inversion import (
    STYLE,
    SUBJECT,
    InversionConfig,
    InversionObjective,
    inversion_result,
    new_inversion,
)
from sfumato.train.loop import LoopConfig, State, fit
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.embeddings import load_embedding, save_embedding
from sfumato.weights.hypernetworks import load_hypernetwork, save_hypernetwork
from tests.tiny import TINIES, random_parts

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoopConfig(steps=30, batch_size=2, lr=0.3, warmup=1, weight_decay=0.0, ema_decay=0.9, checkpoint_every=30)


class OnePicture:
    """The latents of one picture, as a cache of latents gives them."""

    def __init__(self, context: Tensor | None = None) -> None:
        self.mean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        self.context = context

    def __len__(self) -> int:
        return 1

    def batch(self, indices: list[int]) -> LatentBatch:
        count = len(indices)
        mean = self.mean.repeat(count, 1, 1, 1)
        context = None if self.context is None else self.context.repeat(count, 1, 1)
        return LatentBatch(mean, torch.zeros_like(mean), ["a red wall"] * count, context)


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    """The tiny model, in which what it is told counts: random weights leave cross-attention next to nothing."""
    model = load_model(tiny_checkpoint)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight", "proj_out.weight", "out.2.weight")):
                strength = 4 if "attn2" in name else 1
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = strength * noise * parameter[0].numel() ** -0.5  # the file's map stays as it is
    return model


@pytest.fixture
def xl(tmp_path: Path) -> Model:
    save_checkpoint(tmp_path / "xl.safetensors", TINIES["xl"], random_parts(TINIES["xl"]), torch.float32)
    return load_model(tmp_path / "xl.safetensors")


def weights(model: Model) -> list[Tensor]:
    return [each.detach().clone() for network in model.networks.values() for each in network.parameters()]


def error(objective: InversionObjective | HypernetworkObjective, seeds: range = range(6)) -> float:
    """The mean loss over a fixed choice of noise, timesteps and prompts."""
    with torch.no_grad():
        found = [
            objective.loss(OnePicture().batch([0] * 4), torch.Generator().manual_seed(seed))[0].item() for seed in seeds
        ]
    return sum(found) / len(found)


def run(objective: InversionObjective | HypernetworkObjective, folder: Path, **changes: object) -> State:
    return fit(objective, OnePicture(), replace(CONFIG, **changes), folder)  # type: ignore[arg-type]


def all_equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# -- a word -----------------------------------------------------------------------------------------------------------


def test_a_word_is_learned_and_nothing_else(model: Model, tmp_path: Path) -> None:
    before = weights(model)
    objective = new_inversion(model, InversionConfig("<wall>", "red", 4))
    first = error(objective)
    state = run(objective, tmp_path / "run")
    assert error(objective) < 0.98 * first, "0.967 when this was written; a word that learns nothing gives 1"
    assert all_equal(weights(model), before), "the model is as it was"
    assert [name for name, _ in objective.network.named_parameters()] == ["vectors.0"]
    save_embedding(tmp_path / "wall.pt", inversion_result(objective, state))
    word = load_embedding(tmp_path / "wall.pt", model, "<wall>")
    assert (word.step, word.count, word.checkpoint, word.checkpoint_hash) == (30, 4, model.name, model.hash)
    with state.averaged():
        assert torch.equal(word.vectors[0], objective.network.vectors[0])
        assert torch.equal(
            encode(model, "a photo of <wall>", embeddings={"<wall>": word}).context,
            text_states(model, ["a photo of <wall>"], [{"<wall>": objective.network.vectors[0]}]).context,
        ), "a prompt uses what was trained"


def test_it_begins_as_the_initial_words(model: Model) -> None:
    table, encode_text = model.texts[0].text_model.embeddings.token_embedding.weight, model.tokenizers[0].encode
    ids = encode_text("red wall")
    for count, wanted in ((0, ids), (2, ids[:2]), (1, ids[:1]), (2 * len(ids), [each for each in ids for _ in "ab"])):
        network = new_inversion(model, InversionConfig("x", "red wall", count)).network
        assert torch.equal(network.vectors[0], table[wanted])


def test_prompts_name_the_word(model: Model) -> None:
    captions, generator = ["a red wall", ""] * 50, torch.Generator().manual_seed(0)
    objective = new_inversion(model, InversionConfig("zyx", templates=STYLE, caption_prob=0.5))
    prompts = objective.prompts(captions, generator)
    bare = {prompt.removesuffix(", a red wall") for prompt in prompts}
    assert bare == {template.replace("{name}", "zyx") for template in STYLE}
    with_caption = [prompt.endswith(", a red wall") for prompt in prompts]
    assert not any(with_caption[1::2]) and 15 < sum(with_caption[::2]) < 35
    assert all(template.count("{name}") == 1 for template in SUBJECT + STYLE)
    assert len(set(SUBJECT + STYLE)) == len(SUBJECT + STYLE)


def test_two_encoders_learn_a_word_each(xl: Model, tmp_path: Path) -> None:
    before = weights(xl)
    objective = new_inversion(xl, InversionConfig("zyx", "red", 1))
    start = [each.detach().clone() for each in objective.network.vectors]
    state = run(objective, tmp_path / "run", steps=3)
    assert not any(torch.equal(a, b) for a, b in zip(start, objective.network.vectors, strict=True))
    assert all_equal(weights(xl), before)
    save_embedding(tmp_path / "word.safetensors", inversion_result(objective, state))
    assert [each.shape[1] for each in load_embedding(tmp_path / "word.safetensors", xl).vectors] == [8, 16]


# -- a hypernetwork ---------------------------------------------------------------------------------------------------


def test_a_hypernetwork_is_learned_and_nothing_else(model: Model, tmp_path: Path) -> None:
    before = weights(model)
    config = HypernetworkConfig((8, 16), (1, 2, 1), "relu", weight_init="XavierNormal")
    objective = new_hypernetwork(model, "wall", torch.Generator().manual_seed(0), config)
    first = error(objective)
    state = run(objective, tmp_path / "run", lr=5e-3)
    assert error(objective) < 0.9 * first, "0.80 when this was written"
    assert all_equal(weights(model), before), "the model is as it was"
    file = hypernetwork_result(objective, state)
    save_hypernetwork(tmp_path / "wall.pt", file)
    found = load_hypernetwork(tmp_path / "wall.pt")
    assert (found.step, found.checkpoint, found.checkpoint_hash) == (30, model.name, model.hash)
    assert all_equal(list(found.network.parameters()), list(state.ema.values()))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10]), encode(model, "x").context
    with torch.no_grad():
        plain = model.unet(x, t, context)
        with worn(model.unet, [(found.network, 1.0)]):
            assert not torch.equal(model.unet(x, t, context), plain)


def test_it_has_the_widths_of_the_unet(model: Model, xl: Model, tmp_path: Path) -> None:
    objective = new_hypernetwork(model, "x", torch.Generator().manual_seed(0))
    assert objective.network.config == HypernetworkConfig((8, 16))
    context = text_states(model, ["a red wall"]).context
    data = OnePicture(context + 1)
    seen = objective.loss(data.batch([0]), torch.Generator().manual_seed(1))[0]
    assert not torch.equal(seen, objective.loss(OnePicture().batch([0]), torch.Generator().manual_seed(1))[0])
    large = new_hypernetwork(xl, "x", torch.Generator().manual_seed(0))
    fit(large, OnePicture(context), replace(CONFIG, steps=2, lr=1e-3), tmp_path / "run")
    assert all(each.abs().max() > 0 for each in large.network.parameters())


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["word", "hypernetwork"])
def test_a_run_that_stopped_is_one_that_did_not(model: Model, tmp_path: Path, what: str) -> None:
    def new() -> InversionObjective | HypernetworkObjective:
        if what == "word":
            return new_inversion(model, InversionConfig("zyx", "red", 2, caption_prob=0.5))
        config = HypernetworkConfig((8, 16), activation="mish", dropout=(0, 0.3, 0), layer_norm=True)
        return new_hypernetwork(model, "zyx", torch.Generator().manual_seed(0), config)

    whole = run(new(), tmp_path / "whole", steps=8, lr=1e-3)
    run(new(), tmp_path / "halves", steps=4, lr=1e-3)
    halves = run(new(), tmp_path / "halves", steps=8, lr=1e-3)
    assert whole.step == halves.step == 8
    assert all_equal(list(whole.parameters.values()), list(halves.parameters.values()))
    assert all_equal(list(whole.ema.values()), list(halves.ema.values()))
    assert not all_equal(list(whole.parameters.values()), list(whole.ema.values()))


def test_what_cannot_be_learned_is_told(model: Model, tmp_path: Path) -> None:
    for fields, words in [
        ({"name": "a (b)"}, r"name='a \(b\)': letters, digits"),
        ({"name": "..."}, "name='...'"),
        ({"name": "x", "num_vectors": -1}, "num_vectors=-1: 0 or more"),
        ({"name": "x", "templates": ("a photo",)}, "templates: one or more"),
        ({"name": "x", "caption_prob": 2.0}, "caption_prob=2.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            InversionConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initial=' ': a word or more"):
        new_inversion(model, InversionConfig("x", " "))
    with pytest.raises(ValueError, match="num_vectors=76: 1 to 75"):
        new_inversion(model, InversionConfig("x", "red", 76))
    with pytest.raises(ValueError, match=r"widths=\(768,\): this U-Net has 8, 16"):
        new_hypernetwork(model, "x", torch.Generator(), HypernetworkConfig((768,)))
    save_checkpoint(tmp_path / "i.safetensors", TINIES["sd2-depth"], random_parts(TINIES["sd2-depth"]), torch.float32)
    with pytest.raises(ValueError, match="sees more than a text"):
        new_inversion(load_model(tmp_path / "i.safetensors"), InversionConfig("x"))
    assert isinstance(new_inversion(model, InversionConfig("x")).network, nn.Module)


# -- what XL is told of a picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["word", "hypernetwork"])
def test_xl_is_told_the_real_size_and_crop(xl: Model, trainer: str) -> None:
    """As the trainer of LoRA tells it: original, crop, target; without frames, that nothing was cut off."""
    if trainer == "word":
        objective: InversionObjective | HypernetworkObjective = new_inversion(xl, InversionConfig("zyx", "red", 1))
    else:
        objective = new_hypernetwork(xl, "h", torch.Generator().manual_seed(0))
    told: list[Tensor] = []
    hook = xl.unet.register_forward_pre_hook(lambda module, args: told.append(args[3].detach()))
    bare = OnePicture().batch([0, 0])
    frames = torch.tensor([[300.0, 200.0, 7.0, 3.0, 64.0, 64.0], [64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    framed = FramedBatch(bare.mean, bare.std, bare.captions, frames=frames)
    for batch in (framed, bare):
        objective.loss(batch, torch.Generator().manual_seed(1))
    hook.remove()
    pooled = told[0][:, :12]
    assert torch.equal(told[0], vector_of(xl, pooled, frames))
    sizes = [each[:, 12:] for each in told]
    assert torch.equal(sizes[1], sizes[0][1].expand(2, -1)) and not torch.equal(sizes[0][0], sizes[0][1])
