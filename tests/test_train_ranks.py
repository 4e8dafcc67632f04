"""The trainers beside `diffusion` on two gloo ranks, as torchrun starts them: their results are those of one rank that
takes twice the batch in two parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.cli.main import main
from sfumato.families import Model
from sfumato.train import personal
from sfumato.train.data import open_pictures
from sfumato.train.diffusion import DiffusionConfig
from sfumato.train.distributed import joined
from sfumato.train.dreambooth import PriorConfig
from sfumato.train.inversion import InversionConfig
from sfumato.train.loop import LoopConfig
from sfumato.train.lora import LoRAConfig
from sfumato.train.personal import Prior, Ready, Setup
from sfumato.train.samples import Watched
from sfumato.train.views import Captioned, Shown
from sfumato.weights.checkpoint import load_model
from sfumato.weights.files import open_tensors
from tests.adapters import checkpoint_of
from tests.ranks import on_two_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoRAConfig("locon", 2, 2.0, ("linear", "conv"))


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)


FLAGS = ["--size", "64", "--steps", "2", "--batch", "1", "--device", "cpu"]


def sharded(ckpt: str, data: Path, folder: Path, accumulate: int) -> list[str]:
    """The command that trains a U-Net of which each rank holds a part."""
    place = ["--ckpt", ckpt, "--data", str(data), "--out", str(folder / "sharded")]
    return [
        "train",
        "diffusion",
        *place,
        *FLAGS,
        "--shard",
        "--accumulate",
        str(accumulate),
        "--lr",
        "1e-3",
        "--warmup",
        "1",
    ]


# The family's name, and what makes the trainer ready. XL's text encoders have layers that nothing reads.
TRAINERS: dict[str, tuple[str, Callable[[Setup], Ready]]] = {
    "lora": ("sd1", lambda setup: personal.lora(setup, LORA)),
    "text": ("xl", lambda setup: personal.lora(setup, LoRAConfig(rank=2, train_text=True))),
    "prior": ("sd1", lambda setup: personal.lora(setup, LORA, Prior(PriorConfig("a bird", 3), steps=1))),
    "dreambooth": ("sd1", personal.dreambooth),
    "word": ("xl", lambda setup: personal.textual_inversion(setup, InversionConfig("zyx", "red", 1))),
    "hypernetwork": ("sd1", personal.hypernetwork),
    "control": ("sd1", lambda setup: personal.controlnet(setup, grey, "grey")),
}


def trained(name: str, ckpt: Path, data: Path, folder: Path, accumulate: int) -> Path:
    model: Model = load_model(ckpt)
    pictures = Captioned(open_pictures(data, need_captions=False), "a photo of sks owl")
    config = LoopConfig(
        4, 1, 1e-3, 1, accumulate=accumulate, ema_decay=0.5, weight_decay=0.0, checkpoint_every=3, sample_every=4
    )
    watched = Watched(("an owl",), steps=1) if name in ("lora", "control") else None
    setup = Setup(model, pictures, Shown(64), config, DiffusionConfig(0.0), folder / name, "owl", watched)
    with joined(torch.device("cpu")):
        return personal.run(TRAINERS[name][1](setup), setup)


def work(data: Path, folder: Path, ckpts: dict[str, str]) -> None:
    """What each of two ranks does."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        for name, (family, _) in TRAINERS.items():
            trained(name, Path(ckpts[family]), data, folder, 1)
        place = ["--ckpt", ckpts["sd1"], "--data", str(data), "--out", str(folder / "cli"), "--rank", "2"]
        assert main(["train", "lora", *place, *FLAGS, "--caption", "an owl"]) == 0
        assert main(sharded(ckpts["sd1"], data, folder, 1)) == 0
        (folder / f"done-{ranks.rank}").touch()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("an owl")
    return folder


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("ckpts")
    return {name: str(shutil.copy(checkpoint_of(name), place / f"{name}.safetensors")) for name in ("sd1", "xl")}


@pytest.fixture(scope="module")
def runs(data: Path, ckpts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have worked."""
    folder = tmp_path_factory.mktemp("runs")
    code = (
        "from pathlib import Path; from tests.test_train_ranks import work\n"
        f"work(Path({str(data)!r}), Path({str(folder)!r}), {ckpts!r})\n"
    )
    on_two_ranks(code, folder)
    return folder


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.read(name).float().clone() for name in file.names()}


@pytest.mark.parametrize("name", TRAINERS)
def test_two_ranks_equal_one_with_twice_the_batch(name, runs, data, ckpts, tmp_path):
    ckpt = Path(ckpts[TRAINERS[name][0]])
    path = trained(name, ckpt, data, tmp_path, 2)
    one, two = tensors_of(path), tensors_of(runs / path.relative_to(tmp_path))
    assert one.keys() == two.keys() and len(one) >= 1
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=0, atol=1e-5), key
    if name == "lora":
        up = next(key for key in one if key.endswith("lora_up.weight"))
        assert one[up].abs().max() > 1e-3, "it learned something"
        half = tensors_of(trained(name, ckpt, data, tmp_path / "half", 1))
        assert not torch.allclose(half[up], two[up], rtol=0, atol=1e-5), "and half of the batch gives another result"


def test_one_rank_writes(runs):
    written = {path.relative_to(runs).as_posix() for path in runs.rglob("*") if path.is_file()}
    assert {"lora/owl.safetensors", "lora/samples-000004.png", "lora/trainer.json", "control/hint.png"} <= written
    assert {f"prior/class/{index:05}.png" for index in range(3)} <= written
    assert not [name for name in written if ".part" in name]
    assert "cli/cli.safetensors" in written


def test_a_sharded_unet_is_trained_as_a_whole_one(runs, data, ckpts, tmp_path):
    assert main(sharded(ckpts["sd1"], data, tmp_path, 2)) == 0
    (path,) = (tmp_path / "sharded").glob("*.safetensors")
    one, two = tensors_of(path), tensors_of(runs / "sharded" / path.name)
    assert one.keys() == two.keys()
    assert all(torch.allclose(value, two[key], rtol=0, atol=1e-5) for key, value in one.items())
    before = tensors_of(Path(ckpts["sd1"]))
    moved = [key for key, value in two.items() if key in before and not torch.allclose(value, before[key], atol=1e-5)]
    assert moved and all(key.startswith("model.diffusion_model.") for key in moved)
