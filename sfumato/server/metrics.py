"""What Prometheus may ask: requests, jobs by state, rows at work. One registry for each application."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sfumato.server.queue import Queue
from sfumato.server.service import Service

SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class _Now(Collector):
    """Figures that are looked up when they are asked for."""

    def __init__(self, queue: Queue, service: Service) -> None:
        self.queue, self.service = queue, service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("sfumato_jobs", "Jobs of the queue by state.", labels=["state"])
        for state, number in self.queue.counts().items():
            jobs.add_metric([state], number)
        yield jobs
        service, engine = self.service, self.service.pipeline.engine
        yield GaugeMetricFamily("sfumato_jobs_at_work", "Jobs that are being drawn here.", value=service.running)
        yield GaugeMetricFamily("sfumato_turns", "Turns of the engine since the start.", value=service.turns)
        yield GaugeMetricFamily("sfumato_max_rows", "Rows of a network call at most.", value=engine.max_rows)
        yield GaugeMetricFamily("sfumato_ready", "Whether pictures can be drawn.", value=float(service.alive))


class Metrics:
    """The figures of one application."""

    def __init__(self, queue: Queue, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(queue, service))
        self.requests = Counter(
            "sfumato_requests", "Requests by route and status.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "sfumato_request_seconds", "Seconds to the answer.", ["route"], buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
