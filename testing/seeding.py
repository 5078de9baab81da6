"""Seed large databases in minutes: the store creates two jobs, and the database copies their rows under new ids.

The copies have every column that the store writes, so that any query reads a copy like an original.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from sqlalchemy import Connection, Engine, Table, create_engine, event, text

from testing.fakes import FakePolicy, FakeReward, new_state, proceed, sample_text, tagged
from testing.jobs import claim_one
from tpo.core.ports import Generate, Text
from tpo.core.run import run
from tpo.core.state import State
from tpo.db import Base
from tpo.jobs.outcomes import Outcome
from tpo.store import Store


class Serves(TypedDict):
    """The models that a job needs and a worker serves."""

    model: str
    reward_model: str


SERVES: Serves = {"model": "policy", "reward_model": "reward"}
CANDIDATES = 10
"""Candidates of each terminal job: 5 first samples, and 5 of its one iteration."""
RUN = 1000
"""Number of jobs with the same value of the metadata `run`."""

_QUERY = "Hello, I am Maria. The kettle that I bought is broken. I would like a refund."
_PARTS = 20
_SERIES = {
    "sqlite": "(WITH RECURSIVE s(i) AS (SELECT :first UNION ALL SELECT i + 1 FROM s WHERE i < :last) SELECT i FROM s)",
    "postgresql": "(SELECT i FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS s(i))",
}
# Jobs are half a second apart; the last one is as old as the templates.
_TIME = "(CAST(:base AS double precision) - (CAST(:jobs AS bigint) - n.i) * 0.5)"
_ID = {
    "sqlite": f"'job_' || printf('%012x', CAST({_TIME} * 1000 AS integer)) || printf('%020x', n.i * 2654435761)",
    "postgresql": f"'job_' || lpad(to_hex(CAST(floor({_TIME} * 1000) AS bigint)), 12, '0')"
    " || lpad(to_hex(n.i * 2654435761), 20, '0')",
}
_RUN = f"CAST(n.i / {RUN} AS text)"
_METADATA = {"sqlite": f"json_object('run', {_RUN})", "postgresql": f"json_build_object('run', {_RUN})"}
# One of 20 is queued, one of 100 failed and one of 1,000 expired: rare enough that finding them needs an index.
_IS_QUEUED = "n.i % 20 = 0"
_STATUS = "CASE WHEN n.i % 100 = 1 THEN 'failed' WHEN n.i % 1000 = 2 THEN 'expired' ELSE 'completed' END"


@dataclass(frozen=True)
class SeededDatabase:
    """Facts about a seeded database."""

    jobs: int
    middle: str
    """Id of a terminal job in the middle: about as many jobs are older as are newer."""
    run: str
    """Value of the metadata `run` of the jobs around it."""


def seed_database(engine: Engine, jobs: int) -> SeededDatabase:
    """Fill an empty database with jobs of the default tenant: 1 of 20 is queued, the others are terminal."""
    store = Store(engine)
    templates = {"ended": _create_terminal(store), "waits": _create(store).job_id}
    base = store.jobs.get(templates["waits"]).created_at
    with _unchecked_connection(engine) as connection:
        for part in range(_PARTS):
            first, last = (jobs * n // _PARTS for n in (part, part + 1))
            if first < last:
                _copy_part(connection, {"first": first, "last": last - 1, "jobs": jobs, "base": base, **templates})
                connection.commit()
        number = jobs // 2 + 3
        middle = connection.scalar(
            text(f"SELECT {_ID[engine.dialect.name]} FROM (SELECT {number} AS i) AS n"),
            {"jobs": jobs, "base": base},
        )
    for job_id in templates.values():
        store.jobs.cancel(job_id)
        store.jobs.delete(job_id)
    _checkpoint_and_vacuum(engine)
    return SeededDatabase(jobs, str(middle), str(number // RUN))


def new_job() -> State:
    """Return the state of a job before its first step."""
    return new_state(_QUERY, sample_size=CANDIDATES // 2, max_iterations=1)


def policy() -> FakePolicy:
    """Return a policy whose samples have about 150 characters."""

    def answer(request: Generate, sample: int) -> Text:
        words = f"{request.kind} {request.iteration}-{sample}: " + "I am sorry that the kettle is broken. " * 4
        return sample_text(tagged(words) if request.kind == "update" else words)

    return FakePolicy(answer)


@dataclass(frozen=True)
class _Created:
    job_id: str
    state: State


def _create(store: Store) -> _Created:
    state = new_job()
    job = store.jobs.submit(state, max_attempts=3, metadata={"run": "template"}, **SERVES).job
    return _Created(job.id, state)


def _create_terminal(store: Store) -> str:
    job_id = _create(store).job_id
    claimed = claim_one(store, job_id, "template", 3600, **SERVES)
    if claimed is None:
        raise SystemExit("the template job could not be claimed")
    lease, state = claimed
    final = run(state, policy(), FakeReward(), partial(store.leases.checkpoint, lease), proceed)
    store.leases.finish(lease, Outcome("completed", output=final.best.text if final.best else None))
    return job_id


def _copy_part(connection: Connection, values: dict[str, Any]) -> None:
    """Copy one part of the jobs. Records are inserted before their job: SQLite refuses records of a terminal job."""
    dialect = connection.dialect.name
    series, new_id = f"{_SERIES[dialect]} AS n", _ID[dialect]
    template = f"CASE WHEN {_IS_QUEUED} THEN :waits ELSE :ended END"
    for table in Base.metadata.sorted_tables:
        if table.name != "jobs" and "job_id" in table.primary_key.columns and table.name != "batch_lines":
            changed = {"job_id": new_id, "value": _RUN}
            _insert(connection, table, changed, f"{series} JOIN {table.name} t ON t.job_id = {template}", values)
    keys = f"SELECT 'default', 'key-' || n.i, 'hash', {new_id}, {_TIME} FROM {series}"
    connection.execute(
        text(f"INSERT INTO idempotency_keys (tenant, key, fingerprint, job_id, created_at) {keys}"),
        {name: values[name] for name in ("first", "last", "jobs", "base")},
    )
    changed = {
        "id": new_id,
        "status": f"CASE WHEN {_IS_QUEUED} THEN 'queued' ELSE {_STATUS} END",
        "metadata": _METADATA[dialect],
        "created_at": _TIME,
        "completed_at": f"CASE WHEN {_IS_QUEUED} THEN NULL ELSE {_TIME} + 0.4 END",
    }
    _insert(connection, Base.metadata.tables["jobs"], changed, f"{series} JOIN jobs t ON t.id = {template}", values)


def _insert(connection: Connection, table: Table, changed: dict[str, str], source: str, values: dict[str, Any]) -> None:
    columns = {c.name: changed.get(c.name, f't."{c.name}"') for c in table.columns}
    names = ", ".join(f'"{name}"' for name in columns)
    statement = f"INSERT INTO {table.name} ({names}) SELECT {', '.join(columns.values())} FROM {source}"
    connection.execute(text(statement), values)


@contextlib.contextmanager
def _unchecked_connection(engine: Engine) -> Iterator[Connection]:
    """Connect without timeouts, foreign keys and, on PostgreSQL, triggers; PostgreSQL requires a superuser for it."""
    own = create_engine(engine.url)

    @event.listens_for(own, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        if own.dialect.name == "sqlite":
            cursor.execute("PRAGMA foreign_keys = OFF")
            cursor.execute("PRAGMA synchronous = OFF")

    @event.listens_for(own, "begin")
    def _begin(connection: Connection) -> None:
        if own.dialect.name == "postgresql":  # only for the transaction: a pooler's server connections are shared
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")

    try:
        with own.connect() as connection:
            yield connection
    finally:
        own.dispose()


def _checkpoint_and_vacuum(engine: Engine) -> None:
    """Run the database's background work now (checkpoint, vacuum), so that it does not disturb a measurement."""
    own = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with own.connect() as connection:
        if own.dialect.name == "sqlite":
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
        else:
            connection.execute(text("VACUUM (ANALYZE)"))
            connection.execute(text("CHECKPOINT"))
    own.dispose()
