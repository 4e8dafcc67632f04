"""Servers on a Ray cluster: replicas behind one address draw each job of a shared queue once, also where one dies."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfumato.server import cluster
from sfumato.server.cluster import Scale, check_database, read_scale, resources_of, wanted

log = logging.getLogger(__name__)

PORT = 17861
JOBS = 24


@pytest.mark.parametrize("text, scale", [("2", Scale(2, 2)), ("1-4", Scale(1, 4)), ("3-3", Scale(3, 3))])
def test_scales_are_read(text: str, scale: Scale) -> None:
    assert read_scale(text) == scale


@pytest.mark.parametrize("text", ["0", "", "a", "4-1", "0-3", "-2", "1-", "2 ", "99999"])
def test_wrong_scales_are_told(text: str) -> None:
    with pytest.raises(ValueError, match="replicas=.*1-4"):
        read_scale(text)


def test_replicas_need_a_database_that_they_share() -> None:
    with pytest.raises(ValueError, match="database: .*postgresql"):
        check_database(None)
    assert check_database("sqlite:///a.db") == "sqlite:///a.db"


def a_cluster(**has: float) -> Any:
    return SimpleNamespace(cluster_resources=lambda: has)


def test_a_replica_has_a_gpu_where_there_are_such_and_else_a_share_of_the_processors() -> None:
    assert resources_of(a_cluster(CPU=8.0, GPU=4.0), None, None) == (4, {"num_gpus": 1})
    assert resources_of(a_cluster(CPU=8.0, GPU=4.0), 2, "cuda") == (2, {"num_gpus": 1})
    assert resources_of(a_cluster(CPU=8.0, GPU=4.0), 2, "cpu") == (2, {"num_cpus": 1.0})
    number, reserved = resources_of(a_cluster(CPU=2.0), 4, None)
    assert number == 4 and 4 * reserved["num_cpus"] <= 2.0
    assert resources_of(a_cluster(CPU=2.0), None, None) == (1, {"num_cpus": 1.0})
    with pytest.raises(ValueError, match="replicas=5: the cluster has 4 GPUs"):
        resources_of(a_cluster(GPU=4.0), 5, None)
    with pytest.raises(ValueError, match="replicas=0"):
        resources_of(a_cluster(GPU=4.0), 0, None)


@pytest.mark.parametrize("told, number", [
    ({}, 1), ({"a": 0.0}, 1), ({"a": 16.0}, 1), ({"a": 17.0, "b": 15.0}, 2), ({"a": 60.0}, 4), ({"a": 9000.0}, 5),
])  # fmt: skip
def test_there_are_as_many_replicas_as_the_unfinished_jobs_are_worth(told: dict[str, float], number: int) -> None:
    context = SimpleNamespace(
        aggregated_metrics={cluster.UNFINISHED: told} if told else None,
        config=SimpleNamespace(target_ongoing_requests=16),
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
    )
    assert wanted(context) == (number, {})


def ask(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Path]:
    """The folder of two replicas on a tiny model. In `by` each notes what it finishes, in `pids` that it began."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    data = tmp_path_factory.mktemp("served")

    def make() -> Any:
        from sfumato.pipeline import Pipeline
        from sfumato.server.app import create_app
        from sfumato.server.desk import Desk, Settings

        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
        desk = Desk(pipeline, Settings(data, f"sqlite:///{data / 'queue.db'}", rows=4))
        desk.queue.lease = 5.0
        finish = desk.queue.finish

        def noted(id: str, *rest: Any) -> bool:
            ended = finish(id, *rest)
            with (data / "by").open("a") as file:
                file.write(f"{os.getpid()} {id} {ended}\n")
            return ended

        desk.queue.finish = noted
        with (data / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return create_app(desk)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    cluster.begin(make, Scale(2, 2), port=PORT, device="cpu")
    yield data
    cluster.end()


def finished(ids: list[str], seconds: float = 240.0) -> list[dict[str, Any]]:
    """The jobs once all are done."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [ask(f"/v1/jobs/{id}") for id in ids]
        if all(job["state"] == "done" for job in found):
            return found
        time.sleep(0.2)
    raise AssertionError(Counter(job["state"] for job in found))


@pytest.mark.services
def test_two_replicas_draw_each_job_once(served: Path) -> None:
    assert len(set((served / "pids").read_text().split())) == 2
    assert ask("/healthz")["ok"]
    began = time.monotonic()
    ids = [ask("/v1/jobs", {"prompt": f"a {n}", "seed": n, "steps": 12})["id"] for n in range(JOBS)]
    jobs = finished(ids)
    log.info("%d jobs in %.1f s", JOBS, time.monotonic() - began)
    lines = [line.split() for line in (served / "by").read_text().splitlines()]
    assert sorted(id for _, id, ended in lines if ended == "True") == sorted(ids), "each is put down once"
    shares = Counter(pid for pid, _, _ in lines)
    log.info("by replica: %s", dict(shares))
    assert len(shares) == 2, "both have drawn"
    assert all(len(job["results"]) == 1 for job in jobs)


@pytest.mark.services
def test_what_a_killed_replica_had_is_drawn_by_the_other(served: Path) -> None:
    dead = int((served / "pids").read_text().split()[0])
    ids = [ask("/v1/jobs", {"prompt": f"b {n}", "seed": n, "steps": 20})["id"] for n in range(JOBS // 2)]
    os.kill(dead, signal.SIGKILL)
    end = time.monotonic() + 240
    while True:
        try:
            finished(ids, max(0.1, end - time.monotonic()))
            break
        except (OSError, urllib.error.HTTPError):  # the requests that were at the replica
            assert time.monotonic() < end
            time.sleep(0.5)
    lines = [line.split() for line in (served / "by").read_text().splitlines()]
    assert sorted(id for _, id, ended in lines if ended == "True" and id in ids) == sorted(ids)
