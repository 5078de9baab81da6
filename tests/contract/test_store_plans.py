"""The cost of the store does not grow with its size, on both databases, by query plans and rows read, not by time."""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from sqlalchemy import Engine, inspect

from testing.fakes import FakeReward, make_step
from testing.jobs import claim_one
from testing.seeding import SERVES, SeededDatabase, new_job, policy, seed_database
from testing.services import new_database
from tests.support.plans import SMALL_TABLES, counted_steps, recorded, rows_read, scans
from tests.support.worker_harness import RecordingNotifier
from tpo.batches.advance import BatchAdvancer
from tpo.batches.lines import RawLine
from tpo.batches.tables import BatchLine
from tpo.core.errors import InvalidInputError
from tpo.core.loop import pending
from tpo.core.status import Status
from tpo.db import Base, connect, schema
from tpo.jobs.outcomes import Outcome
from tpo.jobs.submission import Submit
from tpo.jobs.view import JobView
from tpo.settings import Settings
from tpo.store import Store
from tpo.tenants.idempotency import IdempotencyRequest
from tpo.tenants.tenants import Limits

JOBS = 2000
SIZE_RATIO = 8
"""Ratio of the sizes of the large and the small database."""
LISTED = 5
A_FEW_ROWS = {"sqlite": 100, "postgresql": 20}
"""Steps (SQLite) or rows (PostgreSQL) by which pages may differ that contain a few jobs in one database and none in
the other."""
Operation = Callable[[Store, SeededDatabase], object]


def whole_job(store: Store, seeded: SeededDatabase, outcome: Outcome | None = None) -> str:
    """Take a job from its submission through a worker to its end, and return its id."""
    once = IdempotencyRequest("body", secrets.token_hex(8))
    metadata = {"run": seeded.run, "more": "x"}
    job = store.jobs.submit(
        new_job(), idempotency=once, limits=Limits(10_000, 10_000), metadata=metadata, max_attempts=3, **SERVES
    ).job
    claimed = claim_one(store, job.id, "worker-1", 3600, **SERVES)
    assert claimed
    lease, state = claimed
    store.workers.register("worker-1", concurrency=1, **SERVES)
    store.leases.renew("worker-1", [job.id], 3600)
    store.leases.check("worker-1", [job.id])
    store.events.new_events({job.id: 1, seeded.middle: 2})
    while pending(state):
        made = make_step(state, policy(), FakeReward())
        store.leases.checkpoint(lease, made)
        state = made.after
    if outcome is None:
        store.leases.release(lease)
    else:
        store.leases.finish(lease, outcome)
    return job.id


def client_changes(store: Store, seeded: SeededDatabase) -> None:
    """Apply every change that clients can make to a waiting job, and delete it after its end."""
    job_id = whole_job(store, seeded)
    for change in (store.jobs.pause, store.jobs.resume, store.jobs.retry_now, store.jobs.cancel, store.jobs.delete):
        change(job_id)


def sweep_lost(store: Store, seeded: SeededDatabase) -> None:
    """Sweep with one expired job and one lost job."""
    job = store.jobs.submit(new_job(), max_attempts=3, deadline_seconds=-1, **SERVES).job
    lost = store.jobs.submit(new_job(), max_attempts=3, **SERVES).job.id
    assert claim_one(store, lost, "worker-2", -1, **SERVES)
    wake_ups = store.maintenance.sweep(renotify_seconds=3600, worker_retention_seconds=60)
    assert [wake_up.model for wake_up in wake_ups] == [SERVES["model"]]
    assert store.jobs.get(lost).status == "queued"
    assert store.jobs.get(job.id).status == "expired"
    store.jobs.cancel(lost)


def webhooks(store: Store, seeded: SeededDatabase) -> None:
    """Use every operation on webhooks and deliveries."""
    hook = store.webhooks.create("https://example.com/", ["job.completed"]).row
    whole_job(store, seeded, Outcome("completed"))
    store.webhooks.ping(hook.id)
    assert store.webhooks.deliveries_page(hook.id, limit=LISTED)
    first, second = store.deliveries.due(9)
    delivery, other = store.deliveries.claim(first, 60), store.deliveries.claim_next(hook.id, 60)
    assert delivery
    assert other
    assert other.delivery_id == second
    store.deliveries.record_success(delivery)
    store.deliveries.record_failure(other, "timeout", 5)
    store.webhooks.page(limit=LISTED)
    store.webhooks.update(hook.id, {"enabled": False})
    store.deliveries.purge(3600)
    store.webhooks.delete(hook.id)


class Lines:
    """A format of batches in which every line requests the same job."""

    custom_id = "a"

    def parse(self, line: RawLine, endpoint: str) -> "Lines":
        return self

    def submission(self) -> Submit:
        return Submit(model=SERVES["model"], input="Hello")

    def with_request_names(self, error: InvalidInputError) -> InvalidInputError:
        return error

    def render(self, endpoint: str, line: BatchLine, job: JobView | None) -> bytes:
        return b"{}\n"


def batches(store: Store, seeded: SeededDatabase) -> None:
    """Take a batch from the upload of its input to its cancellation."""
    settings = Settings(policy=SERVES["model"], reward_model=SERVES["reward_model"])
    advancer = BatchAdvancer(store.engine, settings, RecordingNotifier(), Lines())
    file_id = store.files.begin("lines.jsonl", "batch")
    store.files.append_part(file_id, b"{}\n")
    store.files.complete(file_id)
    store.files.page(limit=LISTED, purpose="batch")
    made = store.batches.create(
        endpoint="/v1/responses", input_file_id=file_id, window="24h", seconds=3600, metadata={}
    ).batch
    advancer.due(0)
    assert advancer.advance(made.id), "its requests are counted"
    assert advancer.advance(made.id), "its job is created"
    assert not advancer.advance(made.id), "its job has not ended"
    store.batches.cancel(made.id)
    for _ in range(9):
        advancer.advance(made.id)
    ended = store.batches.get(made.id)
    assert (ended.status, ended.failed) == ("cancelled", 1)
    store.batches.page(limit=LISTED)
    store.files.delete(file_id)


def page(**options: Any) -> Operation:
    """Return an operation that lists one page of jobs."""

    def read(store: Store, seeded: SeededDatabase) -> None:
        after = seeded.middle if options.get("from_the_middle") else None
        metadata = {key: seeded.run if value == "RUN" else value for key, value in options.get("metadata", {}).items()}
        known = {key: value for key, value in options.items() if key not in ("from_the_middle", "metadata")}
        store.jobs.page(limit=LISTED, after=after, metadata=metadata, **known)

    return read


STATUSES: tuple[Status, ...] = get_args(Status)
READS: dict[str, Operation] = {
    "get": lambda store, seeded: store.jobs.get(seeded.middle),
    "state": lambda store, seeded: store.jobs.state(seeded.middle),
    "events": lambda store, seeded: store.jobs.events(seeded.middle, 3),
    "newest": page(),
    "middle": page(from_the_middle=True),
    "middle, oldest first": page(from_the_middle=True, order="asc"),
    "common status": page(statuses=["completed"], from_the_middle=True),
    "rare status": page(statuses=["expired"], order="asc"),
    "unused status": page(statuses=["cancelling"]),
    "several statuses": page(statuses=["queued", "failed", "failed", "expired"], from_the_middle=True),
    "several rare statuses": page(statuses=["expired", "paused", "cancelled"], from_the_middle=True),
    "all statuses": page(statuses=STATUSES),
    "metadata": page(metadata={"run": "RUN"}, from_the_middle=True),
    "unused metadata": page(metadata={"run": "none"}),
    "two metadata pairs": page(metadata={"more": "x", "run": "RUN"}),
    "quotas": lambda store, seeded: store.jobs.free_slots(Limits(in_flight=LISTED)),
    "workers": lambda store, seeded: store.workers.live(60),
    "key": lambda store, seeded: store.keys.tenant_of("nobody"),
}
WRITES: dict[str, Operation] = {
    "whole job": lambda store, seeded: whole_job(store, seeded, Outcome("completed", output="Draft")),
    "client changes": client_changes,
    "sweep": sweep_lost,
    "purge": lambda store, seeded: (store.maintenance.purge(1.0, batch=2), store.idempotency_keys.purge(1.0, batch=2)),
    "webhooks": webhooks,
    "batches": batches,
}


Sizes = list[tuple[Engine, SeededDatabase]]


@pytest.fixture(scope="module")
def sqlite_sizes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sizes]:
    """Yield a small and a large SQLite database."""
    folder: Path = tmp_path_factory.mktemp("plans")
    urls = (f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db")
    with _seeded(urls[0], JOBS // SIZE_RATIO) as small, _seeded(urls[1], JOBS) as large:
        yield [small, large]


@pytest.fixture(scope="module")
def postgres_sizes(postgres_admin_url: str) -> Iterator[Sizes]:
    """Yield a small and a large PostgreSQL database."""
    with (
        new_database(postgres_admin_url) as first,
        new_database(postgres_admin_url) as second,
        _seeded(first, JOBS // SIZE_RATIO) as small,
        _seeded(second, JOBS) as large,
    ):
        yield [small, large]


@pytest.fixture(scope="module", params=["sqlite_sizes", "postgres_sizes"])
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """Return a small and a large database of one kind."""
    found: Sizes = request.getfixturevalue(request.param)
    return found


@contextlib.contextmanager
def _seeded(url: str, jobs: int) -> Iterator[tuple[Engine, SeededDatabase]]:
    schema.upgrade(url)
    engine = connect(url)
    yield engine, seed_database(engine, jobs)
    engine.dispose()


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_operations_scan_no_table(sizes: Sizes, name: str) -> None:
    for engine, seeded in sizes:
        with recorded(engine) as statements:
            (READS | WRITES)[name](Store(engine), seeded)
    assert statements
    assert {s.sql: found for s in statements if (found := scans(engine, s))} == {}


@pytest.mark.parametrize("name", READS)
def test_read_cost_does_not_grow_with_table(sizes: Sizes, name: str) -> None:
    costs = []
    for engine, seeded in sizes:
        READS[name](Store(engine), seeded)
        if engine.dialect.name == "sqlite":
            with counted_steps(engine) as steps:
                READS[name](Store(engine), seeded)
            costs.append(steps[0])
        else:
            with recorded(engine) as statements:
                READS[name](Store(engine), seeded)
            assert statements
            costs.append(sum(rows_read(engine, s) for s in statements))
    small, large = costs
    assert large <= 1.5 * small + A_FEW_ROWS[sizes[0][0].dialect.name]


@pytest.mark.parametrize("name", WRITES)
def test_write_cost_does_not_grow_with_table(sqlite_sizes: Sizes, name: str) -> None:
    costs = []
    for engine, seeded in sqlite_sizes:
        with counted_steps(engine) as steps:
            WRITES[name](Store(engine), seeded)
        costs.append(steps[0])
    small, large = costs
    assert 0 < large <= 1.2 * small


def test_foreign_keys_are_indexed(sizes: Sizes) -> None:
    """Check that deleting a row does not scan the tables that reference it."""
    found = inspect(sizes[0][0])
    for table in Base.metadata.sorted_tables:
        leading = {index["column_names"][0] for index in found.get_indexes(table.name)}
        leading.add(found.get_pk_constraint(table.name)["constrained_columns"][0])
        assert {fk.parent.name for fk in table.foreign_keys} <= leading, table.name
    assert SMALL_TABLES - {"alembic_version"} <= set(Base.metadata.tables)
