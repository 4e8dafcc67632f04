"""Ray on this machine for tests, with patience: on a busy machine its helpers take minutes to begin."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

PATIENCE = 280.0  # s
MEMORY = 80 * 2**20  # bytes of Ray's store, nearly the least that it takes
SETTINGS = {  # how long Ray's own processes wait for one another
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_worker_register_timeout_seconds": "240",
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_gcs_server_request_timeout_seconds": "240",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
AGENT_PORTS = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port", "metrics_export_port")


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def patient(get: Callable[..., Any]) -> Callable[..., Any]:
    """Ray's question for a node that begins, asked until there is an answer: Ray 2.60 itself gives up after 30 s."""

    def found(*said: Any) -> Any:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return get(*said)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    return found


def told(params: Callable[..., Any], ports: dict[str, int]) -> Callable[..., Any]:
    """Ray's parameters, with the ports of its agents."""
    return lambda **given: params(**{**given, **ports})


def with_ports(start: Callable[[Any], None], ports: dict[str, int]) -> Callable[[Any], None]:
    """Ray's beginning of its processes, the ports of its agents written down where they themselves write them later.

    Its raylet 2.60 reads them there, and ends where they are not written within 15 s.
    """

    def started(node: Any) -> None:
        for name, port in ports.items():
            Path(node.get_session_dir_path(), f"{name}_{node.node_id}").write_text(str(port))
        start(node)

    return started


@contextmanager
def local_cluster() -> Iterator[Any]:
    """The module ray, with a cluster of two processors; the test is left out where Ray is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)  # some are read when Ray is imported
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    services, ports = ray._private.services, dict(zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)), strict=True))
    node = ray._private.node.Node
    with (
        patch.object(services, "get_node", patient(services.get_node)),
        patch.object(ray._private.parameter, "RayParams", told(ray._private.parameter.RayParams, ports)),
        patch.object(node, "start_ray_processes", with_ports(node.start_ray_processes, ports)),
    ):
        ray.init(
            address="local", num_cpus=2, object_store_memory=MEMORY, include_dashboard=False, log_to_driver=False
        )  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()
