"""What Prometheus reads: the requests of this process, who listens to it, and the queue of each policy."""

from collections.abc import Sequence
from http import HTTPMethod

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.types import Scope

from tpo.jobs.queues import QueueInfo


class Metrics:
    """Counts what one process answers. Its labels hold addresses as they are described: no id, no text."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "tpo_http_request_seconds",
            "Requests that were answered, and how long each took to its last byte",
            ["method", "route", "status"],
            registry=self._registry,
        )

    def observe_request(self, scope: Scope, status: int, seconds: float) -> None:
        """One request has ended."""
        method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "other"
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(method, route, str(status)).observe(seconds)

    def render(self, queues: Sequence[QueueInfo] | None, listeners: int) -> bytes:
        """Everything in Prometheus' text format; without `queues` the database is away."""
        now = CollectorRegistry()
        Gauge("tpo_event_listeners", "Streams that are open in this process", registry=now).set(listeners)
        Gauge("tpo_database_up", "Whether the database answers", registry=now).set(queues is not None)
        gauges = {
            "waiting": Gauge("tpo_jobs_waiting", "Jobs that wait for a worker", ["model"], registry=now),
            "running": Gauge("tpo_jobs_running", "Jobs that run", ["model"], registry=now),
            "quarantined": Gauge(
                "tpo_jobs_in_quarantine", "Jobs suspected of having killed their worker", ["model"], registry=now
            ),
            "workers": Gauge("tpo_workers", "Workers that live", ["model"], registry=now),
        }
        for queue in queues or ():
            for name, gauge in gauges.items():
                gauge.labels(queue.model).set(getattr(queue, name))
        return generate_latest(self._registry) + generate_latest(now)
