"""Consistency distillation at tiny size: its formulas, what it learns from whom, and that its files load everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from sfumato.cli.main import main
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.images import save_png
from sfumato.train.conditions import Told, objective_of
from sfumato.train.config import LoopConfig
from sfumato.train.consistency import (
    LCM_LORA,
    PLAIN,
    ConsistencyConfig,
    ConsistencyObjective,
    beside_consistency,
    boundary,
    ddim_step,
    distil,
    off,
    whole_consistency,
)
from sfumato.train.data import CachedLatents, LatentBatch
from sfumato.train.data.latents import fingerprint
from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.checkpoint import load_model
from sfumato.weights.files import load_safetensors
from tests.adapters import checkpoint_of, inputs, model_of, peer_unet, pipe_of, same_bits, unet_output, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = LoopConfig(steps=10, batch_size=2, lr=3e-3, warmup=1, ema_decay=0.5, weight_decay=0.0, checkpoint_every=30)
SMALL = replace(LCM_LORA, rank=4, alpha=4.0)
CONFIG = ConsistencyConfig(guidance=3.0)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve latents of SD's shape with captions, as a cache."""
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    mean = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = [f"picture {index % 3}" for index in range(12)]
    CachedLatents.write(path, mean, 0.01 * torch.ones_like(mean), captions, fingerprint(model_of("sd1").autoencoder))
    return path


def batch_of(latents: Path) -> LatentBatch:
    return CachedLatents([latents]).batch(range(6))


def probe(objective: ConsistencyObjective, latents: Path, seeds: int = 4) -> float:
    """The mean loss over a fixed choice of noise and timesteps."""
    with torch.no_grad():
        batch = batch_of(latents)
        found = [float(objective.loss(batch, torch.Generator().manual_seed(seed))[0]) for seed in range(seeds)]
    return sum(found) / len(found)


def test_the_boundary_is_the_published_one() -> None:
    theirs = LCMScheduler()
    for t in (0, 1, 19, 999):
        c_skip, c_out = theirs.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        found = boundary(torch.tensor([t]), ConsistencyConfig())
        assert [float(each) for each in found] == pytest.approx([float(c_skip), float(c_out)], rel=1e-5)
    assert [float(each) for each in boundary(torch.tensor([0]), CONFIG)] == [1.0, 0.0]


def test_the_solvers_step_is_that_of_diffusers() -> None:
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    theirs.set_timesteps(50)
    schedule = NoiseSchedule(model_of("sd1").family.schedule)
    z, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    sigma, sigma_next = (torch.tensor([float(schedule.sigmas[t])] * 2) for t in (499, 479))
    x = z * (1 + sigma[0] ** 2).sqrt()
    lower = ddim_step(x, x - sigma[0] * eps, sigma, sigma_next)
    wanted = theirs.step(eps, 499, z).prev_sample * (1 + sigma_next[0] ** 2).sqrt()
    assert float((lower - wanted).abs().max() / wanted.abs().max()) < 1e-5


def objective_with(student: Tensor, teacher: Tensor) -> ConsistencyObjective:
    """Of denoisers that answer one picture always, and a model's way to read captions."""
    model = model_of("sd1")

    def always(picture: Tensor) -> Denoiser[Told]:
        return Denoiser(
            lambda x, t, told: picture.expand(len(x), -1, -1, -1), NoiseSchedule(model.family.schedule), "sample"
        )

    inner = objective_of(model, model.unet, lambda x, t, told: x, PLAIN)
    inner.denoiser = always(student)
    return ConsistencyObjective(inner, always(teacher), CONFIG)


def test_who_knows_the_end_has_no_loss(latents: Path) -> None:
    """Where all pictures are one, the function that always says it is consistent, but for the boundary's weights."""
    picture = torch.randn(1, 4, 8, 8)
    scale = model_of("sd1").family.latent_scale
    batch = LatentBatch(picture.expand(6, -1, -1, -1) / scale, torch.zeros(6, 4, 8, 8), ["a"] * 6)
    right, wrong = objective_with(picture, picture), objective_with(picture + 1, picture)
    losses = [float(each.loss(batch, torch.Generator().manual_seed(1))[0]) for each in (right, wrong)]
    assert losses[0] < 1e-3
    # a student that always says the same agrees with itself, whatever it says: only the boundary ties it to the data
    generator = torch.Generator().manual_seed(1)
    lowest = torch.tensor([0])
    told = right._told(batch, batch.captions)
    x = batch.mean[:1] * scale + 0.029 * torch.randn(1, 4, 8, 8, generator=generator)
    found = wrong.consistent(x, lowest, told)
    assert torch.allclose(found, x / (1 + float(wrong.student.schedule.sigmas[0]) ** 2) ** 0.5, atol=1e-6)


def test_levels_are_the_solvers(latents: Path) -> None:
    objective = objective_with(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    t, t_next = objective._levels(2000, torch.Generator().manual_seed(0))
    assert sorted(set(t.tolist())) == list(range(19, 1000, 20))
    assert torch.equal(t_next, (t - 20).clamp(min=0)) and int(t_next.min()) == 0


@pytest.mark.parametrize("levels", [2, 3, 30, 300, 501, 600, 999, 1000])
def test_levels_that_do_not_divide_the_schedule_reach_both_its_ends(levels: int) -> None:
    plain = objective_with(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    objective = ConsistencyObjective(plain.inner, plain.teacher, replace(CONFIG, solver_steps=levels))
    t, t_next = objective._levels(20 * levels, torch.Generator().manual_seed(0))
    assert int(t.max()) == 999 and int(t_next.min()) == 0
    assert set(t.tolist()) | {0} == set(t_next.tolist()) | {999}, "each step ends where another begins"
    assert int((t - t_next).max()) - int((t - t_next)[t_next > 0].min()) <= 1, "even"


def test_the_teacher_is_guided() -> None:
    """x0 = without + w (with - without), each asked with its own caption."""
    model = model_of("sd1")
    objective, made = beside_consistency(model, CONFIG, SMALL, torch.Generator().manual_seed(0))
    told, empty = (objective._told(LatentBatch(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), [text]), [text])
                   for text in ("a cat", ""))  # fmt: skip
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        with_text, without = (objective.teacher(x, [3.0], each) for each in (told, empty))
        found = objective._guided(x, torch.tensor([3.0]), told, empty)
    made.detach()
    assert torch.allclose(found, without + 3.0 * (with_text - without), atol=1e-4)
    assert float((with_text - without).abs().max()) > 1e-3


def test_a_lora_learns_and_the_model_stays(latents: Path, tmp_path: Path) -> None:
    model = model_of("sd1")
    before, plain = weights_of(model), unet_output(model)
    objective, made = beside_consistency(model, CONFIG, SMALL, torch.Generator().manual_seed(LOOP.seed))
    first = probe(objective, latents)
    with off(made.beside):
        assert torch.allclose(unet_output(model), plain, atol=1e-5)  # but for the hastened convolutions' rounding
    made.detach()
    examples = CachedLatents([latents]).in_batches(2, 0)
    path = distil(model, examples, tmp_path, "quick", replace(LOOP, steps=30), CONFIG, SMALL)
    assert same_bits(weights_of(model), before) and torch.equal(unet_output(model), plain)
    adapter = load_adapter(path, model)
    assert adapter.unmatched == () and set(adapter.parts) == {"unet"}
    worn = model_of("sd1")
    Wardrobe(worn).wear([Worn(adapter)])
    taught = objective_of(worn, worn.unet, lambda x, t, told: worn.unet(x, t, told.context), PLAIN)
    teacher = objective_of(model, model.unet, lambda x, t, told: model.unet(x, t, told.context), PLAIN).denoiser
    assert probe(ConsistencyObjective(taught, teacher, CONFIG), latents) < 0.9 * first
    assert json.loads(load_safetensors(path)[1]["sfumato.consistency"])["guidance"] == 3.0


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_diffusers_draws_with_it(kind: str, tmp_path: Path) -> None:
    model, pipe = model_of(kind), pipe_of(kind)
    path = tmp_path / "latents.safetensors"
    mean = torch.randn(4, 4, 8, 8)
    CachedLatents.write(path, mean, 0.01 * torch.ones_like(mean), ["a", "b", "c", "d"])
    examples = CachedLatents([path]).in_batches(2, 0)
    made = distil(model, examples, tmp_path, "quick", replace(LOOP, steps=6, lr=1e-2), CONFIG, SMALL)
    names = load_safetensors(made)[0]
    if kind == "sd1":
        assert "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight" in names, "the published files' names"
    fresh = model_of(kind)
    plain = unet_output(fresh)
    Wardrobe(fresh).wear([Worn(load_adapter(made, fresh))])
    pipe.load_lora_weights(tmp_path, weight_name="quick.safetensors")
    theirs = peer_unet(pipe, model.family)
    torch.testing.assert_close(unet_output(fresh), theirs, atol=1e-4, rtol=1e-4)
    assert float((theirs - plain).abs().max()) > 0.01


def test_whole_weights_learn_and_the_teacher_rests(latents: Path, tmp_path: Path) -> None:
    model = model_of("sd1")
    objective = whole_consistency(model, CONFIG)
    given = inputs(model.family)
    told = Told(given["context"])
    x = given["x"][:, :, :8, :8]
    with torch.no_grad():
        first, before = probe(objective, latents), objective.teacher(x, [1.0, 2.0], told)
    examples = CachedLatents([latents]).in_batches(2, 0)
    path = distil(model, examples, tmp_path, "quick", replace(LOOP, steps=30, lr=1e-3), CONFIG, None)
    with torch.no_grad():
        assert torch.equal(objective.teacher(x, [1.0, 2.0], told), before)
    assert probe(objective, latents) < 0.9 * first, "the objective's student is the model itself"
    found = load_model(path)
    assert not torch.allclose(unet_output(found), unet_output(model_of("sd1")), atol=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_gradients_in_16_bits_are_those_of_32(kind: str, latents: Path) -> None:
    """Captions' states that were kept, a guided teacher and a target go through autocast with the student."""

    def gradients(precision: str) -> dict[str, Tensor]:
        model = model_of("sd1")
        if kind == "whole":
            objective = whole_consistency(model, CONFIG)
        else:
            objective = beside_consistency(model, CONFIG, SMALL, torch.Generator().manual_seed(0))[0]
            for number, parameter in enumerate(objective.network.parameters()):  # from 0 half of them have no gradient
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.data += 0.05 * noise
        batch = batch_of(latents)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = objective.loss(batch, torch.Generator().manual_seed(5))
        loss.backward()
        found = {name: parameter.grad for name, parameter in objective.network.named_parameters()}
        return {name: grad.float() for name, grad in found.items() if grad is not None}

    exact, rounded = gradients("fp32"), gradients("bf16")
    assert rounded.keys() == exact.keys()
    flat = [torch.cat([each[name].flatten() for name in exact]) for each in (exact, rounded)]
    likeness = float(torch.cosine_similarity(*flat, dim=0))
    assert likeness > 0.97, likeness


def test_it_goes_on_as_if_it_never_stopped(latents: Path, tmp_path: Path) -> None:
    def run(folder: Path, *steps: int) -> bytes:
        for count in steps:
            examples = CachedLatents([latents]).in_batches(2, 0)
            path = distil(model_of("sd1"), examples, folder, "quick", replace(LOOP, steps=count), CONFIG, SMALL)
        return path.read_bytes()

    assert run(tmp_path / "a", 2, 4)[-4096:] == run(tmp_path / "b", 4)[-4096:]
    with pytest.raises(ValueError, match="guidance was 3.0, is 5.0"):
        examples = CachedLatents([latents]).in_batches(2, 0)
        distil(model_of("sd1"), examples, tmp_path / "a", "quick", LOOP, replace(CONFIG, guidance=5.0), SMALL)


def test_the_command_and_what_it_draws(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "quick"
    flags = ["--ckpt", str(checkpoint_of("sd1")), "--out", str(run), "--steps", "2", "--batch", "2", "--rank", "2"]
    given = ["--latents", str(latents), "--prompt", "picture 1", "--sample-every", "2"]
    assert main(["train", "consistency", *flags, *given]) == 0
    assert capsys.readouterr().out.strip() == str(run / "quick.safetensors")
    assert sorted(path.name for path in run.glob("samples-*.png")) == ["samples-000000.png", "samples-000002.png"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(2):
        save_png(folder / f"{index}.png", np.full((64, 64, 3), 40 * index, np.uint8))
        (folder / f"{index}.txt").write_text("grey")
    out = [*flags[:2], "--out", str(tmp_path / "other"), *flags[4:], "--full", "--name", "whole"]
    assert main(["train", "consistency", *out, "--data", str(folder), "--precision", "bf16"]) == 0
    assert load_model(tmp_path / "other" / "whole.safetensors").family.name == model_of("sd1").family.name


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "one of --data PATH and --latents FILE"),
        (["--latents", "x", "--data", "y"], "one of --data PATH and --latents FILE"),
        (["--latents", "none.safetensors", "--solver-steps", "1"], "none.safetensors"),
    ],
)
def test_what_the_command_refuses(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--ckpt", str(checkpoint_of("sd1")), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main(["train", "consistency", *place, *flags]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("field", ["guidance", "solver_steps", "sigma_data", "timestep_scale", "huber"])
def test_numbers_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0"):
        ConsistencyConfig(**{field: 0})


@pytest.mark.parametrize("levels", [1, 1001])
def test_a_solver_must_fit_the_schedule(levels: int) -> None:
    model = model_of("sd1")
    with pytest.raises(ValueError, match="2 to 1000 are allowed"):
        whole_consistency(model, ConsistencyConfig(solver_steps=levels))


def test_a_student_that_cannot_be_leaves_the_model_as_it_was() -> None:
    model = model_of("sd1")
    names = set(model.unet.state_dict())
    before = unet_output(model)
    with pytest.raises(ValueError, match=r"^solver_steps=2000: 2 to 1000 are allowed"):
        beside_consistency(model, replace(CONFIG, solver_steps=2000), SMALL, torch.Generator().manual_seed(0))
    assert torch.equal(unet_output(model), before) and set(model.unet.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.unet.modules())
    assert all(module.room is None for module in model.unet.modules() if hasattr(module, "room"))
