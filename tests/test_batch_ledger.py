"""What a batch's folder says is done: errors of rows as they are now, shards side by side, the flags it began with."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from sfumato.batch.ledger import Ledger, Outcome, outcomes, write_index
from tests.test_batch import ROWS, draw, error_line, index, table


def test_what_is_put_down_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"seed": 1}, {0: "a", 1: "b", 2: "c"})
    ledger.put(Outcome(1, error="no"))
    ledger.put(Outcome(0))
    ledger.close()
    again = Ledger(tmp_path, {"seed": 1}, {0: "a", 1: "b", 2: "c"})
    assert again.done == {0, 1} and again.failed == 1
    again.close()
    mended = Ledger(tmp_path, {"seed": 1}, {0: "a", 1: "other"})
    assert mended.done == {0}, "a row that failed and was changed is drawn"
    mended.close()


def told(folder: Path, marks: dict[int, str] | None = None) -> list[tuple[int, str | None]]:
    return [(outcome.row, outcome.error) for outcome in outcomes(folder, marks)]


def test_of_a_row_that_failed_as_it_was_and_as_it_is_the_last_is_told(tmp_path: Path) -> None:
    def fail(mark: str, shard: tuple[int, int], error: str | None) -> bool:
        ledger = Ledger(tmp_path, {}, {0: mark}, shard)
        is_over = 0 in ledger.done
        if not is_over:
            ledger.put(Outcome(0, error=error))
        ledger.close()
        return is_over

    assert not fail("old", (1, 1), "bad")
    assert not fail("new", (1, 2), "bad too"), "it was mended"
    assert fail("new", (1, 2), "never") and told(tmp_path) == [(0, "bad too")]
    assert fail("old", (1, 3), "never"), "as it was, it is over too"
    assert told(tmp_path, {0: "old"}) == [(0, "bad")] and told(tmp_path, {0: "new"}) == [(0, "bad too")]
    assert not fail("newer", (1, 2), None) and told(tmp_path) == [(0, None)]


def test_lines_without_a_time_are_from_before_all_others(tmp_path: Path) -> None:
    old = {"row": 0, "pictures": [], "error": "old", "mark": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(old | {"error": "older"}) + "\n" + json.dumps(old) + "\n")
    assert told(tmp_path) == [(0, "old")], "of one file the later line"
    (tmp_path / "rows-1-of-2.jsonl").write_text(json.dumps(old | {"error": "new", "time": 5.0}) + "\n")
    assert told(tmp_path) == [(0, "new")]


def test_shards_that_end_together_leave_an_index_of_all_rows(tmp_path: Path, monkeypatch) -> None:
    """One has read what is there and has not written yet, when the other's last row is over and it writes too."""
    from sfumato.batch import ledger

    marks = {0: "a", 1: "b"}
    one, other = Ledger(tmp_path, {}, {0: "a"}, (1, 2)), Ledger(tmp_path, {}, {1: "b"}, (2, 2))
    one.put(Outcome(0, error="x"))
    read, go = threading.Event(), threading.Event()

    def slow(*args):
        found = outcomes(*args)
        if threading.current_thread() is first:
            read.set()
            assert go.wait(60)
        return found

    monkeypatch.setattr(ledger, "outcomes", slow)
    first = threading.Thread(target=write_index, args=(tmp_path, False, marks))
    second = threading.Thread(target=write_index, args=(tmp_path, False, marks))
    first.start()
    assert read.wait(60)
    other.put(Outcome(1, error="y"))
    second.start()
    second.join(0.5)  # as long as the first is at it, the second waits
    go.set()
    first.join(60)
    second.join(60)
    assert [line["row"] for line in index(tmp_path)] == [0, 1]
    one.close()
    other.close()


def test_no_flag_that_changes_pictures_is_changed_in_a_folder(tmp_path, tiny_checkpoint, capsys) -> None:
    source, out, words = table(tmp_path / "t.jsonl", ROWS[:1]), tmp_path / "out", tmp_path / "words.txt"
    words.write_text("bad")
    assert draw(source, out, tiny_checkpoint) == 0
    capsys.readouterr()
    for flags, name in (
        (["--precision", "full"], "precision='full'"), (["--fast"], "fast=True"), (["--variant", "fp16"], "variant="),
        (["--refuse-words", str(words)], "refuse_words="), (["--adapters", str(tmp_path)], "adapters="),
    ):  # fmt: skip
        assert draw(source, out, tiny_checkpoint, *flags) == 2
        assert name in error_line(capsys)
    settings = out / "batch.json"
    known = json.loads(settings.read_text())
    assert known["precision"] == "autocast" and known["sign"] is None
    before = ("model", "seed", "job", "ema", "vae", "style_names", "wildcards", "no_choices", "safety", "watermark",
              "watermark_method")  # fmt: skip
    settings.write_text(json.dumps({name: known[name] for name in before}))
    assert draw(source, out, tiny_checkpoint) == 0, "what was not known was as it is usually"
    assert draw(source, out, tiny_checkpoint, "--precision", "full") == 2 and "precision" in error_line(capsys)
    settings.write_text("[]")
    assert draw(source, out, tiny_checkpoint) == 2 and "batch.json is damaged" in error_line(capsys)


def test_a_signature_is_told_by_its_public_key(tmp_path, tiny_checkpoint, capsys) -> None:
    pytest.importorskip("cryptography")
    from sfumato.safety.provenance import load_key, new_key, public_text

    source, out = table(tmp_path / "t.jsonl", ROWS[:1]), tmp_path / "out"
    for name in ("one", "two"):
        new_key(tmp_path / f"{name}.pem")
    assert draw(source, out, tiny_checkpoint, "--sign", str(tmp_path / "one.pem")) == 0
    assert json.loads((out / "batch.json").read_text())["sign"] == public_text(load_key(tmp_path / "one.pem"))
    (tmp_path / "one.pem").rename(tmp_path / "moved.pem")
    assert draw(source, out, tiny_checkpoint, "--sign", str(tmp_path / "moved.pem")) == 0
    capsys.readouterr()
    assert draw(source, out, tiny_checkpoint, "--sign", str(tmp_path / "two.pem")) == 2
    assert "sign=" in error_line(capsys)
    assert draw(source, out, tiny_checkpoint) == 2 and "sign=None" in error_line(capsys)
