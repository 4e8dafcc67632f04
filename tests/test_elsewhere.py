"""Flags and jobs for processes in other folders: relative paths made absolute, and nothing else changed."""

from __future__ import annotations

import argparse
import json
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfumato.batch.drawing import Drawer
from sfumato.batch.rows import Reader
from sfumato.cli.batch import add_flags
from sfumato.cli.elsewhere import Anchored, absolute_flags
from sfumato.cli.job_flags import Texts
from sfumato.types import Job
from tests.test_batch import draw, index, near, pixels, table


def flags_of(*words: str):
    """The flags of `batch`, without a run."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(["t.csv", "out", *words])


def test_flags_are_made_absolute_for_processes_elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_ADAPTERS", raising=False)
    for name in ("m.safetensors", "v.pt", "key.pem", "words", "owner"):
        Path(name).touch()
    for name in ("models", "loras", "cards", "opennsfw"):
        Path(name).mkdir()
    here = str(tmp_path)
    found = absolute_flags(flags_of(
        "--ckpt", "m.safetensors", "--vae", "v.pt", "--sign", "key.pem", "--refuse-words", "words",
        "--refuse-words", "none", "--safety", "blur", "--safety-checker", "opennsfw", "--wildcards", "cards",
    ))  # fmt: skip
    assert (found.table, found.out) == (tmp_path / "t.csv", tmp_path / "out")
    assert [found.ckpt, found.vae, found.sign, found.wildcards] == [
        f"{here}/{name}" for name in ("m.safetensors", "v.pt", "key.pem", "cards")
    ]
    assert found.refuse_words == [f"{here}/words", "none"], "what is missing is named as it was given"
    assert found.safety_checker == "opennsfw", "it is no path, whatever lies here"
    assert found.adapters == [f"{here}/models"], "the usual folders are those of here"
    assert absolute_flags(flags_of("--adapters", "loras")).adapters == [f"{here}/loras"]
    assert absolute_flags(flags_of("--ckpt", "owner/name")).ckpt == "owner/name", "a hub's id"
    monkeypatch.setenv("SFUMATO_ADAPTERS", "loras")
    assert absolute_flags(flags_of()).adapters == [f"{here}/loras"]


@pytest.mark.parametrize("url, expected", [
    ("sqlite:///a/q.db", "sqlite:///{}/a/q.db"), ("sqlite+pysqlite:///q.db?x=1", "sqlite+pysqlite:///{}/q.db?x=1"),
    ("sqlite:////q.db", "sqlite:////q.db"), ("sqlite:///:memory:", "sqlite:///:memory:"), ("sqlite://", "sqlite://"),
    ("postgresql+psycopg://u:p@h/q", "postgresql+psycopg://u:p@h/q"), (None, None),
])  # fmt: skip
def test_a_database_in_a_file_is_the_same_one_elsewhere(tmp_path, monkeypatch, url, expected) -> None:
    monkeypatch.chdir(tmp_path)
    found = absolute_flags(argparse.Namespace(database=url)).database
    assert found == (expected and expected.format(tmp_path))


def test_files_that_rows_name_are_found_from_another_folder(tmp_path, monkeypatch) -> None:
    for name in ("p.png", "m.png", "l.safetensors", "c.safetensors", "lanczos", "canny.safetensors"):
        (tmp_path / name).touch()
    texts = Texts()
    reader = pickle.loads(pickle.dumps(Reader(Job(" <lora:l.safetensors:0.5>"), 0, Anchored(tmp_path, texts.jobs))))
    row = {
        "prompt": "a <lora:l:1> <hypernet:l.safetensors>", "image": "p.png", "mask": "m.png", "depth": "none.png",
        "upscaler": "lanczos", "hires.scale": 2.0, "hires.prompt": "b <lora:l.safetensors:1>",
        "controls": [{"model": "c.safetensors", "image": "p.png", "annotate": "canny"}],
    }  # fmt: skip
    (job,) = reader.row((0, row)).jobs
    here = str(tmp_path)
    assert job.prompt == f"a <lora:l:1> <hypernet:{here}/l.safetensors> <lora:{here}/l.safetensors:0.5>"
    assert (job.image, job.mask, job.depth) == (f"{here}/p.png", f"{here}/m.png", "none.png")
    assert job.upscaler == "lanczos" and job.hires.prompt == f"b <lora:{here}/l.safetensors:1>"
    control = job.controls[0]
    assert (control.model, control.image, control.annotate) == (f"{here}/c.safetensors", f"{here}/p.png", "canny")


def test_what_is_sent_to_a_cluster_holds_there(tmp_path, tiny_checkpoint, monkeypatch) -> None:
    """A crew that works in another folder, as actors do."""
    from sfumato.batch import ray_crew

    @contextmanager
    def elsewhere():
        monkeypatch.chdir(tmp_path / "elsewhere")
        try:
            yield
        finally:
            monkeypatch.chdir(tmp_path / "here")

    class Elsewhere(Drawer):
        def __init__(self, make, plan, replicas, device) -> None:
            with elsewhere():
                super().__init__(pickle.loads(pickle.dumps(make))(), plan)

        def check(self, rows, reader) -> None:
            with elsewhere():
                super().check(rows, pickle.loads(pickle.dumps(reader)))

        def draw(self, rows, reader):
            with elsewhere():
                found = list(super().draw(rows, pickle.loads(pickle.dumps(reader))))
            yield from found

    relative_run(tmp_path, tiny_checkpoint, monkeypatch, lambda: monkeypatch.setattr(ray_crew, "RayCrew", Elsewhere))


def relative_run(folder: Path, ckpt: Path, monkeypatch, before) -> None:
    """A run in which all paths are relative, first here and then by --ray."""
    from PIL import Image

    for name in ("here", "elsewhere"):
        (folder / name).mkdir()
    monkeypatch.chdir(folder / "here")
    Path("model.safetensors").symlink_to(ckpt)
    Path("words.txt").write_text("bad")
    Image.new("RGB", (16, 16), "red").save("p.png")
    rows = [{"prompt": "a"}, {"prompt": "b", "image": "p.png", "strength": 0.5}]
    source, flags = table(Path("t.jsonl"), rows), ["--refuse-words", "words.txt"]
    assert draw(source, Path("one"), Path("model.safetensors"), *flags) == 0
    before()
    assert draw(source, Path("two"), Path("model.safetensors"), *flags, "--ray") == 0
    assert near(pixels(Path("one")), pixels(Path("two"))) and len(index(Path("two"))) == 2
    settings = [json.loads((folder / "here" / name / "batch.json").read_text()) for name in ("one", "two")]
    assert settings[0] == settings[1], "a run may be gone on with by the other way"
    assert draw(source, Path("one"), Path("model.safetensors"), *flags, "--ray") == 0
