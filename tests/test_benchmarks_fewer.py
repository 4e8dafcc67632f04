"""The benchmark of fewer operations at tiny size: what it measures, where it goes on, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import fewer_operations as fewer
from sfumato.cli.evaluate import captions_of
from sfumato.cli.main import main as sfumato
from sfumato.evaluate.features import IMAGENET, Network, features_of
from sfumato.evaluate.measuring import measured
from sfumato.images import save_png
from sfumato.pipeline import Pipeline
from sfumato.train.data import CachedLatents, open_pictures
from sfumato.types import Job
from tests.adapters import checkpoint_of

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., int]


class Colours(nn.Module):
    """Means of each quarter's red, green and blue: 12 features."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def colours(_: str = "") -> Network:
    network = Colours()
    network.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return Network("colours", "0" * 16, network, 16, 12, IMAGENET)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(12):
        save_png(folder / f"{index:02}.png", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        (folder / f"{index:02}.txt").write_text(f"picture {index}")
    return folder


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(fewer, "open_features", colours)

    def start(*more: str) -> int:
        words = ["--ckpt", str(checkpoint_of("sd1")), "--data", str(data), "--prompts", "2", "--seeds", "1"]
        words += ["--samples", "10", "--reference", "10", "--batch", "5"]
        return fewer.main([*words, "--out", str(tmp_path / "out.json"), "--figure", str(tmp_path / "f.png"), *more])

    return start


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is exact takes four steps, so that the tests are quick."""

    def jobs(self: fewer.Setting, prompts: list[str], seeds: list[int]) -> list[Job]:
        fields = {"steps": 4, "width": 64, "height": 64} | dict(self.fields)
        pairs = zip(prompts, seeds, strict=True)
        return [Job(prompt + self.behind, seed=seed + self.shift, **fields) for prompt, seed in pairs]

    monkeypatch.setattr(fewer.Setting, "jobs", jobs)


def rows_in(folder: Path) -> dict:
    return json.loads((folder / "out.json").read_text())["rows"]


def test_speed_distance_and_the_real_pictures(
    run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--points", "exact", "reuse 2", "ddim 10 steps", "int8", "weights int8") == 2
    assert "points='int8': one of exact, other seeds, dpmpp_2m" in capsys.readouterr().err
    assert run("--points", "exact", "reuse 2", "weights int8") == 0
    rows = rows_in(tmp_path)
    assert list(rows) == ["exact", "reuse 2", "weights int8"]
    exact, reuse, int8 = rows.values()
    assert exact["distance"]["levels"] == {"median": 0, "low": 0, "high": 0} and "psnr" not in exact["distance"]
    assert exact["distance"]["ssim"]["median"] == 1 and exact["pictures"] == 2
    assert reuse["distance"]["levels"]["median"] > 0 and int8["distance"]["psnr"]["median"] > 20
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and told[0].endswith("colours-fid | colours-kid |") and told[3].startswith("| reuse | 2 |")

    pictures = open_pictures(str(data))
    pipe = Pipeline.from_pretrained(checkpoint_of("sd1"), device="cpu", precision="fp32")
    jobs = fewer.EXACT.jobs(captions_of(pictures, 10, 0), range(10))
    drawn = [result.images[0] for half in (jobs[:5], jobs[5:]) for result in pipe.draw_many(half)]
    reference = fewer.Reference.of(colours(), data, 10, 10, 0, tmp_path / "again.safetensors")
    features = features_of(colours(), drawn)
    wanted = measured([colours()], {"colours": reference.real}, {"colours": features}, "clean")
    assert exact["metrics"]["colours-fid"]["value"] == pytest.approx(wanted["colours-fid"]["value"], rel=1e-4)
    assert reuse["metrics"]["colours-fid"]["value"] != exact["metrics"]["colours-fid"]["value"]


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = fewer.compared, []

    def stops(pipelines, setting, *rest):  # type: ignore[no-untyped-def]
        asked.append(setting.name)
        if asked == ["exact", "tome 0.5"]:
            raise KeyboardInterrupt
        return plain(pipelines, setting, *rest)

    monkeypatch.setattr(fewer, "compared", stops)
    with pytest.raises(KeyboardInterrupt):
        run("--points", "exact", "tome 0.5")
    before = rows_in(tmp_path)
    assert list(before) == ["exact"]
    assert run("--points", "exact", "tome 0.5") == 0
    assert asked == ["exact", "tome 0.5", "tome 0.5"]
    assert rows_in(tmp_path)["exact"] == before["exact"] and list(rows_in(tmp_path)) == ["exact", "tome 0.5"]


def test_what_was_distilled(run: Run, tmp_path: Path) -> None:
    latents, mean = tmp_path / "latents.safetensors", torch.randn(4, 4, 8, 8)
    CachedLatents.write(latents, mean, 0.01 * torch.ones_like(mean), ["a", "b", "c", "d"])
    train = ["train", "consistency", "--ckpt", str(checkpoint_of("sd1")), "--latents", str(latents), "--steps", "2"]
    train += ["--batch", "2", "--rank", "2", "--lr", "1e-2", "--warmup", "1", "--ema-decay", "0", "--device", "cpu"]
    assert sfumato([*train, "--out", str(tmp_path / "part")]) == 0
    assert sfumato([*train, "--out", str(tmp_path / "whole"), "--full"]) == 0
    part, whole = (tmp_path / name / f"{name}.safetensors" for name in ("part", "whole"))
    assert fewer.is_adapter(part) and not fewer.is_adapter(whole)
    point = "distilled lcm 2 steps"
    found = []
    for quick in (part, whole):  # another file is measured anew
        assert run("--samples", "0", "--quick", str(quick), "--points", point) == 0
        found.append(rows_in(tmp_path)[point])
    assert found[0]["quick"] != found[1]["quick"] and found[0]["distance"] != found[1]["distance"]
    plain = Pipeline.from_pretrained(checkpoint_of("sd1"), device="cpu", precision="fp32")
    setting = next(each for each in fewer.settings_of("fp32", whole) if each.name == point)
    pictures, _ = fewer.draw(plain, setting.jobs(fewer.PROMPTS[:2], [0, 0]))
    exact, _ = fewer.draw(plain, fewer.EXACT.jobs(fewer.PROMPTS[:2], [0, 0]))
    unlearned = fewer.distances(pictures, exact)
    assert all(unlearned["levels"] != each["distance"]["levels"] for each in found), "what was learned is drawn with"


def test_distances_are_those_of_each_picture() -> None:
    exact = [np.full((16, 16, 3), 100, np.uint8)] * 3
    pictures = [picture + np.uint8(more) for picture, more in zip(exact, (0, 2, 10), strict=True)]
    found = fewer.distances(pictures, exact)
    assert found["levels"] == {"median": 2, "low": 1, "high": 6}
    assert found["psnr"]["median"] == pytest.approx(10 * np.log10(255**2 / np.array([4, 100])).mean())


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seeds", "0"], "seeds=0: 1 or more is needed"),
        (["--prompts", "9"], "prompts=9: 1 to 8 are allowed"),
        (["--samples", "9"], "samples=9: 10 or more are needed"),
        (["--quick", "none.safetensors"], "quick='none.safetensors': no such file"),
    ],
)
def test_what_it_refuses(words: list[str], said: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err == f"fewer_operations: {said}\n"


def test_results_of_another_run_stay(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--points", "exact", "--samples", "0") == 0
    before = (tmp_path / "out.json").read_bytes()
    assert run("--points", "exact", "--samples", "0", "--seeds", "2") == 2
    assert "it is of seeds=1, now 2; name another file" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    assert run("--points", "exact", "--samples", "0", "--out", str(tmp_path / "other.json")) == 2
    assert "no results of this benchmark" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_bytes() == before
