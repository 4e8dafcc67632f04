"""`sfumato evaluate`: a sweep to its end and after a stop, two sets of pictures, scores, and bad input in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.evaluate import guidance_of, labels_of
from sfumato.cli.main import main
from sfumato.evaluate import sharing
from sfumato.evaluate.sharing import Claims
from sfumato.evaluate.statistics import load_statistics
from sfumato.evaluate.sweep import key_of, once, shuffled_numbers
from sfumato.images import load_png
from sfumato.pipeline import Pipeline
from sfumato.tasks.checks import job_from_dict
from sfumato.weights.files import save_safetensors

PICTURES, SAMPLES, BATCH = 14, 10, 4


def evaluate(*words):
    return main(["evaluate", *map(str, words)])


def folder_of(path, count=PICTURES, side=24, seed=0):
    """Smooth colours with captions beside."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path / f"{index:02}.png")
        (path / f"{index:02}.txt").write_text(f"a thing of kind {index}")
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("real") / "pictures")


@pytest.fixture
def flags(real, clip_file, tiny_checkpoint):
    return ["--data", real, "--features", f"clip:{clip_file}", "--ckpt", tiny_checkpoint, "--guidance", "1.5,4",
            "--steps", 2, "--samples", SAMPLES, "--batch", BATCH, "--device", "cpu"]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Counts the pictures that the pipeline draws; `stop` is after how many calls a person presses Ctrl-C."""

    class Count:
        pictures, calls, stop = 0, 0, None

    original = Pipeline.draw_many

    def draw_many(self, jobs, *rest):
        if Count.calls == Count.stop:
            raise KeyboardInterrupt
        Count.calls += 1
        Count.pictures += len(jobs)
        return original(self, jobs, *rest)

    monkeypatch.setattr(Pipeline, "draw_many", draw_many)
    return Count


def results(out):
    return json.loads((out / "results.json").read_text())


def test_a_sweep(flags, tmp_path, capsys, drawn, real, clip_file):
    out = tmp_path / "out"
    assert evaluate(*flags, "--out", out) == 0
    points = results(out)["points"]
    assert [point["guidance"] for point in points] == [1.5, 4] and drawn.pictures == 2 * SAMPLES
    found = points[1]["metrics"]
    assert set(found) == {"clip-fid", "clip-kid", "clip-precision", "clip-recall", "cmmd", "clip-score"}
    assert points[0]["metrics"]["clip-fid"]["value"] != found["clip-fid"]["value"] > 0
    for entry in found.values():
        facts = [entry[name] for name in ("features", "resize", "size", "real", "drawn")]
        assert facts == ["clip", "clean", 16, PICTURES, SAMPLES] and len(entry["hash"]) == 16
    assert (found["clip-kid"]["draws"], found["clip-kid"]["each"]) == (100, SAMPLES)
    assert "no full rank" in found["clip-fid"]["warning"]  # 10 pictures of 24 dimensions
    assert found["clip-score"]["value"] == pytest.approx(2.5 * found["clip-score"]["cosine"])
    with Image.open(out / "figure.png") as figure:
        assert figure.width > 500 and np.asarray(figure.convert("L")).std() > 5
    assert load_statistics(out / "real-clip.safetensors").count == PICTURES
    # each picture can be drawn again, and captions are those of the data, the same at every guidance
    prompts = {}
    for scale in ("1.5", "4"):
        jobs = [
            job_from_dict(load_png(path)[1]["job"]) for path in sorted((out / f"tiny-guidance-{scale}").glob("*.png"))
        ]
        assert [job.seed for job in jobs] == list(range(SAMPLES)) and {job.guidance for job in jobs} == {float(scale)}
        prompts[scale] = [job.prompt for job in jobs]
    assert prompts["1.5"] == prompts["4"] == [f"a thing of kind {n}" for n in shuffled_numbers(PICTURES, SAMPLES, 0)]
    # the folders alone give the same numbers: PNGs lose nothing
    capsys.readouterr()
    assert evaluate("--a", real, "--b", out / "tiny-guidance-4", "--features", f"clip:{clip_file}", "--out",
                    tmp_path / "two", "--device", "cpu") == 0  # fmt: skip
    again = results(tmp_path / "two")["metrics"]
    assert again["clip-fid"]["value"] == pytest.approx(found["clip-fid"]["value"], rel=1e-5)
    assert again["cmmd"]["value"] == pytest.approx(found["cmmd"]["value"], rel=1e-5)
    assert "clip-fid" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_ends_the_same(flags, tmp_path, drawn, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert evaluate(*flags, "--out", whole) == 0
    drawn.calls, drawn.pictures, drawn.stop = 0, 0, 4  # within the second guidance
    assert evaluate(*flags, "--out", stopped) == 130
    assert drawn.pictures == SAMPLES + BATCH and len(results(stopped)["points"]) == 1
    # what a kill may leave: a chunk cut short, and a part of a file
    chunk = sorted((stopped / "tiny-guidance-1.5").glob("*.safetensors"))[1]
    chunk.write_bytes(chunk.read_bytes()[:-7])
    (stopped / "tiny-guidance-4" / ".0000004.png.1.part").write_bytes(b"half")
    drawn.stop = None
    assert evaluate(*flags, "--out", stopped) == 0
    assert drawn.pictures == 2 * SAMPLES + BATCH  # only the damaged chunk twice
    assert results(stopped) == results(whole)
    assert evaluate(*flags, "--out", stopped) == 0  # all is there: nothing is drawn
    assert drawn.pictures == 2 * SAMPLES + BATCH


@pytest.mark.parametrize(
    "more, name",
    [
        (["--steps", 3], "steps=2, now 3"),
        (["--precision", "bf16"], "precision=None, now 'bfloat16'"),
        (["--seed", 5], "seed=0"),
        (["--resize", "legacy-tf"], "features"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(flags, tmp_path, capsys, more, name):
    small = [*flags, "--guidance", "2", "--out", tmp_path]
    assert evaluate(*small) == 0
    before = results(tmp_path)
    capsys.readouterr()
    assert evaluate(*small, *more) == 2
    error = capsys.readouterr().err
    assert name in error and "another folder is needed" in error and error.count("error:") == 1
    assert results(tmp_path) == before


def test_captions_that_changed_are_noticed(flags, tmp_path, capsys):
    data = folder_of(tmp_path / "data")
    words = [*flags, "--guidance", "2", "--data", data, "--out", tmp_path / "out"]
    assert evaluate(*words) == 0
    for path in data.glob("*.txt"):
        path.write_text("another thing")
    capsys.readouterr()
    assert evaluate(*words) == 2
    assert "of other pictures or captions" in capsys.readouterr().err


def test_damaged_grey_and_tiny_pictures_are_told(tmp_path, clip_file, capsys):
    a, b = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", seed=1)
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8)).save(a / "grey.png")
    Image.new("RGB", (5, 7), "red").save(a / "tiny.png")
    (a / "damaged.png").write_bytes((a / "00.png").read_bytes()[:100])
    assert evaluate("--a", a, "--b", b, "--features", f"clip:{clip_file}", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "1 grey pictures" in told and "1 pictures below 16 px" in told
    assert "1 broken" in told and "damaged.png" in told
    facts = results(tmp_path / "out")["metrics"]["clip-fid"]
    assert (facts["real"], facts["drawn"]) == (PICTURES + 2, PICTURES)


def test_a_set_against_itself(real, clip_file, tmp_path):
    assert evaluate("--a", real, "--b", real, "--features", f"clip:{clip_file}", "--out", tmp_path) == 0
    found = results(tmp_path)["metrics"]
    assert abs(found["clip-fid"]["value"]) < 1e-3 and abs(found["cmmd"]["value"]) < 1e-3
    assert found["clip-precision"]["value"] == found["clip-recall"]["value"] == 1


@pytest.mark.parametrize(
    "change, wanted",
    [
        (["--data", "none"], "no such file"),
        (["--data", "EMPTY"], "no pictures"),
        (["--features", "vgg"], "features='vgg'"),
        (["--features", "inception:CLIP"], "no tensor Conv2d_1a_3x3"),
        (["--features", "clip:CLIP", "clip:CLIP"], "each network once"),
        (["--guidance", "2,x"], "guidance='2,x'"),
        (["--guidance", "2,2"], "each once"),
        (["--samples", "3"], "samples=3: 10"),
        (["--batch", "0"], "batch=0"),
        (["--sampler", "plmz"], "plmz"),
        (["--a", "EMPTY"], "either --data"),
    ],
)
def test_bad_input_is_one_line(flags, tmp_path, clip_file, capsys, change, wanted):
    (tmp_path / "empty").mkdir()
    words = [word.replace("CLIP", str(clip_file)).replace("EMPTY", str(tmp_path / "empty")) for word in change]
    assert evaluate(*flags, "--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert wanted in error[-1] and sum("error:" in line for line in error) == 1


def test_labels_and_guidance():
    assert labels_of([None, "a/x.ckpt", "b/x.safetensors"]) == {"box": None, "x": "a/x.ckpt", "x-2": "b/x.safetensors"}
    assert guidance_of("1.5,2, 8") == (1.5, 2.0, 8.0)


def test_scores_of_a_folder(real, clip_file, tmp_path, capsys):
    save_safetensors(tmp_path / "linear.safetensors", {"weight": torch.ones(1, 24), "bias": torch.full((1,), 5.0)}, {})
    words = ["scores", "--data", real, "--predictor", tmp_path / "linear.safetensors"]
    assert evaluate(*words, "--clip", clip_file, "--out", tmp_path) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == PICTURES and 0 < found["mean"] < 10
    assert found["5 %"] <= found["median"] <= found["95 %"]
    assert json.loads((tmp_path / "scores.json").read_text())["mean"] == found["mean"]
    assert evaluate(*words) == 2 and "clip:" in capsys.readouterr().err


WORKER = """
import sys
from sfumato.cli import main
from sfumato.pipeline import Pipeline

original = Pipeline.draw_many
def draw_many(self, jobs, *rest):
    with open(sys.argv[1], "a") as file:
        file.writelines(f"{job.guidance:g} {job.seed}\\n" for job in jobs)
    return original(self, jobs, *rest)
Pipeline.draw_many = draw_many
sys.exit(main.main(sys.argv[2:]))
"""


def test_two_processes_share_a_sweep(flags, tmp_path):
    """Each picture is drawn by one of them, and both end with the numbers of a run that was alone."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    flags = [*flags, "--batch", 1]
    assert evaluate(*flags, "--out", alone) == 0
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, log, "evaluate", *map(str, flags), "--out", shared])
        for log in logs
    ]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    drawn = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    assert sorted(drawn[0] + drawn[1]) == sorted(f"{g} {seed}" for g in ("1.5", "4") for seed in range(SAMPLES))
    assert results(shared) == results(alone)


def test_a_claim_is_one_processs_and_ends_with_it(tmp_path):
    words = "import sys, time\nfrom pathlib import Path\nfrom sfumato.evaluate.sharing import Claims\n"
    words += "claims = Claims(Path(sys.argv[1]))\nwith claims.claimed(3) as mine:\n    print(mine, flush=True)\n"
    other = subprocess.Popen([sys.executable, "-c", words + "    time.sleep(300)", tmp_path], stdout=subprocess.PIPE)
    assert other.stdout.readline().strip() == b"True"
    with Claims(tmp_path) as claims:
        with claims.claimed(3) as mine, claims.claimed(4) as next_one:
            assert not mine and next_one
        other.kill()
        other.wait()
        with claims.claimed(3) as mine:
            assert mine


def test_claims_that_are_closed_take_no_others_of_the_process_with_them(tmp_path):
    words = "import sys\nfrom pathlib import Path\nfrom sfumato.evaluate.sharing import Claims\n"
    words += "with Claims(Path(sys.argv[1])) as claims:\n    for piece in (3, 4):\n"
    words += "        with claims.claimed(piece) as mine:\n            print(mine)\n"

    def elsewhere():
        return subprocess.check_output([sys.executable, "-c", words, tmp_path], text=True, timeout=300).split()

    with Claims(tmp_path) as first:
        with first.claimed(3) as mine:
            assert mine
            with Claims(tmp_path) as second, second.claimed(3) as again, second.claimed(4) as other:
                assert again and other, "its own process is not shut out"
            second.close()  # once more does nothing
            assert elsewhere() == ["False", "True"], "of the first the claim is still there"
        assert elsewhere() == ["True", "True"]
    with Claims(tmp_path) as third, third.claimed(4) as mine:
        assert mine


def test_claims_without_locks_are_all_granted(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "fcntl", None)
    with Claims(tmp_path) as one, Claims(tmp_path) as other, one.claimed(1) as mine, other.claimed(1) as its:
        assert mine and its


def test_measured_once_and_anew_where_something_changed(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": len(calls)}

    path = tmp_path / "metrics.json"
    assert once(path, "a", make) == once(path, "a", make) == {"value": 1}
    assert once(path, "b", make) == {"value": 2}
    path.write_text("{")
    assert once(path, "b", make, wait=False) == {"value": 3} and len(calls) == 3
    one, other = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    assert len({key_of("a", one), key_of("a", other), key_of("b", one)}) == 3


# --- results of several sweeps


def test_joined_results_are_those_of_one_sweep(flags, tmp_path, capsys):
    whole, one, two, out = (tmp_path / name for name in ("whole", "one", "two", "joined"))
    assert evaluate(*flags, "--out", whole) == 0
    for folder, guidance in ((one, "4"), (two, "1.5")):
        assert evaluate(*flags, "--guidance", guidance, "--out", folder) == 0
    files = [folder / "results.json" for folder in (one, two)]
    assert evaluate("--join", *files, "--out", out) == 0
    assert results(out) == results(whole)
    with Image.open(out / "figure.png") as ours, Image.open(whole / "figure.png") as theirs:
        assert ours.size == theirs.size
    capsys.readouterr()
    assert evaluate("--join", files[0], whole / "results.json", "--out", tmp_path / "no") == 2
    assert "guidance 4 of" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: r.update(data="others, 3 pictures"), "of data 'others"),
        (lambda r: r["points"][0].update(steps=9), "steps 9"),
        (lambda r: r["points"][0]["metrics"]["clip-score"].update(hash="00"), "clip-score's hash '00'"),
        (lambda r: r["points"][0]["metrics"].pop("cmmd"), "metrics ["),
        (lambda r: r["points"][0].update({"model hash": "other", "guidance": 8}), "two models have the same name"),
        (lambda r: r.pop("points"), "no points"),
    ],
)
def test_results_that_cannot_stand_side_by_side_are_refused(flags, tmp_path, capsys, change, said):
    out = tmp_path / "out"
    assert evaluate(*flags, "--guidance", "4", "--out", out) == 0
    other = results(out)
    other["points"][0]["guidance"] = 8.0
    change(other)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    capsys.readouterr()
    assert evaluate("--join", out / "results.json", path, "--out", tmp_path / "no") == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1 and not (tmp_path / "no").exists()


def test_what_is_no_result_is_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text("[]")
    for words, said in (
        (["--join", path, "--out", tmp_path / "out"], "no points"),
        (["--join", tmp_path / "none.json", "--out", tmp_path / "out"], "not readable"),
        (["--join", path, path, "--out", tmp_path / "out"], "twice"),
        (["--join", path], "--out DIR"),
        (["--join", path, "--out", tmp_path], "another folder"),
    ):
        assert evaluate(*words) == 2
        assert said in capsys.readouterr().err
