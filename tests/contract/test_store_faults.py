"""The store, on both databases: unavailable databases, lost acknowledgements, wrong clocks and bad configuration."""

import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, event, make_url, text, update
from sqlalchemy.orm import Session

from testing.fakes import make_step, new_state
from testing.jobs import SERVES, claim, claim_one, create, event_types, put, rows
from testing.ports import free_port
from testing.services import postgres_server
from testing.waiting import eventually
from tpo.core.errors import DatabaseRefusedError, LeaseLostError, StoreUnavailableError
from tpo.core.status import Status
from tpo.db import connect, single_query, writing
from tpo.db.schema import check, upgrade
from tpo.jobs import claims
from tpo.jobs.outcomes import Outcome
from tpo.jobs.tables import Job
from tpo.store import Store


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_finish_is_idempotent_after_lost_acknowledgement(store: Store, status: Status) -> None:
    lease, _ = claim(store, create(store))
    assert store.leases.finish(lease, Outcome(status)) == status
    before = event_types(store, lease.job_id)
    assert store.leases.finish(lease, Outcome(status)) == status
    assert event_types(store, lease.job_id) == before


def test_release_is_idempotent_after_lost_acknowledgement(store: Store) -> None:
    lease, _ = claim(store, create(store))
    assert store.leases.release(lease) == "queued"
    before = event_types(store, lease.job_id)
    assert store.leases.release(lease) == "queued"
    assert event_types(store, lease.job_id) == before
    assert store.jobs.get(lease.job_id).attempt == 0
    claim(store, lease.job_id, "worker-2")
    for refused in (partial(store.leases.release, lease), partial(store.leases.finish, lease, Outcome("completed"))):
        with pytest.raises(LeaseLostError):
            refused()


def test_unreadable_job_fails_after_its_attempts(engine: Engine, store: Store) -> None:
    job_id = create(store, max_attempts=2)
    put(engine, job_id, params={"mode": "of the future"})
    assert claim_one(store, job_id, "worker-1", 30.0, **SERVES) is None
    job = store.jobs.get(job_id)
    assert (job.status, job.lease_owner, job.attempt) == ("queued", None, 1)
    assert job.next_attempt_at is not None
    assert claim_one(store, job_id, "worker-1", 30.0, **SERVES) is None  # it waits for its back-off
    put(engine, job_id, next_attempt_at=None)
    assert claim_one(store, job_id, "worker-1", 30.0, **SERVES) is None
    job = store.jobs.get(job_id)
    assert (job.status, job.error_code, job.lease_owner) == ("failed", "unreadable_record", None)
    assert event_types(store, job_id) == ["job.queued", "job.retrying", "job.failed"]


def test_wrong_process_clock_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    early, correct, late = -600.0, 0.0, 600.0
    seconds, nanoseconds = time.time, time.time_ns

    def set_clock(offset: float) -> None:
        monkeypatch.setattr(time, "time", lambda: seconds() + offset)
        monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + int(offset * 1e9))

    ids = []
    for offset in (late, correct, early):
        set_clock(offset)
        lease, state = claim(store, create(store, deadline_seconds=300), seconds=30)
        ids.append(lease.job_id)
        assert store.maintenance.sweep(renotify_seconds=15, worker_retention_seconds=60) == []
        flags = store.leases.checkpoint(lease, make_step(state))
        assert not flags.past_deadline
        job = store.jobs.get(lease.job_id)
        for recorded in (job.created_at, job.started_at, (job.lease_until or 0) - 30, (job.deadline_at or 0) - 300):
            assert recorded == pytest.approx(seconds(), abs=20)
        assert int(job.id[4:16], 16) / 1000 == pytest.approx(job.created_at, abs=20)
    assert [store.jobs.get(job_id).status for job_id in ids] == ["in_progress"] * 3


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_unreachable_database_raises_store_unavailable(kind: str, tmp_path: Path) -> None:
    # A folder cannot be opened as a file, not even by root.
    url = f"sqlite:///{tmp_path}" if kind == "sqlite" else f"postgresql+psycopg://me@127.0.0.1:{free_port()}/tpo"
    engine = connect(url)
    store = Store(engine)
    for query in (
        store.ping,
        partial(store.jobs.get, "job_1"),
        partial(create, store),
        partial(store.leases.claim, "worker-1", 30, **SERVES),
        partial(store.maintenance.sweep, renotify_seconds=1, worker_retention_seconds=1),
    ):
        with pytest.raises(StoreUnavailableError):
            query()
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://me:secret-word@127.0.0.1/tpo?colour=red", "the driver refuses colour"),
        ("sqlite:///{folder}/tpo.db?colour=red", "the driver refuses colour"),
        ("sqlite:///{folder}/tpo.db?timeout=soon", "the driver refuses timeout"),
        ("sqlite:///{folder}/file/sub/tpo.db", "the folder .*/file/sub cannot be created: Not a directory"),
    ],
)
def test_connect_refuses_unusable_url(url: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseRefusedError, match=f"^TPO_DATABASE_URL: {message}") as refused:
        connect(url.format(folder=tmp_path), create=True)
    assert "secret-word" not in str(refused.value)


def kill_backends(engine: Engine) -> None:
    """Terminate every connection to the engine's PostgreSQL database, as a restart of the server does."""
    name = engine.url.database
    with psycopg.connect(
        engine.url.set(drivername="postgresql").render_as_string(hide_password=False), dbname="postgres"
    ) as admin:
        admin.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name])


def test_postgresql_replaces_dead_pooled_connections(postgres: Engine) -> None:
    store = Store(postgres)
    lease, state = claim(store, create(store))
    kill_backends(postgres)
    store.leases.checkpoint(lease, made := make_step(state))
    after = made.after
    kill_backends(postgres)
    assert store.jobs.state(lease.job_id) == after


def test_postgresql_connection_lost_in_transaction_rolls_back(postgres: Engine) -> None:
    store = Store(postgres)
    job_id = create(store)
    before = rows(postgres)

    def write(then: Callable[[Session], object]) -> None:
        with writing(postgres) as session:
            session.execute(update(Job).where(Job.id == job_id).values(status="paused"))
            kill_backends(postgres)
            then(session)

    for then in (lambda session: session.execute(text("SELECT 1")), lambda session: session.commit()):
        with pytest.raises(StoreUnavailableError):
            write(then)
        assert rows(postgres) == before


def test_postgresql_connection_lost_in_waiting_claim_raises(postgres: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(postgres)
    create(store)
    monkeypatch.setattr(claims, "_LOCK_TIMEOUT_MILLISECONDS", 60_000)
    waits = text("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event = 'advisory'")
    with ThreadPoolExecutor(1) as thread:
        with writing(postgres) as session:
            claims._lock_queue(session, claims.Pair("policy", "reward"))
            claimed = thread.submit(store.leases.claim, "worker-1", 30, **SERVES)
            with single_query(postgres) as connection:
                pid = eventually(lambda: connection.scalar(waits), why="the claim waits for the advisory lock")
                connection.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        with pytest.raises(StoreUnavailableError):
            claimed.result()
    assert store.leases.claim("worker-1", 30, **SERVES)


@pytest.mark.processes
def test_postgresql_standby_is_unavailable_until_promoted() -> None:
    with postgres_server() as server:
        upgrade(server.url)
        engine = connect(server.url)
        store = Store(engine)
        lease, state = claim(store, create(store))
        server.stop()
        (server.folder / "standby.signal").touch()
        server.start()
        for write_to_it in (
            partial(create, store),
            partial(store.leases.checkpoint, lease, made := make_step(state)),
        ):
            with pytest.raises(StoreUnavailableError, match="can only be read: it is a standby"):
                write_to_it()
        assert store.jobs.state(lease.job_id) == state
        with psycopg.connect(server.url.replace("+psycopg", "", 1), autocommit=True) as admin:
            admin.execute("SELECT pg_promote()")
        store.leases.checkpoint(lease, made)
        assert store.jobs.state(lease.job_id) == made.after
        engine.dispose()


def test_postgresql_errors_name_the_cause(postgres: Engine) -> None:
    url = postgres.url
    role = f"role_{secrets.token_hex(4)}"
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as admin:
        admin.execute(f'CREATE ROLE "{role}" LOGIN')
        admin.execute(f'CREATE ROLE "{role}-full" LOGIN CONNECTION LIMIT 0')
    for user, database, message in (
        (role, url.database, "The database's user may not do that"),
        (f"{role}-full", url.database, "takes no more connections"),
        (role, f"{url.database}-none", "no such user or database"),
    ):
        engine = connect(url.set(username=user, database=database).render_as_string(hide_password=False))
        with pytest.raises(StoreUnavailableError, match=message):
            check(engine)
        with pytest.raises(StoreUnavailableError, match=message):
            create(Store(engine))
        engine.dispose()


def test_postgresql_without_utf8_is_refused(postgres_admin_url: str) -> None:
    name = f"test_{secrets.token_hex(6)}"
    url = make_url(postgres_admin_url).set(drivername="postgresql+psycopg", database=name)
    with psycopg.connect(postgres_admin_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        try:
            with pytest.raises(DatabaseRefusedError, match=r"encoding is SQL_ASCII.* ENCODING 'UTF8'"):
                upgrade(url.render_as_string(hide_password=False))
        finally:
            admin.execute(f"DROP DATABASE {name}")


def test_postgresql_url_options_are_merged_with_limits(postgres: Engine) -> None:
    engine = connect(
        postgres.url.update_query_dict({"options": "-c search_path=elsewhere"}).render_as_string(hide_password=False)
    )
    with writing(engine) as session:
        assert session.scalar(text("SHOW search_path")) == "elsewhere"
        assert session.scalar(text("SHOW statement_timeout")) == "10s"
    engine.dispose()


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        ("max_page_count = 1", "The disk that holds the database is full"),  # no further page can be allocated
        ("query_only = 1", "The database can only be read"),
    ],
)
def test_sqlite_errors_name_the_cause_and_recover(sqlite: Engine, pragma: str, message: str) -> None:
    store = Store(sqlite)
    made = create(store)
    sqlite.dispose()
    event.listen(sqlite, "connect", prepare := lambda connection, _record: connection.execute(f"PRAGMA {pragma}"))
    large = new_state(query="x" * 100_000)
    with pytest.raises(StoreUnavailableError, match=message):
        create(store, large)
    assert [job.id for job in store.jobs.page(limit=9)] == [made]
    event.remove(sqlite, "connect", prepare)
    sqlite.dispose()
    assert store.jobs.state(create(store, large)) == large
