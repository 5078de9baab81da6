"""Insert new jobs with their metadata, first events and idempotency keys."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NotRequired, TypedDict, cast

from sqlalchemy import Table, insert, inspect, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from tpo.core.loop import locate
from tpo.core.state import State
from tpo.db import new_id, now
from tpo.jobs.records import progress_columns, save_record
from tpo.jobs.tables import EventRow, Job, MetadataRow
from tpo.tenants.idempotency import IdempotencyRequest, record_key

# Statements that every request needs are built once: building one costs more than running it.
JOBS = cast("Table", Job.__table__)
ATTRIBUTES = {column.key: inspect(Job).get_property_by_column(column).key for column in JOBS.columns}
_NOTHING: dict[str, Any] = dict.fromkeys(ATTRIBUTES.values())
_BLANK: dict[str, Any] = {
    c.key: c.default.arg for c in JOBS.columns if isinstance(c.default, ScalarElementColumnDefault)
}
_MOMENT = select(now())
_INSERT_JOBS = insert(JOBS)
_INSERT_METADATA = insert(cast("Table", MetadataRow.__table__))
_INSERT_EVENTS = insert(cast("Table", EventRow.__table__))


class JobOptions(TypedDict):
    """Columns of a job's row that do not come from its optimization."""

    model: str
    reward_model: str
    max_attempts: int
    metadata: NotRequired[dict[str, str] | None]
    priority: NotRequired[int]
    deadline_seconds: NotRequired[float | None]
    external_id: NotRequired[str | None]
    source_id: NotRequired[str | None]


NewJob = tuple[State, IdempotencyRequest | None, JobOptions]
"""A job to create: its optimization, the identity of its request, and further columns."""


def insert_jobs(session: Session, tenant: str, wanted: Sequence[NewJob]) -> list[Job]:
    """Insert new jobs with their metadata, first events and idempotency keys, and return them."""
    moment = session.execute(_MOMENT).scalar_one()
    rows = [_row(tenant, moment, *each) for each in wanted]
    session.execute(_INSERT_JOBS, rows)
    event = {"number": 1, "type": "job.queued", "data": {}, "created_at": moment}
    session.execute(_INSERT_EVENTS, [{"job_id": row["id"], **event} for row in rows])
    if pairs := [
        {"job_id": row["id"], "tenant": tenant, "key": key, "value": value}
        for row in rows
        for key, value in row["metadata"].items()
    ]:
        session.execute(_INSERT_METADATA, pairs)
    for (state, once, _), row in zip(wanted, rows, strict=True):
        save_record(session, row["id"], state)
        record_key(session, tenant, once, job_id=row["id"])
    written = (_NOTHING | {ATTRIBUTES[name]: value for name, value in row.items()} for row in rows)
    return [cast("Job", SimpleNamespace(**values)) for values in written]


def _row(
    tenant: str, moment: float, state: State, once: IdempotencyRequest | None, of_job: JobOptions
) -> dict[str, Any]:
    deadline = of_job.get("deadline_seconds")
    return _BLANK | {
        "id": new_id("job_", moment),
        "tenant": tenant,
        "model": of_job["model"],
        "reward_model": of_job["reward_model"],
        "input": [m.model_dump() for m in state.input],
        "params": state.params.model_dump(mode="json"),
        "prompts": state.prompts.model_dump(mode="json"),
        "priority": of_job.get("priority", 0),
        "metadata": of_job.get("metadata") or {},
        "external_id": of_job.get("external_id"),
        "fingerprint": once.fingerprint if once else None,
        "source_id": of_job.get("source_id"),
        "created_at": moment,
        "queued_at": moment,
        "deadline_at": None if deadline is None else moment + deadline,
        "max_attempts": of_job["max_attempts"],
        "last_event": 1,
        **progress_columns(state, locate(state)),
    }
