"""Two ranks on gloo, started as torchrun starts them: what they share, and that their runs equal those of one rank.

All that two ranks do is done by one pair of processes (`work`), for starting them takes longest.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sfumato.train import distributed, loop
from sfumato.train.checkpoints import load_tensors, read_facts, step_of
from sfumato.train.data import indices_at
from sfumato.train.distributed import Ranks, gather, joined, own_rows
from sfumato.train.loop import State, ema_weights, fit, model_weights

from .ranks import on_two_ranks
from .test_train import Latents, diffusion
from .test_train_loop import CONFIG, Adversary, Points, Regression, everything, log_lines

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHARDED = replace(CONFIG, shard=True, batch_size=2)


def plain() -> Regression:
    """Its loss is a function of the batch alone: neither noise nor dropout nor norms over the batch."""
    return Regression(noise=0.0, dropout=0.0, norm=False)


class Blocks(Regression):
    """A network with a list of blocks, which are gathered one at a time."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, norm=False)
        blocks = [nn.Linear(16, 16) for _ in range(2)]
        self.network = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 16), *blocks, nn.Linear(16, 2))})

    def loss(self, batch, generator):
        noise = self.noise * torch.randn(batch["x"].shape, generator=generator)
        error = (self.network["body"](batch["x"] + noise) - batch["y"]).square().mean()
        return error, {"error": error}


class Pairs:
    """Matches rows of two linear maps over the whole batch, as CLIP does; `gathered` False: over the own rows only.

    Its temperature is a single number, which cannot be spread over ranks.
    """

    def __init__(self, gathered: bool = True) -> None:
        torch.manual_seed(1)
        self.network = nn.ModuleDict({key: nn.Linear(2, 4, bias=False) for key in ("one", "other")})
        self.network.register_parameter("scale", nn.Parameter(torch.tensor(0.5)))
        self.gathered = gathered

    def loss(self, batch, generator):
        one, other = self.network["one"](batch["x"]), self.network["other"](batch["y"])
        if self.gathered:
            one, other = gather(one), gather(other)
        logits = self.network.scale.exp() * one @ other.T
        error = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        return error, {"contrastive": error}


class BrokenOnOneRank(Regression):
    """Its loss is NaN at the second step of rank 1."""

    def begin_step(self, step: int) -> None:
        self.step = step

    def loss(self, batch, generator):
        error, figures = super().loss(batch, generator)
        broken = self.step == 1 and own_rows(1).start == 1
        return error * (float("nan") if broken else 1.0), figures


class Stopped(Regression):
    """The second rank is asked to stop in its third step."""

    def begin_step(self, step: int) -> None:
        if step == 2 and own_rows(1).start == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def work(folder: Path) -> None:
    """What each of two ranks does."""
    torch.set_num_threads(1)
    half = replace(CONFIG, batch_size=2)
    with joined(CPU) as ranks:
        one_of_four = torch.arange(2.0) + 2 * ranks.rank
        facts = {
            "any": ranks.any(ranks.rank == 1, False),
            "mean": ranks.mean({"rank": float(ranks.rank)}),
            "gathered": gather(one_of_four).tolist(),
        }
        try:
            ranks.first_does(lambda: (_ for _ in ()).throw(OSError("disk full")))
        except OSError as error:
            facts["error"] = str(error)
        (folder / f"facts-{ranks.rank}.json").write_text(json.dumps(facts))

        fit(plain(), Points(), half, folder / "plain")
        fit(plain(), Points(), replace(half, accumulate=2), folder / "accumulated")
        fit(Regression(norm=False), Points(), half, folder / "random")
        fit(diffusion(), Latents(), half, folder / "diffusion")
        fit(Pairs(), Points(), half, folder / "pairs")
        fit(Pairs(), Points(), replace(SHARDED, clip_norm=0.1), folder / "sharded pairs")
        fit(Pairs(gathered=False), Points(), half, folder / "own pairs")
        fit(Adversary(), Points(), half, folder / "adversary")
        state = fit(BrokenOnOneRank(norm=False), Points(), half, folder / "broken")
        (folder / f"broken-{ranks.rank}").write_text(f"{state.skipped} {bool(state.ema)}")
        fit(plain(), Points(), half, folder / "resumed")  # begun by one rank
        try:
            fit(Stopped(), Points(), replace(half, checkpoint_every=100), folder / "stopped")
        except KeyboardInterrupt:
            (folder / f"stopped-{ranks.rank}").touch()

        fit(plain(), Points(), SHARDED, folder / "sharded")
        fit(diffusion(), Latents(), SHARDED, folder / "sharded diffusion")
        fit(plain(), Points(), replace(SHARDED, steps=4), folder / "2 to 1")
        fit(plain(), Points(), SHARDED, folder / "1 to 2")  # begun by one rank
        fit(plain(), Points(), SHARDED, folder / "file to shards")
        loop.spread = partial(distributed.spread, block=200)  # the blocks of this test are shards of their own
        state = fit(Blocks(), Points(), replace(SHARDED, accumulate=2), folder / "blocks")
        block = state.network["body"][1].weight
        (folder / f"share-{ranks.rank}").write_text(str(tuple(block.to_local().shape)))
        (folder / f"done-{ranks.rank}").touch()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder in which two ranks have worked. The runs that one rank begins are begun here."""
    folder = tmp_path_factory.mktemp("runs")
    fit(plain(), Points(), replace(CONFIG, steps=4), folder / "resumed")
    fit(plain(), Points(), replace(CONFIG, steps=4), folder / "file to shards")
    fit(plain(), Points(), replace(CONFIG, steps=4, shard=True), folder / "1 to 2")
    code = f"from pathlib import Path; from tests.test_train_distributed import work; work(Path({str(folder)!r}))"
    on_two_ranks(code, folder)
    return folder


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=0, atol=atol), name


def newest(folder: Path) -> Path:
    found = max((path for path in folder.glob("state*")), key=lambda path: step_of(path))
    assert step_of(found) == CONFIG.steps
    return found


def assert_equals_one_rank(run: Path, state: State) -> None:
    """Parameters, averages and moments of a run of two ranks are those of one rank."""
    tensors, _ = load_tensors(newest(run))
    assert_close(tensors, everything(state))


def test_what_ranks_tell_each_other(runs):
    for rank in range(2):
        facts = json.loads((runs / f"facts-{rank}.json").read_text())
        assert facts["any"] == [True, False] and facts["mean"] == {"rank": 0.5}
        assert facts["gathered"] == [0.0, 1.0, 2.0, 3.0]
        assert facts["error"] == ("disk full" if rank == 0 else "rank 0: disk full")


@pytest.mark.parametrize(("name", "changes"), [("plain", {}), ("accumulated", {"accumulate": 2})])
def test_two_ranks_equal_one_with_twice_the_batch(runs, tmp_path, name, changes):
    state = fit(plain(), Points(), replace(CONFIG, **changes), tmp_path)
    assert_equals_one_rank(runs / name, state)
    losses = [[line["loss"] for line in log_lines(folder)] for folder in (runs / name, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("name", ["random", "diffusion", "sharded diffusion"])
def test_two_ranks_equal_one_that_accumulates_also_in_their_random_numbers(runs, tmp_path, name):
    objective, examples = (diffusion(), Latents()) if "diffusion" in name else (Regression(norm=False), Points())
    state = fit(objective, examples, replace(CONFIG, batch_size=2, accumulate=2), tmp_path)
    assert_equals_one_rank(runs / name, state)


def test_a_loss_of_the_whole_batch_is_gathered(runs, tmp_path):
    state = fit(Pairs(), Points(), CONFIG, tmp_path)
    assert_equals_one_rank(runs / "pairs", state)
    clipped = fit(Pairs(), Points(), replace(CONFIG, clip_norm=0.1), tmp_path / "clipped")
    assert_equals_one_rank(runs / "sharded pairs", clipped)
    apart = model_weights(newest(runs / "own pairs"))
    assert any((apart[name] - p).abs().max() > 1e-3 for name, p in state.parameters.items())


def test_a_critic_is_trained_on_all_ranks(runs, tmp_path):
    facts = read_facts(newest(runs / "adversary"))
    tensors, _ = load_tensors(newest(runs / "adversary"))
    first = Adversary().critic[0].weight
    assert json.loads(facts["counts"])["skipped"] == 0
    assert (tensors["critic.model.0.weight"] - first).abs().max() > 1e-3
    assert tensors["critic.optimizer.step.0.weight"] == CONFIG.steps - 2  # it waits for two steps


def test_all_ranks_skip_a_step_that_is_broken_on_one(runs):
    assert [(runs / f"broken-{rank}").read_text() for rank in range(2)] == ["1 True", "1 False"]  # EMA on rank 0
    assert len(list((runs / "broken").glob("bad-step-1*"))) == 2
    assert [line["skipped"] for line in log_lines(runs / "broken")] == [0, 1, 1, 1, 1, 1]


def test_ranks_stop_together(runs):
    assert (runs / "stopped-0").exists() and (runs / "stopped-1").exists()
    assert step_of(runs / "stopped" / "state.safetensors") == 3


def test_a_run_goes_on_with_more_ranks(runs, tmp_path):
    assert_equals_one_rank(runs / "resumed", fit(plain(), Points(), CONFIG, tmp_path))


@pytest.mark.parametrize("name", ["sharded", "1 to 2", "file to shards"])
def test_shards_equal_one_rank(runs, tmp_path, name):
    assert newest(runs / name).is_dir()
    assert_equals_one_rank(runs / name, fit(plain(), Points(), CONFIG, tmp_path))


@pytest.mark.parametrize("shard", [True, False])
def test_shards_of_two_ranks_go_on_with_one(runs, tmp_path, shard):
    shutil.copytree(runs / "2 to 1", tmp_path / "run")
    assert step_of(tmp_path / "run" / "state-000004") == 4
    fit(plain(), Points(), replace(CONFIG, shard=shard), tmp_path / "run")
    assert newest(tmp_path / "run").is_dir() == shard
    assert_equals_one_rank(tmp_path / "run", fit(plain(), Points(), CONFIG, tmp_path / "straight"))


def test_a_block_is_a_shard_of_its_own(runs, tmp_path):
    assert [(runs / f"share-{rank}").read_text() for rank in range(2)] == ["(8, 16)", "(8, 16)"]
    state = fit(Blocks(), Points(), replace(CONFIG, batch_size=2, accumulate=4), tmp_path)
    assert_close(model_weights(newest(runs / "blocks")), {n: p.detach() for n, p in state.parameters.items()})
    assert_close(ema_weights(newest(runs / "blocks")), state.ema)


def test_shards_are_kept_swept_and_stand_in_for_one_another(tmp_path, caplog):
    config = replace(CONFIG, shard=True, keep=1)
    fit(plain(), Points(), config, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state-000004", "state-000006"]
    (tmp_path / "state-000006" / ".metadata").unlink()
    (tmp_path / ".state-000008.part").mkdir()
    with caplog.at_level(logging.WARNING):
        again = fit(plain(), Points(), config, tmp_path)
    assert "state-000006 cannot be read" in caplog.text and not list(tmp_path.glob(".*part"))
    assert_close(load_tensors(tmp_path / "state-000006")[0], everything(fit(plain(), Points(), CONFIG, tmp_path / "s")))
    assert again.step == 6 and not dist.is_initialized()


def test_gathering_without_ranks_is_nothing():
    rows = torch.randn(2, 3)
    assert gather(rows) is rows and own_rows(2) == slice(0, 2)
    assert Ranks().any(True, False) == [True, False] and Ranks().mean({"a": 1.0}) == {"a": 1.0}


def test_ranks_take_turns_through_every_epoch():
    shares = [indices_at(2 * step + rank, 3, 24, 0) for step in range(4) for rank in range(2)]
    assert sorted(sum(shares, [])) == list(range(24))
    assert sum(shares[:2], []) == indices_at(0, 6, 24, 0)
