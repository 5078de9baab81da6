"""The store: every query stands in one of its parts. The rules that make jobs durable stand there too:

- a claim takes a lease, counts the attempt and raises the fencing number, in one conditional UPDATE;
- whose turn it is, the database says, and no message: priority first, then fair among tenants (`tpo.jobs.order`);
- whatever a worker writes is fenced: it touches no row once another worker has claimed the job;
- a checkpoint writes the call, its candidates, the events and the progress in one transaction;
- what a client reads and writes is its tenant's own;
- all times are the database's.
"""

from typing import Self

from sqlalchemy import select

from tpo.jobs.batch_requests import BatchRequestQueries
from tpo.jobs.batches import BatchQueries
from tpo.jobs.clients import Submitted, new_job_id
from tpo.jobs.database import now, reading
from tpo.jobs.deliveries import DeliveryQueries
from tpo.jobs.feed import FeedQueries, News
from tpo.jobs.files import FileQueries
from tpo.jobs.keys import KeyQueries
from tpo.jobs.lifecycle import LifecycleQueries, extended, retried
from tpo.jobs.once import Once
from tpo.jobs.order import Rules
from tpo.jobs.outcomes import Outcome, outcome_of_deadline, outcome_of_run
from tpo.jobs.quotas import Limits, QuotaQueries, Room
from tpo.jobs.sweeper import Bell, SweeperQueries
from tpo.jobs.tables import DEFAULT_TENANT
from tpo.jobs.turns import Claimed, Pair, QueueInfo, TurnQueries
from tpo.jobs.webhooks import WebhookQueries
from tpo.jobs.workers import Flags, Lease, WorkerQueries


class Store(
    BatchQueries,
    BatchRequestQueries,
    LifecycleQueries,
    FileQueries,
    WorkerQueries,
    TurnQueries,
    SweeperQueries,
    KeyQueries,
    QuotaQueries,
    FeedQueries,
    WebhookQueries,
    DeliveryQueries,
):
    """Jobs in one database, for many threads. Every method raises StoreUnavailable when it cannot be reached."""

    def of(self, tenant: str) -> Self:
        """The same store as one tenant sees it."""
        return type(self)(self._engine, tenant)

    def ping(self) -> None:
        """Ask the database for a sign of life."""
        with reading(self._engine) as session:
            session.execute(select(now()))


__all__ = [
    "DEFAULT_TENANT",
    "Bell",
    "Claimed",
    "Flags",
    "Lease",
    "Limits",
    "News",
    "Once",
    "Outcome",
    "Pair",
    "QueueInfo",
    "Room",
    "Rules",
    "Store",
    "Submitted",
    "extended",
    "new_job_id",
    "outcome_of_deadline",
    "outcome_of_run",
    "retried",
]
