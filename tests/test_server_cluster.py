"""Servers on a Ray cluster: replicas behind one address draw each job of a shared queue once, also where one dies."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sfumato.server import cluster
from sfumato.server.cluster import Scale, check_database, listen, read_scale, resources_of, wanted
from sfumato.server.queue import Queue
from tests.rays import PATIENCE, local_cluster

log = logging.getLogger(__name__)

PORT = 17861
JOBS = 12
LEASE = 20.0  # s, longer than a busy machine lets a living replica wait
ROOT = Path(__file__).parents[1]


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


class Stage:
    """Stands for Ray and its part serve: what is called is noted, applications are names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, address: tuple[str, int] | None, *applications: str) -> None:
        self.calls: list[Any] = []
        self.names = list(applications)
        self.during: Any = lambda: None  # what happens while replicas begin
        self.is_initialized = lambda: False
        self.cluster_resources = lambda: {"CPU": 2.0}
        self.init = lambda **named: self.calls.append(("init", named["address"]))
        for name in ("shutdown", "serve_shutdown", "start"):
            setattr(self, name, self.noted(name))
        serve = SimpleNamespace(
            start=self.start, run=self.run, delete=self.delete, shutdown=self.serve_shutdown, ingress=self.pass_on,
            deployment=lambda **_: lambda kind: SimpleNamespace(bind=lambda: kind),
            status=lambda: SimpleNamespace(applications=dict.fromkeys(self.names)),
        )  # fmt: skip
        monkeypatch.setattr(cluster, "cluster_library", lambda: self)
        monkeypatch.setattr(cluster, "serve_library", lambda: serve)
        monkeypatch.setattr(cluster, "address_of_serve", lambda: address)

    def noted(self, name: str) -> Any:
        return lambda *_, **__: self.calls.append(name)

    def pass_on(self, build: Any) -> Any:
        return lambda kind: kind

    def run(self, application: Any, name: str, route_prefix: str) -> None:
        self.calls.append("run")
        self.names.append(name)
        self.during()

    def delete(self, name: str, _blocking: bool) -> None:
        self.calls.append(f"delete {name}")
        self.names.remove(name)


def tell(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_replicas_begin_takes_them_away_and_nothing_else(monkeypatch, number) -> None:
    monkeypatch.setenv(cluster.ADDRESS, "10.0.0.1:6379")
    stage = Stage(monkeypatch, None, "theirs")
    stage.during = tell(number)
    cluster.run(dict, Scale())
    assert stage.calls == [("init", "10.0.0.1:6379"), "start", "run", "delete sfumato", "shutdown"]
    assert stage.names == ["theirs"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_signal_in_the_middle_of_rays_own_code_ends_as_well(monkeypatch) -> None:
    monkeypatch.setenv(cluster.ADDRESS, "10.0.0.1:6379")

    def wrapped() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as told:
            raise SystemError("returned a result with an exception set") from told

    stage = Stage(monkeypatch, None)
    stage.during = wrapped
    cluster.run(dict, Scale())
    assert stage.calls[-2:] == ["delete sfumato", "shutdown"]

    def broken() -> None:
        raise SystemError("a fault of its own") from KeyError(1)

    stage = Stage(monkeypatch, None)
    stage.during = broken
    with pytest.raises(SystemError, match="a fault of its own"):
        cluster.run(dict, Scale())
    assert stage.calls[-2:] == ["delete sfumato", "shutdown"]


def test_serve_ends_with_a_cluster_of_our_own(monkeypatch) -> None:
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    stage = Stage(monkeypatch, None)
    stage.during = tell(signal.SIGTERM)
    cluster.run(dict, Scale())
    assert stage.calls == [("init", "local"), "start", "run", "delete sfumato", "serve_shutdown", "shutdown"]


def test_where_nothing_was_begun_nothing_is_taken_away(monkeypatch) -> None:
    monkeypatch.setenv(cluster.ADDRESS, "auto")
    stage = Stage(monkeypatch, ("0.0.0.0", 8000), "theirs")
    with pytest.raises(ValueError, match="port=7861: Serve runs on the cluster already, on '0.0.0.0' and 8000"):
        cluster.run(dict, Scale())
    assert stage.calls == [("init", "auto"), "shutdown"]
    stage = Stage(monkeypatch, ("0.0.0.0", 8000), "sfumato")
    with pytest.raises(ValueError, match="an application 'sfumato' already"):
        cluster.run(dict, Scale(), "0.0.0.0", 8000)
    assert stage.calls == [("init", "auto"), "shutdown"] and stage.names == ["sfumato"]
    stage = Stage(monkeypatch, ("0.0.0.0", 8000), "theirs")
    stage.cluster_resources = lambda: {"GPU": 1.0}
    with pytest.raises(ValueError, match="the cluster has 1 GPUs"):
        cluster.run(dict, Scale(2, 2), "0.0.0.0", 8000)
    assert stage.calls == [("init", "auto"), "shutdown"]


def test_a_cluster_that_the_process_had_joined_before_is_left_as_it_was(monkeypatch) -> None:
    stage = Stage(monkeypatch, ("127.0.0.1", 7861), "theirs")
    stage.is_initialized = lambda: True

    def fail() -> None:
        raise RuntimeError("no replica began")

    stage.during = fail
    with pytest.raises(RuntimeError, match="no replica began"):
        cluster.run(dict, Scale())
    assert stage.calls == ["start", "run", "delete sfumato"] and stage.names == ["theirs"]


def test_ray_without_its_part_serve_is_told_in_the_line_that_says_so(monkeypatch) -> None:
    ray = ModuleType("ray")
    ray.is_initialized = ray.init = ray.shutdown = lambda **_: pytest.fail("nothing is begun")
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    with pytest.raises(ValueError, match="^ray: its part serve is not installed"):
        cluster.run(dict, Scale())


class Slow:
    """Stands for Serve where its proxies begin after Serve has given up waiting: `states`, one for each look."""

    def __init__(self, *states: dict[str, str]) -> None:
        self.states = list(states)

    def start(self, http_options: dict[str, Any]) -> None:
        raise TimeoutError("HTTP proxies not available")

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(proxies=self.states.pop(0) if len(self.states) > 1 else self.states[0])


def test_proxies_that_begin_late_are_waited_for_and_those_that_never_do_are_told(monkeypatch) -> None:
    slow = Slow({}, {"a": "STARTING", "b": "HEALTHY"}, {"a": "HEALTHY", "b": "HEALTHY"}, {"a": "UNHEALTHY"})
    listen(slow, "127.0.0.1", PORT)
    assert slow.states == [{"a": "UNHEALTHY"}], "it looked until both were ready"
    monkeypatch.setattr(cluster, "BEGINNING", 0.2)
    with pytest.raises(TimeoutError, match="HTTP proxies not available"):
        listen(slow, "127.0.0.1", PORT)


def ask(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """A cluster on which other people's application runs, and Serve on PORT."""

    class Theirs:
        async def __call__(self, request: Any) -> str:
            return "theirs"

    with local_cluster() as ray:
        serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
        listen(serve, "127.0.0.1", PORT)
        serve.run(
            serve.deployment(Theirs, ray_actor_options={"num_cpus": 0.1}).bind(), name="theirs", route_prefix="/theirs"
        )
        yield ray
        serve.shutdown()


BEGINNER = """
import sys, time
from sfumato.server import cluster
def make():
    time.sleep(600)
try:
    cluster.run(make, cluster.Scale(), port=int(sys.argv[1]), device="cpu")
except ValueError as error:
    print(error)
"""


def beginner(ray: Any, port: int) -> subprocess.Popen[str]:
    """A program that joins the cluster and begins a replica that is never ready."""
    env = {**os.environ, cluster.ADDRESS: ray.get_runtime_context().gcs_address, "PYTHONPATH": "."}
    words = [sys.executable, "-c", BEGINNER, str(port)]
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait, patiently, for machines that have other things to do."""
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.5)


@pytest.mark.services
def test_who_ends_on_a_shared_cluster_leaves_what_others_serve(shared: Any) -> None:
    from ray import serve

    with beginner(shared, PORT + 1) as refused:
        told, _ = refused.communicate(timeout=PATIENCE)
    assert f"port={PORT + 1}: Serve runs on the cluster already, on '127.0.0.1' and {PORT}" in told
    with beginner(shared, PORT) as begun:
        until(lambda: begun.poll() is not None or "sfumato" in serve.status().applications, "it has not begun")
        assert begun.poll() is None
        begun.send_signal(signal.SIGTERM)
        assert begun.wait(PATIENCE) == 0
    found = serve.status().applications
    assert list(found) == ["theirs"] and found["theirs"].status == "RUNNING"
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/theirs", timeout=60) as answer:
        assert answer.read() == b"theirs"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, shared: Any) -> Iterator[Path]:
    """The folder of two replicas on a tiny model. In `by` each notes what it claims and what it finishes."""
    data = tmp_path_factory.mktemp("served")

    def make() -> Any:
        import torch

        from sfumato.pipeline import Pipeline
        from sfumato.server.app import create_app
        from sfumato.server.desk import Desk, Settings

        torch.set_num_threads(1)
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
        desk = Desk(pipeline, Settings(data, url_of(data), rows=4))
        desk.queue.lease = LEASE
        finish, claim = desk.queue.finish, desk.queue.claim

        def note(what: str, id: str) -> None:
            with (data / "by").open("a") as file:
                file.write(f"{os.getpid()} {what} {id}\n")

        def claimed(*rest: Any) -> Any:
            entry = claim(*rest)
            if entry is not None:
                note("claimed", entry.id)
            return entry

        def finished(id: str, *rest: Any) -> bool:
            ended = finish(id, *rest)
            note("finished" if ended else "lost", id)
            return ended

        desk.queue.finish, desk.queue.claim = finished, claimed
        return create_app(desk)

    with cluster.replicas(shared, False, make, Scale(2, 2), port=PORT, device="cpu"):
        yield data


def url_of(data: Path) -> str:
    return f"sqlite:///{data / 'queue.db'}"


def notes(data: Path, what: str, ids: list[str]) -> list[tuple[int, str]]:
    """(process, job) of what the replicas have noted of these jobs."""
    lines = [line.split() for line in (data / "by").read_text().splitlines()] if (data / "by").exists() else []
    return [(int(pid), id) for pid, kind, id in lines if kind == what and id in ids]


def wait_for(data: Path, ids: list[str]) -> None:
    """Until all jobs are done, as the queue has it."""
    queue = Queue(url_of(data))
    until(lambda: all(queue.get(id).state == "done" for id in ids), "jobs are not done")
    queue.close()


def submit(count: int, steps: int) -> list[str]:
    return [ask("/v1/jobs", {"prompt": f"a {n}", "seed": n, "steps": steps})["id"] for n in range(count)]


@pytest.mark.services
def test_two_replicas_draw_each_job_once(served: Path) -> None:
    assert ask("/healthz")["ok"]
    began = time.monotonic()
    ids = submit(JOBS, 50)
    wait_for(served, ids)
    log.info("%d jobs in %.1f s", JOBS, time.monotonic() - began)
    found = notes(served, "finished", ids)
    assert sorted(id for _, id in found) == sorted(ids), "each is put down once"
    shares = Counter(pid for pid, _ in found)
    log.info("by replica: %s", dict(shares))
    assert len(shares) == 2, "both have drawn"
    assert all(len(ask(f"/v1/jobs/{id}")["results"]) == 1 for id in ids)


@pytest.mark.services
def test_what_a_killed_replica_had_is_drawn_by_another(served: Path) -> None:
    ids = submit(JOBS // 2, 120)

    def at_work() -> list[int]:
        ended = {id for _, id in notes(served, "finished", ids)}
        return [pid for pid, id in notes(served, "claimed", ids) if id not in ended]

    until(lambda: bool(at_work()), "nobody draws")
    dead = at_work()[0]
    os.kill(dead, signal.SIGKILL)
    before = {id for pid, id in notes(served, "finished", ids) if pid == dead}
    had = {id for pid, id in notes(served, "claimed", ids) if pid == dead} - before
    assert had, "it had something to draw"
    wait_for(served, ids)
    found = notes(served, "finished", ids)
    assert sorted(id for _, id in found) == sorted(ids), "each is put down once"
    assert all(pid != dead for pid, id in found if id in had)
    shares = dict(Counter(pid for pid, _ in found))
    log.info("%d jobs, by replica: %s; %d, which was killed, had %d", len(ids), shares, dead, len(had))

    def answers() -> bool:
        try:
            return all(len(ask(f"/v1/jobs/{id}")["results"]) == 1 for id in ids)
        except OSError:  # a request that was led to the dead one
            return False

    until(answers, "no replica answers")
