"""Servers on a Ray cluster: the application of `app.py` as replicas behind one address, each with an engine of its own.

All share a database and a folder; each claims jobs from the queue under leases, so that a replica that dies loses
nothing. How many there are may follow how many jobs are unfinished. Knows no flags and loads no model.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

INSTALL = 'pip install "sfumato[cluster]"'
NAME = "sfumato"
UNFINISHED = "unfinished"  # jobs that wait or are drawn, as every replica tells the cluster
JOBS_OF_A_REPLICA = 16  # unfinished ones for which one more replica is worth while
MAX_REQUESTS = 1000  # of a replica at once: most wait for a job, and cost nothing
DOWN_AFTER = 120.0  # s with less to do before a replica ends
BEGINNING = 240.0  # s beyond the minute that Serve gives its proxies: they take so long on a busy machine
ENDING = 30.0  # s beyond its grace in which a replica has ended
ADDRESS = "RAY_ADDRESS"
SIGNALS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
SCALE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class Scale:
    """How many replicas there are: from `least` to `most`, by how much there is to do."""

    least: int = 1
    most: int = 1


def read_scale(text: str) -> Scale:
    """`2`, or `1-4` for as many as there is work for. ValueError where it is no such."""
    found = SCALE.fullmatch(text)
    scale = Scale() if found is None else Scale(int(found[1]), int(found[2] or found[1]))
    if found is None or not 1 <= scale.least <= scale.most:
        raise ValueError(f"replicas={text!r}: a number from 1 on, or a range such as 1-4, is needed")
    return scale


def cluster_library() -> Any:
    """The module ray; ValueError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"ray: it is not installed ({INSTALL})") from error
    return ray


def serve_library() -> Any:
    """Ray's part serve; ValueError where it is not installed."""
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError(f"ray: its part serve is not installed ({INSTALL})") from error
    return serve


class Joined(NamedTuple):
    """How a process came to its cluster: whether just now, and whether by starting one of its own."""

    is_new: bool
    is_own: bool


def join_cluster(ray: Any) -> Joined:
    """Join the cluster of $RAY_ADDRESS, else start one on this machine for as long as the process lives.

    `auto` there is the one that was started on this machine before, which is not joined unasked. A process that has
    joined one stays there.
    """
    if ray.is_initialized():
        return Joined(False, False)
    address = os.environ.get(ADDRESS) or "local"
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    return Joined(True, address == "local")


@contextmanager
def joined(ray: Any) -> Iterator[bool]:
    """The cluster, for the time of a block where it is joined for that; gives whether it is the process's own."""
    was_there = ray.is_initialized()
    try:
        yield join_cluster(ray).is_own
    finally:
        if not was_there:
            ray.shutdown()


def resources_of(ray: Any, replicas: int | None, device: str | None) -> tuple[int, dict[str, float]]:
    """How many replicas, and what each reserves: a GPU where there are such and `device` is none else, or a CPU.

    None asks for one for each GPU, or one. ValueError where there are fewer GPUs than replicas.
    """
    if replicas is not None and replicas < 1:
        raise ValueError(f"replicas={replicas}: 1 or more are needed")
    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0)) if device is None or device.startswith("cuda") else 0
    if gpus:
        if (replicas or 1) > gpus:
            raise ValueError(f"replicas={replicas}: the cluster has {gpus} GPUs, and each replica needs one")
        return replicas or gpus, {"num_gpus": 1}
    wanted = replicas or 1
    return wanted, {"num_cpus": min(1.0, max(0.01, 0.9 * has.get("CPU", 1.0) / wanted))}


def wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """How many replicas the unfinished jobs are worth: Ray Serve's autoscaling policy, with an empty state.

    `context` is its AutoscalingContext, in whose configuration a replica's share is `target_ongoing_requests`.
    """
    told = (context.aggregated_metrics or {}).get(UNFINISHED, {})
    jobs = max(told.values(), default=0.0)  # all tell of one queue, at slightly different times
    number = math.ceil(jobs / context.config.target_ongoing_requests)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, number)), {}


def deployment_of(
    serve: Any, make: Callable[[], Any], scale: Scale, reserved: dict[str, float], grace: float = 10.0
) -> Any:
    """The application that `make` builds in each replica, as Ray Serve deploys it.

    A replica that ends has `grace` s for what is at work; what is not done then waits in the queue.
    """

    def build() -> Any:
        return make()

    class Front:
        """A replica, which tells how much there is to do."""

        app: Any  # Ray's, once it is built

        def record_autoscaling_stats(self) -> dict[str, float]:
            counts = self.app.state.desk.queue.counts()
            return {UNFINISHED: float(counts["queued"] + counts["running"])}

    if scale.least == scale.most:
        number: dict[str, Any] = {"num_replicas": scale.least}
    else:
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.least, max_replicas=scale.most, target_ongoing_requests=JOBS_OF_A_REPLICA,
                downscale_delay_s=DOWN_AFTER, policy=AutoscalingPolicy(policy_function=f"{__name__}:wanted"),
            )
        }  # fmt: skip
    return serve.deployment(
        name=NAME, ray_actor_options=reserved, max_ongoing_requests=MAX_REQUESTS,
        graceful_shutdown_timeout_s=grace + 10, **number,
    )(serve.ingress(build)(Front))  # fmt: skip


def address_of_serve() -> tuple[str, int] | None:
    """The host and port on which Serve listens on the cluster; None where it does not run."""
    from ray.serve.context import _get_global_client  # no public function tells

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def check_room(serve: Any, host: str, port: int) -> None:
    """ValueError where other people's applications on the cluster are in the way."""
    at = address_of_serve()
    if at is None:
        return
    if at != (host, port):
        raise ValueError(
            f"host={host!r}, port={port}: Serve runs on the cluster already, on {at[0]!r} and {at[1]}; ask for these"
        )
    if NAME in serve.status().applications:
        raise ValueError(
            f"ray: the cluster serves an application {NAME!r} already; end that first, "
            f"as by ray.serve.delete({NAME!r}), or take another cluster"
        )


def listen(serve: Any, host: str, port: int) -> None:
    """Have Serve listen, where it does not yet. TimeoutError where its proxies do not begin."""
    try:
        serve.start(http_options={"host": host, "port": port})
    except TimeoutError:  # it goes on beginning
        log.warning("Serve's proxies have not begun within a minute; waiting")
        end = time.monotonic() + BEGINNING
        while not (states := serve.status().proxies) or any(state != "HEALTHY" for state in states.values()):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def replicas(
    ray: Any,
    is_own: bool,
    make: Callable[[], Any],
    scale: Scale,
    host: str = "127.0.0.1",
    port: int = 7861,
    device: str | None = None,
    grace: float = 10.0,
) -> Iterator[None]:
    """Serve on `host` and `port` for the time of a block, on a cluster that was joined. `make` builds the application.

    Whatever ends it, the application is taken away again; Serve itself only on a cluster of our own (`is_own`).
    """
    serve = serve_library()
    check_room(serve, host, port)
    reserved = resources_of(ray, scale.most, device)[1]
    listen(serve, host, port)
    application = deployment_of(serve, make, scale, reserved, grace).bind()
    try:
        serve.run(application, name=NAME, route_prefix="/")
        log.info("serving on http://%s:%d, replicas: %d to %d", host, port, scale.least, scale.most)
        yield
    finally:
        _end(serve, grace + ENDING)
        if is_own:
            serve.shutdown()


def _end(serve: Any, seconds: float) -> None:
    """Take our application away, and no other; its replicas have `seconds` s."""
    end = time.monotonic() + seconds
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications:
        if time.monotonic() > end:
            log.warning("the replicas have not ended within %.0f s", seconds)
            return
        time.sleep(0.1)


class _Told(BaseException):
    """SIGINT or SIGTERM told to end."""


def _listen() -> None:
    """From here on the first SIGINT or SIGTERM raises _Told where the process is; a second ends it at once."""

    def tell(number: int, frame: FrameType | None) -> None:
        _forget()
        raise _Told

    for number in SIGNALS:
        signal.signal(number, tell)


def _forget() -> None:
    """From here on SIGINT and SIGTERM do what they do where nobody listens."""
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


def run(
    make: Callable[[], Any],
    scale: Scale,
    host: str = "127.0.0.1",
    port: int = 7861,
    device: str | None = None,
    grace: float = 10.0,
) -> None:
    """Serve with replicas until SIGINT or SIGTERM tells to end, which may be while they begin; main thread only."""
    ray = cluster_library()
    serve_library()
    try:
        _listen()
        with joined(ray) as is_own:
            _listen()  # Ray has set a handler of its own
            with replicas(ray, is_own, make, scale, host, port, device, grace):
                threading.Event().wait()
    except (_Told, SystemError) as error:
        if not isinstance(error, _Told) and not isinstance(error.__cause__, _Told):
            raise
        log.info("ended")  # a SystemError is what Ray makes of it in the middle of its own C++
    finally:
        _forget()


def check_database(url: str | None) -> str:
    """The database that replicas share; ValueError where there is none."""
    if url is None:
        raise ValueError(
            "database: --ray needs one that all replicas share, such as postgresql+psycopg://...; "
            "on one machine sqlite:///FILE does"
        )
    return url
