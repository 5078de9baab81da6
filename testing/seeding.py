"""Large databases in minutes: two jobs are made through the store, and the database copies their rows under new ids.

The copies have every column that the store writes, so that whatever reads a job reads a copy just as well.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from sqlalchemy import Connection, Engine, Table, create_engine, event, text

from testing.fakes import FakePolicy, FakeReward, go_on, new_state, said, tagged
from testing.jobs import claim_one
from tpo.core.ports import Generate, Text
from tpo.core.run import run
from tpo.core.state import State
from tpo.db import Base
from tpo.jobs.outcomes import Outcome
from tpo.store import Store


class Serves(TypedDict):
    """Which models a job wants, and a worker has."""

    model: str
    reward_model: str


SERVES: Serves = {"model": "policy", "reward_model": "reward"}
CANDIDATES = 10
"""Of each job that has ended: 5 samples, and 5 more of its one iteration."""
RUN = 1000
"""Jobs that share one pair of metadata."""

_QUERY = "Hello, I am Maria. The kettle that I bought is broken. I would like a refund."
_PARTS = 20
_SERIES = {
    "sqlite": "(WITH RECURSIVE s(i) AS (SELECT :first UNION ALL SELECT i + 1 FROM s WHERE i < :last) SELECT i FROM s)",
    "postgresql": "(SELECT i FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS s(i))",
}
# Half a second lies between two jobs; the last one is as old as the templates.
_TIME = "(CAST(:base AS double precision) - (CAST(:jobs AS bigint) - n.i) * 0.5)"
_ID = {
    "sqlite": f"'job_' || printf('%012x', CAST({_TIME} * 1000 AS integer)) || printf('%020x', n.i * 2654435761)",
    "postgresql": f"'job_' || lpad(to_hex(CAST(floor({_TIME} * 1000) AS bigint)), 12, '0')"
    " || lpad(to_hex(n.i * 2654435761), 20, '0')",
}
_RUN = f"CAST(n.i / {RUN} AS text)"
_METADATA = {"sqlite": f"json_object('run', {_RUN})", "postgresql": f"json_build_object('run', {_RUN})"}
# One of 20 waits; one of 100 failed and one of 1,000 expired: seldom enough to be worth looking for.
_WAITS = "n.i % 20 = 0"
_STATUS = "CASE WHEN n.i % 100 = 1 THEN 'failed' WHEN n.i % 1000 = 2 THEN 'expired' ELSE 'completed' END"


@dataclass(frozen=True)
class Filled:
    """What stands in a database after it was filled."""

    jobs: int
    middle: str
    """The id of an ended job with as many jobs before it as after it."""
    run: str
    """The value of the metadata `run` of the jobs around it."""


def fill(engine: Engine, jobs: int) -> Filled:
    """Fill an empty database with jobs of the default tenant: 1 of 20 waits, the others have ended."""
    store = Store(engine)
    templates = {"ended": _ended(store), "waits": _create(store).job_id}
    base = store.jobs.get(templates["waits"]).created_at
    with _unchecked(engine) as connection:
        for part in range(_PARTS):
            first, last = (jobs * n // _PARTS for n in (part, part + 1))
            if first < last:
                _copy(connection, {"first": first, "last": last - 1, "jobs": jobs, "base": base, **templates})
                connection.commit()
        number = jobs // 2 + 3
        middle = connection.scalar(
            text(f"SELECT {_ID[engine.dialect.name]} FROM (SELECT {number} AS i) AS n"),
            {"jobs": jobs, "base": base},
        )
    for job_id in templates.values():
        store.jobs.cancel(job_id)
        store.jobs.delete(job_id)
    _settle(engine)
    return Filled(jobs, str(middle), str(number // RUN))


def new_job() -> State:
    """A job before its first step."""
    return new_state(_QUERY, sample_size=CANDIDATES // 2, max_iterations=1)


def policy() -> FakePolicy:
    """A policy whose responses have some 150 characters."""

    def answer(request: Generate, sample: int) -> Text:
        words = f"{request.kind} {request.iteration}-{sample}: " + "I am sorry that the kettle is broken. " * 4
        return said(tagged(words) if request.kind == "update" else words)

    return FakePolicy(answer)


@dataclass(frozen=True)
class _Created:
    job_id: str
    state: State


def _create(store: Store) -> _Created:
    state = new_job()
    job = store.jobs.submit(state, max_attempts=3, metadata={"run": "template"}, **SERVES).job
    return _Created(job.id, state)


def _ended(store: Store) -> str:
    job_id = _create(store).job_id
    claimed = claim_one(store, job_id, "template", 3600, **SERVES)
    if claimed is None:
        raise SystemExit("the template could not be claimed")
    lease, state = claimed
    final = run(state, policy(), FakeReward(), partial(store.leases.checkpoint, lease), go_on)
    store.leases.finish(lease, Outcome("completed", output=final.best.text if final.best else None))
    return job_id


def _copy(connection: Connection, values: dict[str, Any]) -> None:
    """One part of the jobs. What belongs to a job comes before it: SQLite refuses records of a job that has ended."""
    dialect = connection.dialect.name
    series, new_id = f"{_SERIES[dialect]} AS n", _ID[dialect]
    template = f"CASE WHEN {_WAITS} THEN :waits ELSE :ended END"
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
        "status": f"CASE WHEN {_WAITS} THEN 'queued' ELSE {_STATUS} END",
        "metadata": _METADATA[dialect],
        "created_at": _TIME,
        "completed_at": f"CASE WHEN {_WAITS} THEN NULL ELSE {_TIME} + 0.4 END",
    }
    _insert(connection, Base.metadata.tables["jobs"], changed, f"{series} JOIN jobs t ON t.id = {template}", values)


def _insert(connection: Connection, table: Table, changed: dict[str, str], source: str, values: dict[str, Any]) -> None:
    columns = {c.name: changed.get(c.name, f't."{c.name}"') for c in table.columns}
    names = ", ".join(f'"{name}"' for name in columns)
    statement = f"INSERT INTO {table.name} ({names}) SELECT {', '.join(columns.values())} FROM {source}"
    connection.execute(text(statement), values)


@contextlib.contextmanager
def _unchecked(engine: Engine) -> Iterator[Connection]:
    """A connection without time limits, foreign keys and, on PostgreSQL, triggers: it needs a superuser there."""
    own = create_engine(engine.url)

    @event.listens_for(own, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        if own.dialect.name == "sqlite":
            cursor.execute("PRAGMA foreign_keys = OFF")
            cursor.execute("PRAGMA synchronous = OFF")
        else:
            cursor.execute("SET session_replication_role = replica")
            cursor.execute("SET synchronous_commit = off")
            connection.commit()

    try:
        with own.connect() as connection:
            yield connection
    finally:
        own.dispose()


def _settle(engine: Engine) -> None:
    """Do now what the database would do in the background while something is measured."""
    own = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with own.connect() as connection:
        if own.dialect.name == "sqlite":
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
        else:
            connection.execute(text("VACUUM (ANALYZE)"))
            connection.execute(text("CHECKPOINT"))
    own.dispose()
