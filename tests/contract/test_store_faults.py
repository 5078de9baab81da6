"""The store, on both databases: when databases are away, clocks are wrong, and many write at once."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, event, make_url, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from testing.fakes import make_step, new_state
from testing.jobs import SERVES, claim, claim_one, create, drive, event_types, put, rows
from testing.ports import free_port
from testing.services import new_database, postgres_server
from testing.waiting import eventually
from tpo.core.errors import DatabaseRefusedError, ExternalIdTakenError, LeaseLostError, StoreUnavailableError
from tpo.core.status import Status
from tpo.db import connect, now, reading, single_query, write, writing
from tpo.db.schema import check, upgrade
from tpo.jobs import claims
from tpo.jobs.outcomes import Outcome
from tpo.jobs.tables import Job
from tpo.store import Store
from tpo.tenants.tables import Tenant


def at_once(*actions: Callable[[], object]) -> list[object]:
    """Do all of it in threads that start together; gives what each returned, or the error that it raised."""
    together = threading.Barrier(len(actions))

    def act(action: Callable[[], object]) -> object:
        together.wait()
        try:
            return action()
        except LeaseLostError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(act, actions))


def test_claim_race_has_one_winner(store: Store) -> None:
    for _ in range(5):
        job_id = create(store)
        claims = at_once(*[partial(claim_one, store, job_id, f"worker-{w}", 30, **SERVES) for w in range(8)])
        assert sum(c is not None for c in claims) == 1
        assert (store.jobs.get(job_id).attempt, store.jobs.get(job_id).fence) == (1, 1)
        assert event_types(store, job_id) == ["job.queued", "job.started", "job.phase"]


def test_cancel_racing_finish_ends_job_once(store: Store) -> None:
    for _ in range(20):
        lease, state = claim(store, create(store))
        at_once(
            partial(store.jobs.cancel, lease.job_id),
            partial(store.leases.finish, lease, Outcome("completed", output="the answer")),
            partial(store.leases.checkpoint, lease, make_step(state)),
        )
        job = store.jobs.get(lease.job_id)
        types = event_types(store, lease.job_id)
        assert job.status in ("completed", "cancelled")
        assert [t for t in types if t in ("job.completed", "job.cancelled")] == [types[-1]] == [f"job.{job.status}"]
        assert job.output == ("the answer" if job.status == "completed" else None)


def test_cancel_racing_release_is_not_lost(store: Store) -> None:
    for round_number in range(20):
        lease, _ = claim(store, create(store), seconds=-1)
        sweep = partial(store.maintenance.sweep, renotify_seconds=60, forget_worker_seconds=60)
        at_once(
            partial(store.jobs.cancel, lease.job_id),
            partial(store.leases.release, lease) if round_number % 2 else sweep,
        )
        sweep()
        assert store.jobs.get(lease.job_id).status == "cancelled"
        assert event_types(store, lease.job_id)[-1] == "job.cancelled"


def test_concurrent_sweeps_and_renewals_are_consistent(store: Store) -> None:
    jobs = [create(store) for _ in range(12)]
    for job_id in jobs:
        claim(store, job_id, seconds=-1)

    def sweep() -> list[str]:
        return [
            b.job_id for _ in range(3) for b in store.maintenance.sweep(renotify_seconds=60, forget_worker_seconds=60)
        ]

    rung = at_once(sweep, sweep, sweep, partial(store.leases.renew, "worker-1", jobs, 30))
    heard = {job_id for bells in rung[:3] for job_id in bells}  # type: ignore[attr-defined]
    queued = {job_id for job_id in jobs if store.jobs.get(job_id).status == "queued"}
    assert bool(heard) == bool(queued)
    assert heard <= queued
    for job_id in jobs:
        assert store.jobs.get(job_id).status in ("queued", "in_progress")
        assert event_types(store, job_id).count("job.retrying") == (job_id in queued)


def test_events_have_no_gap_with_many_writers(store: Store) -> None:
    leases = [claim(store, create(store, new_state(sample_size=1, max_iterations=2))) for _ in range(4)]
    actions: list[Callable[[], object]] = [partial(drive, store, *held) for held in leases]
    actions += [partial(store.jobs.cancel, lease.job_id) for lease, _ in leases[:2]]
    actions += [lambda: store.leases.renew("worker-1", [lease.job_id for lease, _ in leases], 30)] * 2
    at_once(*actions)
    for number, (lease, _) in enumerate(leases):
        types = event_types(store, lease.job_id)
        assert types.count("job.iteration.completed") == 3
        assert types.count("job.cancelling") == (number < 2)


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
    assert claim_one(store, job_id, "worker-1", 30.0, **SERVES) is None  # it waits
    put(engine, job_id, next_attempt_at=None)
    assert claim_one(store, job_id, "worker-1", 30.0, **SERVES) is None
    job = store.jobs.get(job_id)
    assert (job.status, job.error_code, job.lease_owner) == ("failed", "unreadable_record", None)
    assert event_types(store, job_id) == ["job.queued", "job.retrying", "job.failed"]


def test_wrong_process_clock_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    early, right, late = -600.0, 0.0, 600.0
    seconds, nanoseconds = time.time, time.time_ns

    def set_clock(off: float) -> None:
        monkeypatch.setattr(time, "time", lambda: seconds() + off)
        monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + int(off * 1e9))

    ids = []
    for off in (late, right, early):
        set_clock(off)
        lease, state = claim(store, create(store, deadline_seconds=300), seconds=30)
        ids.append(lease.job_id)
        assert store.maintenance.sweep(renotify_seconds=15, forget_worker_seconds=60) == []
        flags = store.leases.checkpoint(lease, make_step(state))
        assert not flags.past_deadline
        job = store.jobs.get(lease.job_id)
        for told in (job.created_at, job.started_at, (job.lease_until or 0) - 30, (job.deadline_at or 0) - 300):
            assert told == pytest.approx(seconds(), abs=20)
        assert int(job.id[4:16], 16) / 1000 == pytest.approx(job.created_at, abs=20)
    assert [store.jobs.get(job_id).status for job_id in ids] == ["in_progress"] * 3


def test_group_commit_batches_writes_and_isolates_failures(tmp_path: Path) -> None:
    upgrade(url := f"sqlite:///{tmp_path}/tpo.db")
    engine = connect(url)
    store = Store(engine)
    taken = create(store, external_id="taken")
    commits: list[object] = []
    event.listen(engine, "commit", commits.append)

    def submit(external_id: str) -> str:
        return create(store, external_id=external_id)

    with ThreadPoolExecutor(6) as threads:
        with writing(engine) as session:
            session.execute(select(now()))
            asked = [threads.submit(submit, name) for name in ("a", "b", "taken", "c", "d")]
            eventually(lambda: len(engine.get_execution_options()["tpo_waiting"]) == 5, why="all wait")
        with pytest.raises(ExternalIdTakenError):
            asked[2].result()
        made = [future.result() for future in asked[:2] + asked[3:]]
    assert len(commits) == 2
    assert sorted(job.id for job in store.jobs.page(limit=9)) == sorted([taken, *made])
    assert [event_types(store, job_id) for job_id in made] == [["job.queued"]] * 4
    engine.dispose()


def test_group_commit_failure_fails_every_write(sqlite: Engine) -> None:
    store = Store(sqlite)

    def fail(_connection: object) -> None:
        raise StoreUnavailableError()

    with ThreadPoolExecutor(3) as threads:
        with writing(sqlite) as session:
            session.execute(select(now()))
            asked = [threads.submit(create, store) for _ in range(3)]
            eventually(lambda: len(sqlite.get_execution_options()["tpo_waiting"]) == 3, why="all wait")
            session.commit()
            event.listen(sqlite, "commit", fail)
        for each in asked:
            with pytest.raises(StoreUnavailableError):
                each.result()
    event.remove(sqlite, "commit", fail)
    assert store.jobs.page(limit=9) == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_unreachable_database_raises_store_unavailable(kind: str, tmp_path: Path) -> None:
    # A folder cannot be opened as a file, not even by root.
    url = f"sqlite:///{tmp_path}" if kind == "sqlite" else f"postgresql+psycopg://me@127.0.0.1:{free_port()}/tpo"
    engine = connect(url)
    store = Store(engine)
    for ask in (
        store.ping,
        partial(store.jobs.get, "job_1"),
        partial(create, store),
        partial(store.leases.claim, "worker-1", 30, **SERVES),
        partial(store.maintenance.sweep, renotify_seconds=1, forget_worker_seconds=1),
    ):
        with pytest.raises(StoreUnavailableError):
            ask()
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql+psycopg://me:secret-word@127.0.0.1/tpo?colour=red", "the driver refuses colour"),
        ("sqlite:///{folder}/tpo.db?colour=red", "the driver refuses colour"),
        ("sqlite:///{folder}/tpo.db?timeout=soon", "the driver refuses timeout"),
        ("sqlite:///{folder}/file/sub/tpo.db", "the folder .*/file/sub cannot be made: Not a directory"),
    ],
)
def test_connect_refuses_unusable_url(url: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseRefusedError, match=f"^TPO_DATABASE_URL: {says}") as refused:
        connect(url.format(folder=tmp_path))
    assert "secret-word" not in str(refused.value)


def kill_backends(engine: Engine) -> None:
    """End every connection to the engine's PostgreSQL database, as a restart of the server does."""
    name = engine.url.database
    with psycopg.connect(
        engine.url.set(drivername="postgresql").render_as_string(hide_password=False), dbname="postgres"
    ) as admin:
        admin.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name])


@pytest.fixture
def postgres(postgres_admin_url: str, postgres_template: str) -> Iterator[Engine]:
    """An engine on a PostgreSQL database with the schema."""
    with new_database(postgres_admin_url, postgres_template) as url:
        engine = connect(url)
        yield engine
        engine.dispose()


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


def test_postgresql_connection_lost_in_waiting_claim_raises(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(postgres)
    create(store)
    monkeypatch.setattr(claims, "_PATIENCE_MILLISECONDS", 60_000)
    waits = text("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event = 'advisory'")
    with ThreadPoolExecutor(1) as thread:
        with writing(postgres) as session:
            claims._wait_for_turn(session, claims.Pair("policy", "reward"))
            claimed = thread.submit(store.leases.claim, "worker-1", 30, **SERVES)
            with single_query(postgres) as connection:
                pid = eventually(lambda: connection.scalar(waits), why="the claim waits for its turn")
                connection.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        with pytest.raises(StoreUnavailableError):
            claimed.result()
    assert store.leases.claim("worker-1", 30, **SERVES)


def test_sweep_skips_locked_rows(postgres: Engine) -> None:
    store = Store(postgres)
    locked, lost = (claim(store, create(store), seconds=-1)[0].job_id for _ in range(2))
    with writing(postgres) as session:
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '20s'"))  # a sweep that waits fails
        session.execute(update(Job).where(Job.id == locked).values(input_tokens=1))
        rung = [bell.job_id for bell in store.maintenance.sweep(renotify_seconds=60, forget_worker_seconds=60)]
    assert rung == [lost]
    assert store.jobs.get(locked).status == "in_progress"


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
    for user, database, says in (
        (role, url.database, "The database's user may not do that"),
        (f"{role}-full", url.database, "takes no more connections"),
        (role, f"{url.database}-none", "no such user or database"),
    ):
        engine = connect(url.set(username=user, database=database).render_as_string(hide_password=False))
        with pytest.raises(StoreUnavailableError, match=says):
            check(engine)
        with pytest.raises(StoreUnavailableError, match=says):
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
    ("pragma", "says"),
    [
        ("max_page_count = 1", "The disk that holds the database is full"),  # as low as it can be: no page more
        ("query_only = 1", "The database can only be read"),
    ],
)
def test_sqlite_errors_name_the_cause_and_recover(sqlite: Engine, pragma: str, says: str) -> None:
    store = Store(sqlite)
    made = create(store)
    sqlite.dispose()
    event.listen(sqlite, "connect", prepare := lambda connection, _record: connection.execute(f"PRAGMA {pragma}"))
    large = new_state(query="x" * 100_000)
    with pytest.raises(StoreUnavailableError, match=says):
        create(store, large)
    assert [job.id for job in store.jobs.page(limit=9)] == [made]
    event.remove(sqlite, "connect", prepare)
    sqlite.dispose()
    assert store.jobs.state(create(store, large)) == large


@pytest.fixture
def sqlite(sqlite_template: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine on an SQLite file with the schema."""
    (tmp_path / "tpo.db").write_bytes(sqlite_template.read_bytes())
    engine = connect(f"sqlite:///{tmp_path / 'tpo.db'}")
    yield engine
    engine.dispose()


def test_sqlite_writers_lose_no_update(sqlite: Engine) -> None:
    job_id = create(Store(sqlite))

    def count() -> None:
        for _ in range(25):
            with writing(sqlite) as session:
                read = session.scalars(select(Job.input_tokens).where(Job.id == job_id)).one()
                session.execute(update(Job).where(Job.id == job_id).values(input_tokens=read + 1))

    at_once(*[count] * 4)
    assert Store(sqlite).jobs.get(job_id).input_tokens == 100


def test_sqlite_readers_do_not_wait_for_writer(sqlite: Engine) -> None:
    store = Store(sqlite)
    job_id = create(store)
    impatient = connect(str(make_url(sqlite.url)))
    with writing(sqlite) as session:
        session.execute(update(Job).where(Job.id == job_id).values(model="uncommitted"))
        reader = Store(impatient)  # whoever waits for the writer here fails, for it goes on only afterwards
        assert reader.jobs.get(job_id).model == "policy"
        assert reader.jobs.state(job_id).params.sample_size == 2
        assert [job.id for job in reader.jobs.page(limit=9)] == [job_id]
        assert len(reader.jobs.events(job_id)) == 1
        assert reader.leases.check("worker-1", [job_id]) == {}
    impatient.dispose()


def test_reader_sees_one_snapshot(engine: Engine, store: Store) -> None:
    lease, state = claim(store, create(store))
    with reading(engine) as session:
        seen = session.scalars(select(Job.phase).where(Job.id == lease.job_id)).one()
        store.leases.checkpoint(lease, make_step(state))
        assert session.scalars(select(Job.phase).where(Job.id == lease.job_id)).one() == seen == "sampling"
    assert store.jobs.get(lease.job_id).phase == "scoring"


def test_group_commit_isolates_flush_failure(engine: Engine) -> None:
    """What an ORM session holds back until its commit fails there, after the work itself has returned."""

    def add(session: Session, name: str) -> str:
        session.add(Tenant(id=name, created_at=0.0))
        return name

    assert write(engine, lambda session: add(session, "first")) == "first"
    with ThreadPoolExecutor(8) as pool:
        names = ["first", *(f"tenant-{i}" for i in range(7))]
        done = [pool.submit(write, engine, lambda session, name=name: add(session, name)) for name in names]
        with pytest.raises(IntegrityError):
            done[0].result(30)
        assert [each.result(30) for each in done[1:]] == names[1:]
