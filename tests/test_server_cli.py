"""`sfumato serve`: keys, pause and resume, and what it refuses before it loads anything."""

from pathlib import Path

import pytest

from sfumato.cli.main import main
from sfumato.server.keys import Keys
from sfumato.server.queue import Queue


def test_keys_are_added_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = ["--data", str(tmp_path)]
    assert main(["serve", "keys", "add", "ann", "--steps", "7", *data]) == 0
    key = capsys.readouterr().out.strip()
    user = Keys(tmp_path / "keys.json").user(key)
    assert user is not None and user.name == "ann" and user.limits.steps == 7 and user.limits.count == 64
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0, "nobody else may read it"
    assert main(["serve", "keys", "add", "ann", *data]) == 2 and "there is such a key" in capsys.readouterr().err
    for wrong in (["add", "../x"], ["add", "bob", "--steps", "0"], ["add"], ["remove", "bob"]):
        assert main(["serve", "keys", *wrong, *data]) == 2
    capsys.readouterr()
    assert main(["serve", "keys", "list", *data]) == 0 and capsys.readouterr().out == "ann\n"
    assert main(["serve", "keys", "remove", "ann", *data]) == 0
    assert Keys(tmp_path / "keys.json").user(key) is None


def test_a_damaged_file_of_keys_opens_nothing(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"ann": 1}', '{"ann": {"sha256": 1}}'):
        (tmp_path / "keys.json").write_text(content)
        with pytest.raises(ValueError, match="not a file of keys"):
            Keys(tmp_path / "keys.json").user("a")


def test_pause_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = ["--data", str(tmp_path)]
    assert main(["serve", "pause", *data]) == 2 and "there is no queue" in capsys.readouterr().err
    queue = Queue(f"sqlite:///{tmp_path / 'queue.db'}")
    assert main(["serve", "pause", *data]) == 0 and queue.paused
    assert main(["serve", "resume", *data]) == 0 and not queue.paused
    queue.close()


@pytest.mark.parametrize("flags, why", [
    (["--host", "0.0.0.0"], "without a key"), (["--max-rows", "0"], "max-rows=0"), (["--ckpt", "none.ckpt"], "none"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], why: str) -> None:
    assert main(["serve", "--data", str(tmp_path / "data"), *flags]) == 2
    assert why in capsys.readouterr().err
