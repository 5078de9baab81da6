"""Helpers of the store's tests: create and claim a job in one line, read all rows as one value."""

from typing import Any

from sqlalchemy import Engine, and_, insert, select, text, update

from testing.fakes import FakePolicy, FakeReward, new_state, proceed
from tpo.core.loop import Step
from tpo.core.run import run
from tpo.core.state import State
from tpo.db import Base, writing
from tpo.jobs.leases import Lease, claim_job
from tpo.jobs.tables import Job
from tpo.store import Store

SERVES: dict[str, Any] = {"model": "policy", "reward_model": "reward"}


def create(store: Store, state: State | None = None, max_attempts: int = 3, **kw: Any) -> str:
    """Submit a job and return its id. The job is queued."""
    state = state or new_state(sample_size=2)
    return store.jobs.submit(state, max_attempts=max_attempts, model="policy", reward_model="reward", **kw).job.id


def claim_one(
    store: Store, job_id: str, worker: str, lease_seconds: float, *, model: str, reward_model: str
) -> tuple[Lease, State] | None:
    """Claim this job, bypassing the scheduling order. Returns None if the worker cannot have it."""
    condition = and_(Job.id == job_id, Job.model == model, Job.reward_model == reward_model)
    with writing(store.engine) as session:
        return claim_job(session, condition, worker, lease_seconds)


def claim(store: Store, job_id: str, worker: str = "worker-1", seconds: float = 30.0) -> tuple[Lease, State]:
    """Claim a claimable job. With negative `seconds` the lease has already expired."""
    claimed = claim_one(store, job_id, worker, seconds, **SERVES)
    assert claimed is not None
    return claimed


def drive(
    store: Store, lease: Lease, state: State, policy: FakePolicy | None = None, reward: FakeReward | None = None
) -> State:
    """Run a claimed job to the end of its iterations, and assert that the store holds each checkpointed state."""

    def checkpoint(step: Step) -> None:
        store.leases.checkpoint(lease, step)
        assert store.jobs.state(lease.job_id) == step.after

    return run(state, policy or FakePolicy(), reward or FakeReward(), checkpoint, proceed)


def put(engine: Engine, job_id: str, **values: Any) -> None:
    """Change a job's row directly, bypassing the store."""
    with writing(engine) as session:
        session.execute(update(Job).where(Job.id == job_id).values(values))


def execute(engine: Engine, statement: str, **values: Any) -> None:
    """Execute and commit one statement of plain SQL."""
    with writing(engine) as session:
        session.execute(text(statement), values)


def rows(engine: Engine) -> dict[str, list[Any]]:
    """Return every row of every table, by the table's name, in the order of the primary key."""
    tables = Base.metadata.sorted_tables
    with engine.connect() as connection:
        return {t.name: [tuple(row) for row in connection.execute(select(t).order_by(*t.primary_key))] for t in tables}


def event_types(store: Store, job_id: str) -> list[str]:
    """Return the types of a job's events, and assert that their numbers have no gap."""
    events = store.jobs.events(job_id)
    assert [e.number for e in events] == list(range(1, len(events) + 1))
    assert store.jobs.get(job_id).last_event == len(events)
    return [e.type for e in events]


def create_many(engine: Engine, like: str, count: int, **values: Any) -> list[str]:
    """Insert `count` queued copies of an existing job, with `values` changed. Returns their ids, oldest first."""
    ids = [f"{like[:-8]}{number:08x}" for number in range(1, count + 1)]
    jobs, events = (Base.metadata.tables[name] for name in ("jobs", "events"))
    with writing(engine) as session:
        template = session.execute(select(jobs).where(jobs.c.id == like)).one()
        row = {**template._mapping, "status": "queued", "queued_at": template.created_at, **values}
        event = {"number": 1, "type": "job.queued", "data": {}, "created_at": template.created_at}
        session.execute(insert(jobs), [{**row, "id": job_id} for job_id in ids])
        session.execute(insert(events), [{**event, "job_id": job_id} for job_id in ids])
    return ids
