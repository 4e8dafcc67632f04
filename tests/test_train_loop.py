"""The loop: killed anywhere and resumed bit for bit, steps that are not finite, full disks, locks, logs, its status."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from safetensors import SafetensorError
from torch import nn

from sfumato.cli.main import main
from sfumato.train import checkpoints, config, guards, logs
from sfumato.train.config import LoopConfig
from sfumato.train.loop import State, ema_weights, export_weights, fit, model_weights
from sfumato.train.optimizers import LossScale
from sfumato.weights.files import load_safetensors, save_safetensors

ROOT = Path(__file__).parents[1]
CONFIG = LoopConfig(steps=6, batch_size=4, lr=1e-2, warmup=2, log_every=1, checkpoint_every=2)

# Losses of steps 1 to 50 of `golden` on the CPU, torch 2.13. Another version's kernels may differ in the last digits.
GOLDEN = [
    0.84152, 1.62870, 0.87989, 0.90925, 1.13761, 1.07329, 0.97415, 0.89833, 0.90637, 0.97075,
    0.83393, 0.66173, 0.78299, 0.73880, 0.62465, 0.75488, 0.61453, 0.60143, 0.52713, 0.58539,
    0.67122, 0.51005, 0.56181, 0.54942, 0.51627, 0.37569, 0.59865, 0.50686, 0.52114, 0.45212,
    0.36879, 0.42636, 0.55212, 0.38252, 0.55519, 0.41078, 0.54998, 0.30147, 0.44735, 0.48881,
    0.44619, 0.33796, 0.41224, 0.42620, 0.35841, 0.36115, 0.32946, 0.49250, 0.40199, 0.41956,
]  # fmt: skip


class Points:
    """Points of the plane and a function of them; `pause` seconds for each batch, `broken` steps give NaN."""

    def __init__(self, length: int = 24, pause: float = 0.0, broken: tuple[int, ...] = ()) -> None:
        self.x = torch.randn(length, 2, generator=torch.Generator().manual_seed(7))
        self.pause, self.broken, self.asked = pause, broken, 0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices):
        time.sleep(self.pause)
        x = self.x[list(indices)]
        y = torch.stack([torch.sin(2 * x[:, 0]) + x[:, 1], x.prod(dim=1)], dim=1)
        self.asked += 1
        if self.asked - 1 in self.broken:
            y = y * math.nan
        return {"x": x, "y": y, "captions": [f"point {index}" for index in indices]}


class Regression:
    """A small network with dropout, a batch norm and noise of the generator; all that a resume could forget."""

    def __init__(self, noise: float = 0.1, width: int = 16, dropout: float = 0.2, norm: bool = True) -> None:
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(width)] if norm else []
        self.network = nn.Sequential(nn.Linear(2, width), *middle, nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 2))
        self.noise = noise
        self.steps: list[int] = []

    def loss(self, batch, generator):
        noise = self.noise * torch.randn(batch["x"].shape, generator=generator)
        error = (self.network(batch["x"] + noise) - batch["y"]).square().mean()
        return error, {"error": error}


class Adversary(Regression):
    """The same with a critic that tells answers from truths, from its second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))

    def begin_step(self, step: int) -> None:
        self.steps.append(step)

    def loss(self, batch, generator):
        error, figures = super().loss(batch, generator)
        return error - 0.01 * self.critic(self.network(batch["x"])).mean(), figures

    def critic_loss(self, batch, generator):
        if self.steps[-1] < 2:
            return torch.zeros(()), {}
        truth, answer = self.critic(batch["y"]), self.critic(self.network(batch["x"]).detach())
        margin = torch.relu(1 - truth).mean() + torch.relu(1 + answer).mean()
        return margin, {"margin": margin}


def everything(state: State) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.tensors().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def child(folder: str, steps: int, pause: float, die_in_save: int) -> None:
    """A run in a process of its own; with `die_in_save` it kills itself in the middle of writing that checkpoint."""
    if die_in_save:
        whole, count = guards.os.fsync, [0]

        def fsync(handle):  # called with the checkpoint written beside and not yet renamed
            whole(handle)
            count[0] += 1
            if count[0] == 2 * die_in_save - 1:  # each save flushes its file, then its folder
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
    fit(Adversary(), Points(pause=pause), replace(CONFIG, steps=steps), folder)


def start(folder: Path, steps: int, pause: float = 0.0, die_in_save: int = 0) -> subprocess.Popen:
    code = f"from tests.test_train_loop import child; child({str(folder)!r}, {steps}, {pause}, {die_in_save})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)


def test_killed_at_three_random_steps_it_ends_bit_for_bit_the_same(tmp_path):
    steps = 30
    straight = fit(Adversary(), Points(), replace(CONFIG, steps=steps), tmp_path / "straight")
    folder = tmp_path / "killed"
    kills = sorted(np.random.default_rng().choice(np.arange(2, steps - 4), 3, replace=False))
    for step in kills:
        process = start(folder, steps, pause=0.03)
        while not logs.read_log(folder) or logs.read_log(folder)[-1]["step"] < step:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    resumed = fit(Adversary(), Points(), replace(CONFIG, steps=steps), folder)
    assert_same(everything(straight), everything(resumed))
    assert [line["step"] for line in log_lines(folder)] == list(range(1, steps + 1))
    assert [line["loss"] for line in log_lines(folder)] == [line["loss"] for line in log_lines(tmp_path / "straight")]


def test_killed_while_it_saves_the_checkpoint_before_is_there(tmp_path, caplog):
    process = start(tmp_path, 6, die_in_save=2)
    assert process.wait() == -signal.SIGKILL
    assert checkpoints.step_of(tmp_path / "state.safetensors") == 2 and list(tmp_path.glob(".*part"))
    with caplog.at_level(logging.INFO):
        resumed = fit(Adversary(), Points(), CONFIG, tmp_path)
    assert "took over the folder of process" in caplog.text and "at step 2" in caplog.text
    assert not list(tmp_path.glob(".*part"))
    assert_same(everything(resumed), everything(fit(Adversary(), Points(), CONFIG, tmp_path / "straight")))


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path):
    """A fused optimiser would mix up numbers where a resumed moment has another memory order."""

    class Pictures:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

        def loss(self, batch, generator):
            error = self.network(torch.randn(2, 3, 5, 5, generator=generator)).square().mean()
            return error, {}

    straight = fit(Pictures(), Points(), CONFIG, tmp_path / "straight")
    fit(Pictures(), Points(), replace(CONFIG, steps=3), tmp_path)
    assert_same(everything(straight), everything(fit(Pictures(), Points(), CONFIG, tmp_path)))


def test_old_checkpoints_are_kept_and_stand_in_for_a_damaged_one(tmp_path, caplog):
    config = replace(CONFIG, steps=10, keep=2)
    fit(Regression(), Points(), config, tmp_path)
    names = ["state-000006.safetensors", "state-000008.safetensors", "state.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("state*")) == names
    assert [checkpoints.step_of(tmp_path / name) for name in names] == [6, 8, 10]
    (tmp_path / "state.safetensors").write_bytes(b"half")
    resumed = fit(Regression(), Points(), config, tmp_path)
    assert "state.safetensors cannot be read" in caplog.text
    assert_same(everything(resumed), everything(fit(Regression(), Points(), config, tmp_path / "straight")))
    for path in tmp_path.glob("state*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 3 checkpoints can be read"):
        fit(Regression(), Points(), config, tmp_path)


def test_no_old_checkpoint_is_kept_where_none_is_wanted(tmp_path):
    fit(Regression(), Points(), replace(CONFIG, keep=0), tmp_path)
    assert [path.name for path in tmp_path.glob("state*")] == ["state.safetensors"]


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (Regression, {"seed": 5}, "seed was 0, is 5"),
        (Regression, {"batch_size": 8}, "examples_per_step was 4, is 8"),
        (lambda: Regression(width=8), {}, r"shape, first model.0.weight: \(16, 2\) there, \(8, 2\) here"),
        (lambda: Regression(norm=False), {}, "6 parameters differ, first model.1.bias"),
    ],
)
def test_another_run_does_not_go_on_from_a_checkpoint(tmp_path, objective, changes, message):
    fit(Regression(), Points(), CONFIG, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        fit(objective(), Points(), replace(CONFIG, steps=8, **changes), tmp_path)
    assert "\n" not in str(caught.value)


def test_what_may_change_is_told_in_one_line(tmp_path, caplog):
    fit(Regression(), Points(), CONFIG, tmp_path)
    changed = replace(CONFIG, steps=8, lr=2e-2, batch_size=2, accumulate=2)
    assert fit(Regression(), Points(), changed, tmp_path).step == 8
    assert [m for m in caplog.messages if "config" in m] == ["resumed with another config: lr was 0.01, is 0.02"]


def test_a_step_that_is_not_finite_is_skipped_counted_and_kept(tmp_path):
    points = Points(broken=(2,))
    state = fit(Regression(norm=False), points, replace(CONFIG, steps=3), tmp_path)
    before = fit(Regression(norm=False), Points(), replace(CONFIG, steps=2), tmp_path / "before")
    assert (state.step, state.skipped, state.skipped_in_row) == (3, 1, 1)
    assert_same(everything(state), everything(before))
    tensors, facts = load_safetensors(tmp_path / "bad-step-2.safetensors")
    assert torch.equal(points.x[tensors["0.indices"]], tensors["0.x"]) and tensors["0.y"].isnan().all()
    assert json.loads(facts["0.captions"])[0] == f"point {int(tensors['0.indices'][0])}"
    after = fit(Regression(norm=False), Points(), replace(CONFIG, steps=4), tmp_path)
    assert (after.skipped, after.skipped_in_row) == (1, 0) and log_lines(tmp_path)[-1]["skipped"] == 1


def test_a_skipped_step_leaves_no_trace_in_a_batch_norm(tmp_path):
    class Broken(Regression):
        def loss(self, batch, generator):
            return super().loss(batch | {"x": batch["x"] * (math.nan if self.asked else 1.0)}, generator)

    objective = Broken()
    objective.begin_step = lambda step: setattr(objective, "asked", step == 1)
    fit(objective, Points(), replace(CONFIG, steps=1), tmp_path)
    mean = objective.network[1].running_mean.clone()
    assert fit(objective, Points(), replace(CONFIG, steps=2), tmp_path).skipped == 1
    assert torch.equal(objective.network[1].running_mean, mean) and objective.network[1].num_batches_tracked == 1


def test_a_run_begins_with_weights_that_lie_there(tmp_path):
    given = {name: value + 1 for name, value in Regression(norm=False).network.named_parameters()}
    tensors = {f"{kind}.{name}": value.detach().clone() for kind in ("model", "ema") for name, value in given.items()}
    save_safetensors(tmp_path / "state.safetensors", tensors, {"step": "0", "from": "elsewhere"})
    state = fit(Regression(norm=False), Points(), replace(CONFIG, steps=0), tmp_path)
    assert_same(dict(state.parameters), given)
    assert_same(state.ema, given)


def test_checkpoints_of_the_first_loop_are_compared_as_well():
    stored = {"batch_size": 16, "accumulate": 2, "seed": 0, "lr": 1e-2, "save_every": 200}
    assert config.differences(stored, replace(CONFIG, batch_size=32), 1) == ([], [])
    assert config.differences(stored, CONFIG, 1) == (["examples_per_step was 32, is 4"], [])
    assert config.differences(stored, CONFIG, 8) == ([], [])


def test_steps_that_stay_broken_end_the_run_in_one_line(tmp_path):
    config = replace(CONFIG, steps=20, nan_patience=3)
    with pytest.raises(guards.NotFiniteError, match="for 3 steps in a row") as caught:
        fit(Regression(), Points(broken=(1, 4, 5, 6)), config, tmp_path)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)
    assert sorted(path.name for path in tmp_path.glob("bad*")) == [f"bad-step-{n}.safetensors" for n in (1, 4, 5, 6)]
    assert not guards.is_locked(tmp_path)


def test_a_full_disk_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
    whole, calls = sys.modules["sfumato.weights.files"].save_file, []

    def save_file(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a file")
            raise SafetensorError("No space left on device")
        whole(tensors, path, metadata)
        if len(calls) == 3:
            assert checkpoints.step_of(tmp_path / "state.safetensors") == 2

    monkeypatch.setattr("sfumato.weights.files.save_file", save_file)
    saved = []
    state = fit(Regression(), Points(), CONFIG, tmp_path, on_save=lambda state: saved.append(state.step))
    assert (state.step, saved, len(calls)) == (6, [2, 6], 3)
    assert "step 4 could not be saved, the checkpoint before stays" in caplog.text
    monkeypatch.setattr(Path, "open", lambda *args, **options: (_ for _ in ()).throw(OSError(28, "No space left")))
    log = logs.RunLog(tmp_path, 6, 0)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 1.0})
    log.close()
    assert caplog.text.count("log.jsonl cannot be written") == 1


def test_two_runs_in_one_folder(tmp_path):
    lock = guards.Lock(tmp_path)
    lock.take()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on {socket.gethostname()} trains there already"):
        fit(Regression(), Points(), CONFIG, tmp_path)
    assert guards.is_locked(tmp_path)
    lock.release()
    assert fit(Regression(), Points(), CONFIG, tmp_path).step == 6 and not guards.is_locked(tmp_path)


def test_the_lock_of_another_machine_is_taken_when_it_is_old(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text('{"pid": 1, "host": "elsewhere"}')
    assert guards.is_locked(tmp_path)
    with pytest.raises(ValueError, match="process 1 on elsewhere trains there already"):
        guards.Lock(tmp_path).take()
    os.utime(path, (0, time.time() - 2 * guards.STALE_AFTER))
    assert not guards.is_locked(tmp_path)
    lock = guards.Lock(tmp_path)
    lock.take()
    os.utime(path, (0, 0))
    lock.touch()
    assert time.time() - path.stat().st_mtime < 60
    lock.release()


def test_a_folder_that_cannot_hold_a_run_is_told_before_the_first_step(tmp_path, monkeypatch):
    points = Points()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file': cannot be written to"):
        fit(Regression(), points, CONFIG, tmp_path / "file")
    with monkeypatch.context() as patch:  # root may write into what is read-only for others
        error = OSError(30, "Read-only file system")
        patch.setattr(guards.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\)"):
            fit(Regression(), points, CONFIG, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda folder: usage(100, 100, 10))
    with pytest.raises(ValueError, match="a checkpoint takes 0.00 GiB, the disk has 0.00 GiB left"):
        fit(Regression(), points, CONFIG, tmp_path)
    assert points.asked == 0


@pytest.mark.parametrize("length", [1, 3])
def test_a_set_smaller_than_a_batch_works(tmp_path, length, caplog):
    assert fit(Regression(), Points(length), CONFIG, tmp_path).skipped == 0
    assert f"a step takes 4 examples, the set has {length}" in caplog.text


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data: the set is empty"):
        fit(Regression(), Points(0), CONFIG, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "stairs"}, "decay='stairs': one of constant, cosine, linear"),
        ({"precision": "fp8"}, "precision='fp8': one of fp32, bf16, fp16"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"batch_size": 0}, "batch_size=0: 1 or more"),
        ({"lr": math.nan}, "lr=nan: a number above 0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_learning_rates():
    config = LoopConfig(steps=100, batch_size=1, lr=1.0, warmup=10, decay="linear", critic_lr=0.5)
    assert config.lr_at(0) == pytest.approx(0.1) and config.lr_at(50) == pytest.approx(0.55)
    assert config.lr_at(99) == pytest.approx(0.109) and config.critic_lr_at(50) == pytest.approx(0.275)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_masters_whole_and_resumes(tmp_path, precision):
    config = replace(CONFIG, precision=precision, steps=80, checkpoint_every=40)
    objective = Regression(noise=0.0, dropout=0.0)
    seen = []
    objective.network.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    state = fit(objective, Points(), config, tmp_path)
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {value.dtype for name, value in state.tensors().items() if "num_batches" not in name} == {torch.float32}
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    fit(Regression(noise=0.0, dropout=0.0), Points(), replace(config, steps=40), tmp_path / "stopped")
    resumed = fit(Regression(noise=0.0, dropout=0.0), Points(), config, tmp_path / "stopped")
    assert_same(everything(state), everything(resumed))
    assert vars(state.scale) == vars(resumed.scale)


def test_a_float16_overflow_lowers_the_scale_and_is_not_a_bad_step(tmp_path):
    class Steep(Regression):
        def loss(self, batch, generator):
            error, figures = super().loss(batch, generator)
            return 10 * error, figures

    state = fit(Steep(norm=False), Points(), replace(CONFIG, precision="fp16"), tmp_path)
    assert state.overflows > 0 and state.skipped == 0 and not list(tmp_path.glob("bad*"))
    assert state.scale.value == 2.0 ** (16 - state.overflows)
    scale = LossScale()
    for _ in range(LossScale.GROW_AFTER):
        scale.update(overflow=False)
    assert (scale.value, scale.good_steps) == (2.0**17, 0)


def test_network_and_critic_are_trained_each_by_its_own_loss(tmp_path):
    objective, alone = Adversary(), Adversary()
    config = replace(CONFIG, steps=3, critic_lr=5e-3, weight_decay=0.0)
    first = {name: p.clone() for name, p in objective.critic.named_parameters()}
    seen = []

    def on_save(state):
        seen.append(all(torch.equal(p, first[name]) for name, p in objective.critic.named_parameters()))

    state = fit(objective, Points(), config, tmp_path, on_save)
    assert objective.steps == [0, 1, 2] and seen == [True, False]  # after steps 2 and 3
    assert state.critic.optimizer.param_groups[0]["lr"] == 5e-3
    assert all(p.requires_grad for p in objective.critic.parameters())
    alone.critic_loss = lambda batch, generator: (torch.zeros(()), {})
    quiet = fit(alone, Points(), config, tmp_path / "quiet")
    assert_same(dict(state.parameters), dict(quiet.parameters))  # in these steps the critic's loss came after
    line = log_lines(tmp_path)[-1]
    assert {"loss", "error", "critic_loss", "margin", "grad_norm", "critic_grad_norm"} <= line.keys()


def test_accumulated_batches_are_one_batch(tmp_path):
    objectives = [Regression(noise=0.0, dropout=0.0, norm=False) for _ in range(2)]
    one = fit(objectives[0], Points(), replace(CONFIG, batch_size=8), tmp_path / "one")
    two = fit(objectives[1], Points(), replace(CONFIG, accumulate=2), tmp_path / "two")
    for name, parameter in one.parameters.items():
        assert torch.allclose(parameter, two.parameters[name], atol=1e-6)


def test_samples_are_drawn_at_the_start_and_on_a_schedule(tmp_path):
    drawn = []
    plain = fit(Regression(), Points(), CONFIG, tmp_path / "plain")

    def sample(state):
        torch.rand(3)  # must not change the run
        state.network.eval()
        with state.averaged() as network:
            drawn.append((state.step, network[0].weight.detach().clone(), state.ema["0.weight"].clone()))

    state = fit(Regression(), Points(), replace(CONFIG, sample_every=3), tmp_path / "drawn", on_sample=sample)
    assert [step for step, _, _ in drawn] == [0, 3, 6] and all(torch.equal(a, b) for _, a, b in drawn)
    assert_same(everything(plain), everything(state))


def test_random_numbers_of_the_caller_stay_as_they_were(tmp_path):
    objective = Regression()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit(objective, Points(), CONFIG, tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_weights_are_exported(tmp_path):
    state = fit(Regression(), Points(), CONFIG, tmp_path)
    path = tmp_path / "state.safetensors"
    assert_same(ema_weights(path), state.ema)
    assert_same(model_weights(path), {name: p.detach() for name, p in state.parameters.items()})
    export_weights(path, tmp_path / "ema.safetensors", dtype=torch.float16)
    tensors, facts = load_safetensors(tmp_path / "ema.safetensors")
    assert facts == {"step": "6", "weights": "ema"}
    assert_same(tensors, {name: value.half() for name, value in state.ema.items()})
    export_weights(path, tmp_path / "full.safetensors", full=True)
    full, _ = load_safetensors(tmp_path / "full.safetensors")
    assert len(full) == 2 * len(state.ema) and torch.equal(full["model.0.weight"], state.parameters["0.weight"])


def test_eight_bit_moments(tmp_path, monkeypatch):
    config = replace(CONFIG, optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimizer='adamw8bit': needs the package bitsandbytes"):
        fit(Regression(), Points(), config, tmp_path)

    class AdamW8bit(torch.optim.AdamW):  # stands in for the library's, whose moments have names and shapes of their own
        def step(self, closure=None):
            super().step()
            for moments in self.state.values():
                moments["absmax1"] = moments["exp_avg"].abs().max().reshape(1)

    library = ModuleType("bitsandbytes")
    library.optim = SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "bitsandbytes" else None)
    straight = fit(Regression(), Points(), config, tmp_path / "straight")
    fit(Regression(), Points(), replace(config, steps=2), tmp_path)
    resumed = fit(Regression(), Points(), config, tmp_path)
    assert_same(everything(straight), everything(resumed))
    assert "optimizer.absmax1.0.weight" in everything(resumed)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_a_compiled_run_is_the_same_run(tmp_path):
    class Own(nn.Module):  # torch compiles no bare layers of its own
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers(x)

    objectives = [Regression(noise=0.0, dropout=0.0, norm=False) for _ in range(2)]
    for objective in objectives:
        objective.network = nn.ModuleDict({"own": Own(objective.network)})  # is not called itself, as a dict of parts
        objective.loss = lambda batch, generator, own=objective.network["own"]: (
            (own(batch["x"]) - batch["y"]).square().mean(),
            {},
        )
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain = fit(objectives[0], Points(), CONFIG, tmp_path / "plain")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    compiled = fit(objectives[1], Points(), replace(CONFIG, compile=True), tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    for name, parameter in plain.parameters.items():
        assert torch.allclose(parameter, compiled.parameters[name], atol=1e-5)


def test_the_memory_a_run_takes_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        state = fit(Adversary(), Points(), CONFIG, tmp_path)
    network = sum(p.numel() for p in state.parameters.values())
    own = network + sum(p.numel() for p in state.critic.parameters.values())
    line, num_bytes = logs.memory_line(state)
    assert num_bytes == 4 * (3 * own + network)
    assert line in caplog.messages
    told = [message for message in caplog.messages if "activations of a batch of 4" in message]
    assert len(told) == 1 and caplog.messages.index(line) < caplog.messages.index(told[0])


def test_activations_are_counted_once_each():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    state = State(network, CONFIG)
    saved = logs.SavedActivations(state)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda value: value):
        network(torch.randn(5, 4))
    assert saved.num_bytes == 4 * 5 * (4 + 8)  # the input, and what the ReLU gave, which two layers keep


def test_half_a_line_of_the_log_is_no_reason_to_stop(tmp_path):
    fit(Regression(), Points(), replace(CONFIG, steps=2), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    fit(Regression(), Points(), replace(CONFIG, steps=4), tmp_path)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"lr", "per_second", "eta", "skipped", "overflows"} <= lines[-1].keys() and lines[-1]["eta"] == 0


def test_tensorboard_gets_the_figures_where_it_is_there(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    fit(Regression(), Points(), CONFIG, tmp_path)
    assert written[0] == str(tmp_path / "tensorboard") and written[-1] == "closed" and ("loss", 6) in written


def test_status(tmp_path, capsys):
    fit(Regression(), Points(broken=(3,)), replace(CONFIG, steps=5), tmp_path)
    assert main(["train", "status", str(tmp_path)]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "not running" in told["run"] and told["step"].strip() == "5 of 5 (100%)"
    assert told["skipped steps"].strip().startswith("1 not finite")
    assert "state.safetensors, step 5, 00:00:0" in told["last checkpoint"]
    losses = [line["loss"] for line in log_lines(tmp_path) if line["loss"] is not None]
    assert len(losses) == 4
    assert float(told["loss of late"]) == pytest.approx(np.mean(losses), rel=1e-3)
    lock = guards.Lock(tmp_path)
    lock.take()
    assert main(["train", "status", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["running"] and facts["owner"]["pid"] == os.getpid() and facts["checkpoint_step"] == 5
    lock.release()
    assert main(["train", "status", str(tmp_path / "none")]) == 2
    assert "no training run there" in capsys.readouterr().err


def golden(folder: Path) -> list[float]:
    config = LoopConfig(steps=50, batch_size=8, lr=1e-2, warmup=5, decay="cosine", log_every=1, accumulate=2)
    fit(Regression(dropout=0.0, norm=False), Points(), config, folder)
    return [line["loss"] for line in log_lines(folder)]


def test_golden_loss_curve(tmp_path):
    assert golden(tmp_path) == pytest.approx(GOLDEN, abs=1e-4)


def test_parts_learn_at_rates_of_their_own_and_resume_bit_for_bit(tmp_path):
    """Adam's first step has the length of the rate, whatever the gradient."""
    one = replace(CONFIG, steps=1, warmup=0, weight_decay=0.0)
    before = {name: value.clone() for name, value in Regression().network.named_parameters()}
    plain = fit(Regression(), Points(), one, tmp_path / "plain").parameters
    slow = fit(Regression(), Points(), replace(one, part_lr={"4": one.lr / 8}), tmp_path / "slow").parameters
    for name, start in before.items():
        ratio = 8 if name.startswith("4") else 1
        assert torch.allclose((slow[name] - start) * ratio, plain[name] - start, rtol=1e-3, atol=1e-7), name
        assert not torch.equal(slow[name], start)
    assert torch.equal(slow["0.weight"], plain["0.weight"])

    config = replace(CONFIG, part_lr={"4": 1e-3, "4.bias": 5e-2})
    assert (config.share_of("4.weight"), config.share_of("4.bias"), config.share_of("0.bias")) == (0.1, 5.0, 1.0)
    straight = fit(Adversary(), Points(), config, tmp_path / "straight")
    fit(Adversary(), Points(), replace(config, steps=2), tmp_path / "resumed")
    resumed = fit(Adversary(), Points(), config, tmp_path / "resumed")
    assert_same(everything(straight), everything(resumed))
    other = fit(Adversary(), Points(), replace(config, part_lr={}), tmp_path / "other")
    assert not torch.equal(everything(other)["model.4.bias"], everything(straight)["model.4.bias"])


def test_the_rates_of_parts_are_in_the_checkpoint_and_a_change_is_told(tmp_path, caplog):
    fit(Regression(), Points(), replace(CONFIG, steps=1, part_lr={"4": 1e-3}), tmp_path)
    fit(Regression(), Points(), replace(CONFIG, steps=2, part_lr={"4": 1e-3}), tmp_path)
    assert "part_lr" not in caplog.text
    fit(Regression(), Points(), replace(CONFIG, steps=3), tmp_path)
    assert "part_lr was {'4': 0.001}, is {}" in caplog.text


@pytest.mark.parametrize(
    ("rates", "message"),
    [({"text": 1e-3}, "part_lr='text': nothing that is trained .*there are 0, 1, 4"), ({"4": 0.0}, "above 0"),
     ({"": 1.0}, "names, and for each")],
)  # fmt: skip
def test_rates_of_nothing_are_refused(tmp_path, rates, message):
    with pytest.raises(ValueError, match=message):
        fit(Regression(), Points(), replace(CONFIG, part_lr=rates), tmp_path)
