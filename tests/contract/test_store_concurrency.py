"""The store with concurrent writers, on both databases: races, group commit, readers and locked rows."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, make_url, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from testing.fakes import make_step, new_state
from testing.jobs import SERVES, claim, claim_one, create, drive, event_types
from testing.waiting import eventually
from tests.support.concurrency import run_together
from tpo.core.errors import ExternalIdTakenError, StoreUnavailableError
from tpo.db import connect, now, reading, write, writing
from tpo.db.schema import upgrade
from tpo.jobs.outcomes import Outcome
from tpo.jobs.tables import Job
from tpo.store import Store
from tpo.tenants.tables import Tenant


def test_claim_race_has_one_winner(store: Store) -> None:
    for _ in range(5):
        job_id = create(store)
        claims = run_together(*[partial(claim_one, store, job_id, f"worker-{w}", 30, **SERVES) for w in range(8)])
        assert sum(c is not None for c in claims) == 1
        assert (store.jobs.get(job_id).attempt, store.jobs.get(job_id).fence) == (1, 1)
        assert event_types(store, job_id) == ["job.queued", "job.started", "job.phase"]


def test_cancel_racing_finish_ends_job_once(store: Store) -> None:
    for _ in range(20):
        lease, state = claim(store, create(store))
        run_together(
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
        sweep = partial(store.maintenance.sweep, renotify_seconds=60, worker_retention_seconds=60)
        run_together(
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
            b.job_id
            for _ in range(3)
            for b in store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
        ]

    results = run_together(sweep, sweep, sweep, partial(store.leases.renew, "worker-1", jobs, 30))
    notified = {job_id for job_ids in results[:3] for job_id in job_ids}  # type: ignore[attr-defined]
    queued = {job_id for job_id in jobs if store.jobs.get(job_id).status == "queued"}
    assert bool(notified) == bool(queued)
    assert notified <= queued
    for job_id in jobs:
        assert store.jobs.get(job_id).status in ("queued", "in_progress")
        assert event_types(store, job_id).count("job.retrying") == (job_id in queued)


def test_events_have_no_gap_with_many_writers(store: Store) -> None:
    leases = [claim(store, create(store, new_state(sample_size=1, max_iterations=2))) for _ in range(4)]
    actions: list[Callable[[], object]] = [partial(drive, store, *held) for held in leases]
    actions += [partial(store.jobs.cancel, lease.job_id) for lease, _ in leases[:2]]
    actions += [lambda: store.leases.renew("worker-1", [lease.job_id for lease, _ in leases], 30)] * 2
    run_together(*actions)
    for number, (lease, _) in enumerate(leases):
        types = event_types(store, lease.job_id)
        assert types.count("job.iteration.completed") == 3
        assert types.count("job.cancelling") == (number < 2)


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
            writes = [threads.submit(submit, name) for name in ("a", "b", "taken", "c", "d")]
            eventually(lambda: len(engine.get_execution_options()["tpo_pending_writes"]) == 5, why="all wait")
        with pytest.raises(ExternalIdTakenError):
            writes[2].result()
        made = [future.result() for future in writes[:2] + writes[3:]]
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
            writes = [threads.submit(create, store) for _ in range(3)]
            eventually(lambda: len(sqlite.get_execution_options()["tpo_pending_writes"]) == 3, why="all wait")
            session.commit()
            event.listen(sqlite, "commit", fail)
        for each in writes:
            with pytest.raises(StoreUnavailableError):
                each.result()
    event.remove(sqlite, "commit", fail)
    assert store.jobs.page(limit=9) == []


def test_sweep_skips_locked_rows(postgres: Engine) -> None:
    store = Store(postgres)
    locked, lost = (claim(store, create(store), seconds=-1)[0].job_id for _ in range(2))
    with writing(postgres) as session:
        session.execute(
            text("SET LOCAL idle_in_transaction_session_timeout = '20s'")
        )  # a sweep that waits for the row fails
        session.execute(update(Job).where(Job.id == locked).values(input_tokens=1))
        notified = [
            wake_up.job_id for wake_up in store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
        ]
    assert notified == [lost]
    assert store.jobs.get(locked).status == "in_progress"


def test_sqlite_writers_lose_no_update(sqlite: Engine) -> None:
    job_id = create(Store(sqlite))

    def increment() -> None:
        for _ in range(25):
            with writing(sqlite) as session:
                read = session.scalars(select(Job.input_tokens).where(Job.id == job_id)).one()
                session.execute(update(Job).where(Job.id == job_id).values(input_tokens=read + 1))

    run_together(*[increment] * 4)
    assert Store(sqlite).jobs.get(job_id).input_tokens == 100


def test_sqlite_readers_do_not_wait_for_writer(sqlite: Engine) -> None:
    store = Store(sqlite)
    job_id = create(store)
    reader_engine = connect(str(make_url(sqlite.url)))
    with writing(sqlite) as session:
        session.execute(update(Job).where(Job.id == job_id).values(model="uncommitted"))
        reader = Store(reader_engine)  # a reader that waited would time out: the writer continues only afterwards
        assert reader.jobs.get(job_id).model == "policy"
        assert reader.jobs.state(job_id).params.sample_size == 2
        assert [job.id for job in reader.jobs.page(limit=9)] == [job_id]
        assert len(reader.jobs.events(job_id)) == 1
        assert reader.leases.check("worker-1", [job_id]) == {}
    reader_engine.dispose()


def test_reader_sees_one_snapshot(engine: Engine, store: Store) -> None:
    lease, state = claim(store, create(store))
    with reading(engine) as session:
        seen = session.scalars(select(Job.phase).where(Job.id == lease.job_id)).one()
        store.leases.checkpoint(lease, make_step(state))
        assert session.scalars(select(Job.phase).where(Job.id == lease.job_id)).one() == seen == "sampling"
    assert store.jobs.get(lease.job_id).phase == "scoring"


def test_group_commit_isolates_flush_failure(engine: Engine) -> None:
    """Check rows that an ORM session flushes only at commit, after the function that adds them has returned."""

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
