"""The store: all queries, composed of one part for each feature. It holds the rules that make jobs durable:

- a claim takes a lease, counts the attempt and raises the fencing number, in one conditional UPDATE;
- the database decides which job is next, and no message does: priority first, then fairness among tenants
  (`tpo.jobs.scheduling`);
- every write of a worker is fenced: it changes no row after another worker has claimed the job;
- a checkpoint writes the call, its candidates, the events and the progress in one transaction;
- clients read and write only what belongs to their tenant;
- all times are the database's.
"""

from typing import Self

from sqlalchemy import Engine, select

from tpo.batches.files import FileQueries
from tpo.batches.requests import BatchQueries
from tpo.db import DEFAULT_TENANT, now, reading
from tpo.jobs.claims import LeaseQueries
from tpo.jobs.event_reader import EventQueries
from tpo.jobs.lifecycle import JobQueries
from tpo.jobs.maintenance import MaintenanceQueries
from tpo.jobs.queues import QueueQueries
from tpo.jobs.workers import WorkerQueries
from tpo.tenants.idempotency import IdempotencyQueries
from tpo.tenants.keys import KeyQueries
from tpo.tenants.tenants import TenantQueries
from tpo.webhooks.deliveries import DeliveryQueries
from tpo.webhooks.endpoints import WebhookQueries


class Store:
    """One database as one tenant sees it, for many threads.

    Every method of its parts raises StoreUnavailableError when the database cannot be reached.
    """

    def __init__(self, engine: Engine, tenant: str = DEFAULT_TENANT) -> None:
        self.engine = engine
        self.tenant = tenant
        self.jobs = JobQueries(engine, tenant)
        self.events = EventQueries(engine, tenant)
        self.leases = LeaseQueries(engine, tenant)
        self.workers = WorkerQueries(engine, tenant)
        self.queues = QueueQueries(engine, tenant)
        self.maintenance = MaintenanceQueries(engine, tenant)
        self.files = FileQueries(engine, tenant)
        self.batches = BatchQueries(engine, tenant)
        self.webhooks = WebhookQueries(engine, tenant)
        self.deliveries = DeliveryQueries(engine, tenant)
        self.tenants = TenantQueries(engine, tenant)
        self.keys = KeyQueries(engine, tenant)
        self.idempotency_keys = IdempotencyQueries(engine, tenant)

    def for_tenant(self, tenant: str) -> Self:
        """Return the same store as another tenant sees it."""
        return type(self)(self.engine, tenant)

    def ping(self) -> None:
        """Check that the database answers."""
        with reading(self.engine) as session:
            session.execute(select(now()))
