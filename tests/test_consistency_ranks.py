"""Consistency distillation on two gloo ranks, as torchrun starts them: the result is that of one rank that takes twice
the batch in two parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.cli.main import main
from sfumato.train.config import LoopConfig
from sfumato.train.consistency import LCM_LORA, ConsistencyConfig, distil
from sfumato.train.data import CachedLatents
from sfumato.train.data.latents import fingerprint
from sfumato.train.distributed import joined
from sfumato.weights.checkpoint import load_model
from sfumato.weights.files import open_tensors
from tests.adapters import checkpoint_of, model_of
from tests.ranks import on_two_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = LoopConfig(3, 1, 1e-3, 1, ema_decay=0.5, weight_decay=0.0, checkpoint_every=2)
SMALL = replace(LCM_LORA, rank=2, alpha=2.0)
RUNS = {"adapter": SMALL, "whole": None}


def distilled(name: str, ckpt: Path, latents: Path, folder: Path, ranks: int, accumulate: int) -> Path:
    loop = replace(LOOP, accumulate=accumulate)
    examples = CachedLatents([latents]).in_batches(ranks, loop.seed)
    return distil(load_model(ckpt), examples, folder / name, "quick", loop, ConsistencyConfig(guidance=3.0), RUNS[name])


def flags_of(ckpt: Path, latents: Path, out: Path) -> list[str]:
    place = ["--ckpt", str(ckpt), "--latents", str(latents), "--out", str(out), "--device", "cpu"]
    return ["train", "consistency", *place, "--steps", "2", "--batch", "1", "--rank", "2", "--save-dtype", "fp32"]


def work(ckpt: Path, latents: Path, folder: Path) -> None:
    """What each of two ranks does."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        for name in RUNS:
            distilled(name, ckpt, latents, folder, 2, 1)
        assert main(flags_of(ckpt, latents, folder / "cli")) == 0
        (folder / f"done-{ranks.rank}").touch()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(checkpoint_of("sd1"), tmp_path_factory.mktemp("ckpt") / "sd1.safetensors"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    mean = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = [f"picture {index}" for index in range(8)]
    CachedLatents.write(path, mean, 0.01 * torch.ones_like(mean), captions, fingerprint(model_of("sd1").autoencoder))
    return path


@pytest.fixture(scope="module")
def runs(ckpt: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have worked."""
    folder = tmp_path_factory.mktemp("runs")
    given = ", ".join(f"Path({str(path)!r})" for path in (ckpt, latents, folder))
    on_two_ranks(f"from pathlib import Path; from tests.test_consistency_ranks import work\nwork({given})\n", folder)
    return folder


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.read(name).float().clone() for name in file.names()}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_with_twice_the_batch(
    name: str, ckpt: Path, latents: Path, runs: Path, tmp_path: Path
) -> None:
    path = distilled(name, ckpt, latents, tmp_path, 1, 2)
    one, two = tensors_of(path), tensors_of(runs / path.relative_to(tmp_path))
    half = tensors_of(distilled(name, ckpt, latents, tmp_path / "half", 1, 1))
    assert one.keys() == two.keys() and len(one) > 1
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=0, atol=1e-5), key
    assert any(not torch.allclose(half[key], two[key], rtol=0, atol=1e-5) for key in half), "half gives another result"


def test_the_command_takes_the_batch_of_all_ranks(ckpt: Path, latents: Path, runs: Path, tmp_path: Path) -> None:
    assert main([*flags_of(ckpt, latents, tmp_path / "cli"), "--accumulate", "2"]) == 0
    one, two = (tensors_of(folder / "cli" / "cli.safetensors") for folder in (tmp_path, runs))
    assert all(torch.allclose(value, two[key], rtol=0, atol=1e-5) for key, value in one.items())


def test_one_rank_writes(runs: Path) -> None:
    written = {path.relative_to(runs).as_posix() for path in runs.rglob("*") if path.is_file()}
    assert {"adapter/quick.safetensors", "adapter/trainer.json", "whole/quick.safetensors"} <= written
    assert not [name for name in written if ".part" in name]


def test_it_does_not_lie_in_shards(ckpt: Path, latents: Path, tmp_path: Path) -> None:
    examples = CachedLatents([latents]).in_batches(1, 0)
    with pytest.raises(ValueError, match="^shard=True"):
        distil(load_model(ckpt), examples, tmp_path, "quick", replace(LOOP, shard=True), ConsistencyConfig(), SMALL)
