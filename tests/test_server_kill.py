"""Killed at any moment and started again, a server finishes every accepted job, once, with the undisturbed pictures."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.serving import Orders, Server, drawn_alone, kill_often


def test_a_killed_server_finishes_every_job_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    orders = Orders(16, random.Random(0), longest=12)
    expected = drawn_alone(orders, tiny_checkpoint)
    server = Server(tmp_path / "data", ["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--deterministic"])
    try:
        told = kill_often(server, orders, kills=2, generator=random.Random(1))
    finally:
        server.stop()
    assert told.pictures == expected
    assert told.kills == 2 and told.crashed_jobs >= 1, "some job was at work when the server was killed"
    assert told.jobs == 16, "each was accepted once, also where the answer was lost"
