"""`sfumato batch`: tables of jobs, exactly once for each row, whatever ends the run; one clear line for a wrong row."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sfumato.batch.drawing import Hand, Plan
from sfumato.batch.ledger import Ledger, Outcome, outcomes
from sfumato.batch.rows import Reader, file_name, seed_of, share
from sfumato.cli.batch import read_shard
from sfumato.cli.main import main
from sfumato.images import load_png
from sfumato.pipeline import Pipeline
from sfumato.safety import choosing
from sfumato.safety.checking import Verdict
from sfumato.types import Hires, Job
from sfumato.weights.files import sha256
from tests.rays import local_cluster

ROOT = Path(__file__).parents[1]
ROWS = (
    {"prompt": "a red apple", "seed": 7},
    {"prompt": "a cat", "steps": 3, "sampler": "euler"},
    {"prompt": "", "guidance": 1.0, "count": 2},
    {"prompt": "a tree", "negative": "rain", "hires": {"scale": 1.5}},
    {"prompt": "a {red|blue} house", "seed": 5},
    {"prompt": "a fish", "width": 24, "height": 32},
    {"prompt": "a cat", "sampler": "heun", "options": {"s_churn": 2.0}},
)


def table(path: Path, rows=ROWS) -> Path:
    """The rows as the file that the path's suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow({n: json.dumps(v) if isinstance(v, dict) else v for n, v in row.items()})
        return path
    polars = pytest.importorskip("polars")
    polars.DataFrame([dict.fromkeys(names) | row for row in rows], infer_schema_length=None).write_parquet(path)
    return path


def draw(source: Path, out: Path, ckpt: Path, *flags: str) -> int:
    return main(["batch", str(source), str(out), "--ckpt", str(ckpt), "--device", "cpu", "--steps", "4", *flags])


def index(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(out)): load_png(path)[0] for path in sorted(out.rglob("*.png"))}


def near(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Whether the same files show the same, within 1 of 255."""
    return left.keys() == right.keys() and all(
        int(np.abs(left[name].astype(int) - right[name]).max()) <= 1 for name in left
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize("row, why", [
    ({"prompt": "a", "steps": 0}, "row=2: steps=0: a whole number from 1"),
    ({"prompt": "a", "guidance": -1.0}, "row=2: guidance=-1.0: a number from 0"),
    ({"prompt": "a", "stepz": 3}, "row=2: stepz: no such field"),
    ({"steps": 3}, "row=2: prompt=None: text is needed"),
    ({"prompt": "a", "seed": -1}, "row=2: seed=-1"), ({"prompt": 5}, "row=2: prompt=5: text"),
    ({"prompt": "a", "sampler": "none"}, "row=2: sampler='none'"), ({"prompt": "\ud800"}, "row=2: prompt="),
    ({"prompt": "a", "image": "nothing.png"}, "row=2: image='nothing.png'"),
    ({"prompt": "a <lora:nothing:1>"}, "row=2: lora='nothing'"),
    ({"prompt": "a", "hires.strength": 0.5}, "row=2: hires.strength: there is no second pass"),
    ({"prompt": "a", "hires": {"what": 1}}, "row=2: hires.what: no such field"),
    ({"prompt": "a bad thing"}, "row=2: prompt: refused"),
    ({"prompt": "a", "steps": float("inf")}, "row=2: steps=inf: a whole number"),
])  # fmt: skip
def test_the_first_bad_row_is_named_before_anything_is_drawn(tmp_path, tiny_checkpoint, capsys, row, why) -> None:
    words = tmp_path / "words.txt"
    words.write_text("bad")
    bad = table(tmp_path / "t.jsonl", [{"prompt": "a"}, {"prompt": "b"}, row, {"prompt": "c", "steps": -5}])
    assert draw(bad, tmp_path / "out", tiny_checkpoint, "--refuse-words", str(words)) == 2
    assert why in error_line(capsys)
    assert not (tmp_path / "out").exists(), "nothing is drawn, and the mended table may go there"


@pytest.mark.parametrize("flags, why", [
    (["--shard", "3/2"], "shard='3/2'"), (["--shard", "two"], "shard='two'"), (["--limit", "0"], "limit=0"),
    (["--batch", "0"], "batch=0"), (["--replicas", "2"], "replicas=2"),
])  # fmt: skip
def test_wrong_flags_are_told(tmp_path, tiny_checkpoint, capsys, flags, why) -> None:
    assert draw(table(tmp_path / "t.jsonl"), tmp_path / "out", tiny_checkpoint, *flags) == 2
    assert why in error_line(capsys)


def test_rows_are_drawn_as_the_same_jobs_alone(tmp_path, tiny_checkpoint) -> None:
    out = tmp_path / "out"
    assert draw(table(tmp_path / "t.jsonl"), out, tiny_checkpoint, "--deterministic") == 0
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    alone = {
        0: Job("a red apple", steps=4, seed=7),
        1: Job("a cat", steps=3, sampler="euler", seed=seed_of(1, 42)),
        3: Job("a tree", "rain", steps=4, hires=Hires(scale=1.5), seed=seed_of(3, 42)),
        5: Job("a fish", steps=4, width=24, height=32, seed=seed_of(5, 42)),
        6: Job("a cat", steps=4, sampler="heun", options={"s_churn": 2.0}, seed=seed_of(6, 42)),
    }
    for number, job in alone.items():
        found, made = load_png(out / file_name(number, 0, 1))
        assert np.array_equal(found, pipeline.draw(job).images[0]), number
        assert made["seed"] == job.seed
    lines = index(out)
    assert [(line["row"], line["picture"]) for line in lines] == [
        (0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0), (6, 0)
    ]  # fmt: skip
    assert all(sha256(out / line["file"]) == line["sha256"] for line in lines)
    assert [line["seed"] for line in lines[2:4]] == [seed_of(2, 42), seed_of(2, 42) + 1]
    assert load_png(out / file_name(4, 0, 1))[1]["job"]["prompt"] in ("a red house", "a blue house")


def test_pictures_depend_neither_on_batches_nor_on_shards(tmp_path, tiny_checkpoint) -> None:
    source = table(tmp_path / "t.jsonl")
    assert draw(source, tmp_path / "one", tiny_checkpoint, "--batch", "1") == 0
    assert draw(source, tmp_path / "many", tiny_checkpoint, "--batch", "8") == 0
    for shard in ("2/3", "1/3", "3/3"):
        assert draw(source, tmp_path / "shards", tiny_checkpoint, "--shard", shard) == 0
    one = pixels(tmp_path / "one")
    assert len(one) == 8
    assert near(one, pixels(tmp_path / "many")) and near(one, pixels(tmp_path / "shards"))
    key = [(line["row"], line["file"], line["seed"]) for line in index(tmp_path / "one")]
    assert key == [(line["row"], line["file"], line["seed"]) for line in index(tmp_path / "shards")]


def test_another_seed_gives_other_pictures_but_for_rows_with_their_own(tmp_path, tiny_checkpoint) -> None:
    source = table(tmp_path / "t.jsonl", [{"prompt": "a", "seed": 3}, {"prompt": "a"}])
    assert draw(source, tmp_path / "a", tiny_checkpoint) == 0
    assert draw(source, tmp_path / "b", tiny_checkpoint, "--seed", "1") == 0
    seeds = [[line["seed"] for line in index(tmp_path / name)] for name in "ab"]
    assert seeds[0][0] == seeds[1][0] == 3 and seeds[0][1] != seeds[1][1]


def test_a_second_run_draws_only_what_is_missing(tmp_path, tiny_checkpoint, capsys) -> None:
    source, out = table(tmp_path / "t.jsonl"), tmp_path / "out"
    assert draw(source, out, tiny_checkpoint, "--limit", "3") == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(before) == 4 and len(index(out)) == 4
    assert draw(source, out, tiny_checkpoint) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(index(out)) == 8
    lines = (out / "rows.jsonl").read_bytes()
    assert draw(source, out, tiny_checkpoint) == 0 and (out / "rows.jsonl").read_bytes() == lines
    longer = table(tmp_path / "t.jsonl", [*ROWS, {"prompt": "one more"}])
    assert draw(longer, out, tiny_checkpoint) == 0 and len(index(out)) == 9
    capsys.readouterr()
    other = table(tmp_path / "t.jsonl", [{"prompt": "another"}, *ROWS[1:]])
    assert draw(other, out, tiny_checkpoint) == 2 and "row=0: " in error_line(capsys)
    assert draw(source, out, tiny_checkpoint, "--seed", "9") == 2 and "seed=9" in error_line(capsys)


def test_a_row_that_fails_is_noted_and_the_others_go_on(tmp_path, tiny_checkpoint, capsys, monkeypatch) -> None:
    picture = tmp_path / "p.png"
    rows = [{"prompt": "a"}, {"prompt": "b", "image": str(picture), "strength": 0.5}, {"prompt": "c"}]
    source, out = table(tmp_path / "t.jsonl", rows), tmp_path / "out"
    from PIL import Image

    from sfumato.batch import drawing

    Image.new("RGB", (16, 16), "red").save(picture)
    checked = drawing.check_rows

    def gone(*args, **named) -> None:
        checked(*args, **named)
        picture.unlink()

    monkeypatch.setattr(drawing, "check_rows", gone)
    assert draw(source, out, tiny_checkpoint) == 1
    lines = index(out)
    assert [line["row"] for line in lines] == [0, 1, 2] and len(list(out.rglob("*.png"))) == 2
    assert "p.png" in lines[1]["error"] and lines[1]["file"] is None and lines[0]["error"] is None
    monkeypatch.undo()
    Image.new("RGB", (16, 16), "red").save(picture)
    assert draw(source, out, tiny_checkpoint) == 1, "it has failed, and is not tried unasked"
    assert draw(source, out, tiny_checkpoint, "--retry") == 0
    assert [line["error"] for line in index(out)] == [None] * 3 and len(list(out.rglob("*.png"))) == 3


def test_a_line_and_a_picture_cut_short_are_made_good(tmp_path, tiny_checkpoint) -> None:
    source, out = table(tmp_path / "t.jsonl"), tmp_path / "out"
    assert draw(source, out, tiny_checkpoint, "--limit", "2") == 0
    journal = out / "rows.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    half = out / "00000" / ".00000005.png.1.part"
    half.write_bytes(b"half")
    assert draw(source, out, tiny_checkpoint) == 0
    assert not half.exists() and [line["row"] for line in index(out)] == [0, 1, 2, 2, 3, 4, 5, 6]
    assert sorted(json.loads(line)["row"] for line in journal.read_text().splitlines()) == list(range(7))


def test_two_runs_never_work_on_the_same_rows(tmp_path, tiny_checkpoint, capsys) -> None:
    out, source = tmp_path / "out", table(tmp_path / "t.jsonl")
    assert draw(source, out, tiny_checkpoint, "--limit", "1") == 0
    settings = json.loads((out / "batch.json").read_text())
    held = Ledger(out, settings, {}, (1, 1))
    assert draw(source, out, tiny_checkpoint) == 2 and "another run" in error_line(capsys)
    assert draw(source, out, tiny_checkpoint, "--shard", "1/2") == 2 and "another run" in error_line(capsys)
    held.close()
    assert draw(source, out, tiny_checkpoint) == 0


def test_a_damaged_journal_is_told(tmp_path, tiny_checkpoint, capsys) -> None:
    out, source = tmp_path / "out", table(tmp_path / "t.jsonl")
    assert draw(source, out, tiny_checkpoint, "--limit", "1") == 0
    (out / "rows.jsonl").write_text('{"row": 0}\n')
    capsys.readouterr()
    assert draw(source, out, tiny_checkpoint) == 2 and "line 1 is damaged" in error_line(capsys)


def test_the_index_of_parquet_is_parquet(tmp_path, tiny_checkpoint) -> None:
    polars = pytest.importorskip("polars")
    out = tmp_path / "out"
    assert draw(table(tmp_path / "t.parquet", ROWS[:3]), out, tiny_checkpoint) == 0
    frame = polars.read_parquet(out / "index.parquet")
    assert frame.columns == ["row", "picture", "file", "seed", "sha256", "verdict", "error"]
    assert frame["row"].to_list() == [0, 1, 2, 2] and frame["error"].null_count() == 4
    assert all((out / name).is_file() for name in frame["file"])


def once(out: Path, alone: Path, total: int) -> None:
    """Every row is there once, with the pictures and the index of a run that nobody ended."""
    assert index(out) == index(alone) and [line["row"] for line in index(out)] == list(range(total))
    assert {path.relative_to(out) for path in out.rglob("*.png")} == {Path(line["file"]) for line in index(out)}
    assert not list(out.rglob("*.part"))
    journal = [json.loads(line)["row"] for line in (out / "rows.jsonl").read_text().splitlines()]
    assert sorted(journal) == list(range(total)), "each is put down once"


def test_a_run_that_is_killed_goes_on_and_every_row_is_there_once(tmp_path, tiny_checkpoint) -> None:
    rows = [{"prompt": f"a cat {number}", "steps": 10 + number % 5} for number in range(16)]
    source, out, alone = table(tmp_path / "t.jsonl", rows), tmp_path / "out", tmp_path / "alone"
    flags = ["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--deterministic"]
    command = [sys.executable, "-m", "sfumato.cli.main", "batch", str(source), str(out), *flags]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}) as run:
        end = time.monotonic() + 120
        while not (out.is_dir() and len(outcomes(out)) >= 3) and time.monotonic() < end:
            time.sleep(0.01)
        run.kill()
        assert run.wait(30) == -9
    assert 3 <= len(outcomes(out)) < 16, "it was ended on the way"
    assert all(load_png(path) for path in out.rglob("0*.png")), "no half file has a picture's name"
    assert main(["batch", str(source), str(out), *flags]) == 0
    assert main(["batch", str(source), str(alone), *flags]) == 0
    once(out, alone, 16)


def test_ctrl_c_keeps_what_is_finished(tmp_path, tiny_checkpoint, capsys, monkeypatch) -> None:
    source, out = table(tmp_path / "t.jsonl"), tmp_path / "out"
    put = Ledger.put

    def until_third(ledger: Ledger, outcome: Outcome) -> None:
        put(ledger, outcome)
        if len(ledger.done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "put", until_third)
    assert draw(source, out, tiny_checkpoint, "--deterministic") == 130
    assert len({line["row"] for line in index(out)}) == 3, "the index is there"
    monkeypatch.undo()
    assert draw(source, out, tiny_checkpoint, "--deterministic") == 0
    assert draw(source, tmp_path / "alone", tiny_checkpoint, "--deterministic") == 0
    assert index(out) == index(tmp_path / "alone")


def test_shares_and_names() -> None:
    assert list(share(7)) == list(range(7)) and list(share(7, limit=3)) == [0, 1, 2]
    parts = [list(share(10, (index, 3))) for index in (1, 2, 3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert read_shard("2/4") == (2, 4)
    assert file_name(12345, 0, 1) == "00012/00012345.png" and file_name(7, 2, 3) == "00000/00000007-0002.png"
    seeds = {seed_of(number, 42) for number in range(2000)}
    assert len(seeds) == 2000 and seed_of(5, 42) == seed_of(5, 42) != seed_of(5, 43)


def test_a_row_stands_instead_of_the_flags() -> None:
    base = Job(" <lora:a:1>", steps=9, hires=Hires(scale=2.0, strength=0.4), options={"s_churn": 1.0})
    reader = Reader(base, 0, lambda job: [job])
    job = reader.row((3, {"prompt": "a", "hires.strength": 0.5, "steps": 4})).jobs[0]
    assert job.prompt == "a <lora:a:1>" and job.steps == 4 and job.options == {"s_churn": 1.0}
    assert job.hires == Hires(scale=2.0, strength=0.5) and job.seed == seed_of(3, 0)


def test_a_checkers_verdict_is_in_the_index(tmp_path, tiny_checkpoint, monkeypatch) -> None:
    class Every:
        name = "every"

        def check(self, images: np.ndarray) -> list[Verdict]:
            return [Verdict(True, {"a": 0.75}, self.name) for _ in images]

    monkeypatch.setattr(choosing, "open_checker", lambda *_: Every())
    out, source = tmp_path / "out", table(tmp_path / "t.jsonl", ROWS[:1])
    assert draw(source, out, tiny_checkpoint, "--safety", "withhold") == 0
    assert [line["verdict"] for line in index(out)] == [{"flagged": True, "scores": {"a": 0.75}, "checker": "every"}]
    assert np.ptp(load_png(out / file_name(0, 0, 1))[0]) == 0, "it is withheld"


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with room for two replicas."""
    with local_cluster() as ray:
        yield ray


@pytest.mark.services
def test_ray_draws_the_same_pictures(tmp_path, tiny_checkpoint, capsys, cluster) -> None:
    source, here, there = table(tmp_path / "t.jsonl"), tmp_path / "here", tmp_path / "there"
    assert draw(source, here, tiny_checkpoint) == 0
    flags = ["--ray", "--replicas", "2"]
    assert draw(source, there, tiny_checkpoint, "--ray", "--limit", "2") == 0
    assert draw(source, there, tiny_checkpoint, *flags) == 0
    assert near(pixels(here), pixels(there))
    drop = {"sha256": None}
    assert [line | drop for line in index(there)] == [line | drop for line in index(here)]
    assert all(sha256(there / line["file"]) == line["sha256"] for line in index(there))
    capsys.readouterr()
    bad = table(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"prompt": "a", "steps": 0}])
    assert draw(bad, tmp_path / "bad", tiny_checkpoint, "--ray") == 2
    assert "error: row=1: steps=0: a whole number" in error_line(capsys)
    assert draw(source, tmp_path / "x", tmp_path / "none.ckpt", "--ray") == 2 and "none.ckpt" in error_line(capsys)
    assert draw(source, tmp_path / "x", tiny_checkpoint, "--ray", "--replicas", "0") == 2
    assert "replicas=0" in error_line(capsys)


@pytest.mark.services
def test_relative_paths_hold_at_rays_actors(tmp_path, tiny_checkpoint, monkeypatch, cluster) -> None:
    from tests.test_elsewhere import relative_run

    relative_run(tmp_path, tiny_checkpoint, monkeypatch, lambda: None)


@pytest.mark.services
def test_rows_of_an_actor_that_died_are_drawn_by_another(tmp_path, tiny_checkpoint, cluster) -> None:
    from sfumato.batch.ray_crew import RayCrew

    def make() -> Hand:
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
        drawn = 0

        def finish(result):
            nonlocal drawn
            drawn += 1
            died = tmp_path / "died"
            if drawn == 3 and not died.exists():
                died.touch()
                os._exit(1)
            return [(image, {}, None) for image in result.images]

        return Hand(pipeline, finish)

    crew = RayCrew(make, Plan(tmp_path / "out"), 1, "cpu")
    rows = [(number, {"prompt": f"a {number}"}) for number in range(60)]
    found = [outcome.row for outcome in crew.draw(rows, Reader(Job(steps=2), 0, lambda job: [job]))]
    crew.close()
    assert (tmp_path / "died").exists() and sorted(found) == list(range(60)), "each comes back once"
    assert len(list((tmp_path / "out").rglob("*.png"))) == 60
