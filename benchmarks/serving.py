"""Many users at once against one at a time, over HTTP; and a server that is killed again and again.

`python benchmarks/serving.py` lets 16 clients ask the box for pictures of mixed steps, samplers and prompts, of a
server that merges them and of one that draws each job alone (--deterministic); it prints a table and writes JSON to
benchmarks/results/. `--kill 20` kills a server so often while it draws 200 jobs, and compares with the undisturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch

from sfumato.pipeline import Pipeline, recipe
from sfumato.server.keys import Keys
from sfumato.server.queue import Queue
from sfumato.server.worker import png_of
from sfumato.tasks.checks import job_from_dict

RESULTS = Path(__file__).parent / "results"
SAMPLERS = ("euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_sde", "ddim", "lms")
WORDS = ("a red apple", "a blue cup on a table", "a green tree", "two yellow stars", "a brown dog", "a pink house")
OVER = ("done", "failed", "cancelled")
START_SECONDS = 120.0


class Orders:
    """`count` jobs of mixed prompts, samplers and steps, up to `longest` of those; the same for the same generator."""

    def __init__(self, count: int, generator: random.Random, longest: int = 30) -> None:
        self.plain = [self._order(number, generator, longest) for number in range(count)]

    @staticmethod
    def _order(number: int, generator: random.Random, longest: int) -> dict[str, Any]:
        return {
            "prompt": generator.choice(WORDS), "sampler": generator.choice(SAMPLERS), "seed": number,
            "steps": generator.randint(max(2, longest // 4), longest), "guidance": generator.choice((1.5, 4.0, 7.0)),
        }  # fmt: skip


class Server:
    """A process of `sfumato serve` on a folder, which may be started again on the same port."""

    def __init__(self, data: Path, flags: Sequence[str] = ()) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.data, self.url = data, f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "sfumato.cli.main", "serve", "--port", str(self.port)]
        self._command += ["--data", str(data), *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.url, timeout=60)
        data.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start it and wait until it can draw."""
        with (self.data / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                if self.http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise RuntimeError(f"the server did not start: {(self.data / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end."""
        self._end(signal.SIGTERM)

    def _end(self, what: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(what)
            self._process.wait(60)


@dataclass
class Told:
    """What became of a server that was killed: the SHA-256 of the pictures of each order, and how it went."""

    pictures: list[list[str]]
    kills: int
    jobs: int
    crashed_jobs: int
    seconds: float


def drawn_alone(orders: Orders, checkpoint: Path | None = None) -> list[list[str]]:
    """The SHA-256 of each order's PNG files, drawn here one after another."""
    pipeline = Pipeline.from_pretrained(checkpoint, adapters=[])
    found = []
    for plain in orders.plain:
        result = pipeline.draw(job_from_dict(plain))
        contents = [png_of(image, recipe(result, index)) for index, image in enumerate(result.images)]
        found.append([hashlib.sha256(content).hexdigest() for content in contents])
    return found


def kill_often(server: Server, orders: Orders, kills: int, generator: random.Random) -> Told:
    """Order everything while the server is killed so often, at moments spread over the work; what is there in the end.

    An order whose answer is lost is sent again with the same idempotency key, as any careful client does.
    """
    began = time.perf_counter()
    server.start()
    ids: list[str] = [""] * len(orders.plain)

    def order_all() -> None:
        client = httpx.Client(base_url=server.url)
        for number, plain in enumerate(orders.plain):
            headers = {"Idempotency-Key": f"order {number}"}
            while not ids[number]:
                try:
                    answer = client.post("/v1/jobs", json=plain, headers=headers)
                    ids[number] = answer.raise_for_status().json()["id"]
                except (httpx.TransportError, httpx.HTTPStatusError):
                    time.sleep(0.1)

    ordering = threading.Thread(target=order_all, daemon=True)
    ordering.start()
    for kill in range(kills):
        _wait_for(server, (kill + 0.5) / (kills + 0.5) * len(ids) * 0.95)
        time.sleep(0.3 * generator.random())
        server.kill()
        server.start()
    ordering.join(START_SECONDS)
    _wait_for(server, len(ids))
    server.stop()
    queue = Queue(f"sqlite:///{server.data / 'queue.db'}")
    entries = [queue.get(id) for id in ids]
    counted, crashed = sum(queue.counts().values()), sum(1 for entry in entries if entry and entry.crashes)
    queue.close()
    pictures = [list(entry.results) if entry and entry.state == "done" else [] for entry in entries]
    for name in (name for names in pictures for name in names):
        content = (server.data / "results" / f"{name}.png").read_bytes()
        if hashlib.sha256(content).hexdigest() != name:
            raise RuntimeError(f"{name}: its content is another")
    return Told(pictures, kills, counted, crashed, time.perf_counter() - began)


def _wait_for(server: Server, number: float, seconds: float = 3600.0) -> None:
    """Wait until so many jobs are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lines = server.http.get("/metrics").text.splitlines()
        states = dict(line.rsplit(" ", 1) for line in lines if line.startswith("sfumato_jobs{"))
        if sum(float(states.get(f'sfumato_jobs{{state="{state}"}}', 0)) for state in OVER) >= number:
            return
        time.sleep(0.1)
    raise RuntimeError(f"not {number} jobs are over after {seconds} s")


@dataclass
class Client:
    """One user who asks for one picture after the other, and how long each took."""

    url: str
    key: str
    orders: list[dict[str, Any]]
    waits: list[float] = field(default_factory=list)
    failed: int = 0

    def run(self) -> None:
        """Order, wait, order the next."""
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=600) as client:
            for plain in self.orders:
                began = time.perf_counter()
                id = client.post("/v1/jobs", json=plain).raise_for_status().json()["id"]
                state = ""
                with client.stream("GET", f"/v1/jobs/{id}/events", params={"preview": False}) as stream:
                    for line in stream.iter_lines():
                        if line.startswith("data: ") and '"state"' in line:
                            state = json.loads(line.removeprefix("data: "))["state"]
                self.waits.append(time.perf_counter() - began)
                self.failed += state != "done"


def measure(clients: int, orders: Orders, flags: Sequence[str]) -> dict[str, float]:
    """Pictures a second and seconds of waiting where so many clients share the orders."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Keys(Path(folder) / "keys.json")
        each = [keys.add(f"client-{number}", requests=100_000) for number in range(clients)]
        server = Server(Path(folder), flags)
        server.start()
        try:
            people = [Client(server.url, key, orders.plain[number::clients]) for number, key in enumerate(each)]
            threads = [threading.Thread(target=person.run) for person in people]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - began
        finally:
            server.stop()
    waits = sorted(wait for person in people for wait in person.waits)
    if len(waits) != len(orders.plain) or any(person.failed for person in people):
        raise RuntimeError(f"{len(waits)} of {len(orders.plain)} jobs ended, or some failed")
    return {
        "pictures a second": len(waits) / seconds, "seconds": seconds, "p50 wait": statistics.median(waits),
        "p95 wait": waits[min(len(waits) - 1, int(0.95 * len(waits)))], "worst wait": waits[-1],
    }  # fmt: skip


def _keep(name: str, figures: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{date.today().isoformat()}.json"
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    said = {"machine": machine | {"torch": torch.__version__}, **figures}
    path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print(path)


def compare(args: argparse.Namespace) -> None:
    """16 clients against one at a time."""
    orders = Orders(args.clients * args.each, random.Random(0), args.longest)
    flags = [*(["--ckpt", args.ckpt] if args.ckpt else [])]
    rows = {
        "merged": measure(args.clients, orders, flags),
        "one at a time": measure(args.clients, orders, [*flags, "--deterministic"]),
    }
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"  {key} {value:.2f}" for key, value in row.items()))
    ratio = rows["merged"]["pictures a second"] / rows["one at a time"]["pictures a second"]
    print(f"throughput ratio {ratio:.2f}")
    asked = {"clients": args.clients, "jobs": len(orders.plain), "longest": args.longest}
    _keep("serving", {"asked": asked, "figures": rows, "throughput ratio": ratio})


def torment(args: argparse.Namespace) -> None:
    """Kill a server again and again, and compare."""
    orders = Orders(args.jobs, random.Random(0), args.longest)
    expected = drawn_alone(orders, args.ckpt)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--deterministic", *(["--ckpt", args.ckpt] if args.ckpt else [])]
        server = Server(Path(folder), flags)
        try:
            told = kill_often(server, orders, args.kill, random.Random(1))
        finally:
            server.stop()
    same = sum(found == wanted for found, wanted in zip(told.pictures, expected, strict=True))
    print(
        f"{told.kills} kills, {told.jobs} jobs, {same} with the undisturbed pictures, {told.crashed_jobs} drawn again"
    )
    _keep("serving-kills", {
        "kills": told.kills, "orders": len(orders.plain), "jobs in the queue": told.jobs, "same pictures": same,
        "jobs that were at work at a kill": told.crashed_jobs, "seconds": told.seconds,
    })  # fmt: skip
    if same != len(orders.plain) or told.jobs != len(orders.plain):
        raise SystemExit("jobs were lost, doubled or changed")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=8, help="jobs of each client")
    parser.add_argument("--longest", type=int, default=30, help="steps at most")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill a server N times instead")
    parser.add_argument("--jobs", type=int, default=200, help="of the server that is killed")
    parser.add_argument("--ckpt", help="another model than the box")
    args = parser.parse_args()
    torment(args) if args.kill else compare(args)


if __name__ == "__main__":
    main()
