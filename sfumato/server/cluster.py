"""Servers on a Ray cluster: the application of `app.py` as replicas behind one address, each with an engine of its own.

All share a database and a folder; each claims jobs from the queue under leases, so that a replica that dies loses
nothing. How many there are may follow how many jobs are unfinished. Knows no flags and loads no model.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

INSTALL = 'pip install "sfumato[cluster]"'
NAME = "sfumato"
UNFINISHED = "unfinished"  # jobs that wait or are drawn, as every replica tells the cluster
JOBS_OF_A_REPLICA = 16  # unfinished ones for which one more replica is worth while
MAX_REQUESTS = 1000  # of a replica at once: most wait for a job, and cost nothing
DOWN_AFTER = 120.0  # s with less to do before a replica ends
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


def join_cluster(ray: Any) -> bool:
    """Join the cluster of $RAY_ADDRESS, else start one on this machine for as long as the process lives.

    False where the process has joined one before.
    """
    if ray.is_initialized():
        return False
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    return True


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
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

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


def begin(
    make: Callable[[], Any],
    scale: Scale,
    host: str = "127.0.0.1",
    port: int = 7861,
    device: str | None = None,
    grace: float = 10.0,
) -> None:
    """Serve on `host` and `port`; returns once the replicas are ready. `make` builds the application in each."""
    ray = cluster_library()
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError(f"ray: its part serve is not installed ({INSTALL})") from error
    join_cluster(ray)
    reserved = resources_of(ray, scale.most, device)[1]
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment_of(serve, make, scale, reserved, grace).bind(), name=NAME, route_prefix="/")
    log.info("serving on http://%s:%d, replicas: %d to %d", host, port, scale.least, scale.most)


def end() -> None:
    """End the replicas, each with its grace; the cluster is left."""
    ray = cluster_library()
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def run(
    make: Callable[[], Any],
    scale: Scale,
    host: str = "127.0.0.1",
    port: int = 7861,
    device: str | None = None,
    grace: float = 10.0,
) -> None:
    """Serve as `begin` does until SIGINT or SIGTERM tells to end."""
    told = threading.Event()
    try:
        begin(make, scale, host, port, device, grace)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: told.set())
        told.wait()
    finally:
        end()


def check_database(url: str | None) -> str:
    """The database that replicas share; ValueError where there is none."""
    if url is None:
        raise ValueError(
            "database: --ray needs one that all replicas share, such as postgresql+psycopg://...; "
            "on one machine sqlite:///FILE does"
        )
    return url
