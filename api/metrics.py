"""Prometheus metrics: the requests of this process, its open event streams, and the queue of each policy."""

from collections.abc import Sequence
from http import HTTPMethod

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.types import Scope

from tpo.jobs.queues import QueueInfo


class Metrics:
    """Measures the requests of one process. Labels contain route templates, never ids or texts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "tpo_http_request_seconds",
            "HTTP requests and their duration until the last byte of the response",
            ["method", "route", "status"],
            registry=self._registry,
        )

    def observe_request(self, scope: Scope, status: int, seconds: float) -> None:
        """Record a finished request and its duration."""
        method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "other"
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(method, route, str(status)).observe(seconds)

    def render(self, queues: Sequence[QueueInfo] | None, listeners: int, rescue_delay: float) -> bytes:
        """Return all metrics in Prometheus' text format. `queues` is None if the database cannot be reached."""
        now = CollectorRegistry()
        Gauge("tpo_event_listeners", "Open event streams and long polls of this process", registry=now).set(listeners)
        Gauge("tpo_database_up", "1 if the database can be reached, else 0", registry=now).set(queues is not None)
        delay = Gauge(
            "tpo_rescue_delay_seconds", "Time that the oldest expired lease has waited for the rescuer", registry=now
        )
        delay.set(rescue_delay)
        gauges = {
            "waiting": Gauge("tpo_jobs_waiting", "Jobs waiting for a worker", ["model"], registry=now),
            "running": Gauge("tpo_jobs_running", "Running jobs", ["model"], registry=now),
            "quarantined": Gauge(
                "tpo_jobs_in_quarantine", "Jobs suspected of having killed their worker", ["model"], registry=now
            ),
            "workers": Gauge("tpo_workers", "Live workers", ["model"], registry=now),
        }
        for queue in queues or ():
            for name, gauge in gauges.items():
                gauge.labels(queue.model).set(getattr(queue, name))
        return generate_latest(self._registry) + generate_latest(now)
