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
from tpo.jobs.tables import PREVIEW_CHARACTERS, EventRow, Job, MetadataRow
from tpo.jobs.view import JobView
from tpo.tenants.idempotency import IdempotencyRequest, record_key

# Statements that every request needs are built once: building one costs more than running it.
JOBS = cast("Table", Job.__table__)
ATTRIBUTES = {column.key: inspect(Job).get_property_by_column(column).key for column in JOBS.columns}
_NULLS: dict[str, Any] = dict.fromkeys(ATTRIBUTES.values())
_DEFAULTS: dict[str, Any] = {
    c.key: c.default.arg for c in JOBS.columns if isinstance(c.default, ScalarElementColumnDefault)
}
_NOW = select(now())
_INSERT_JOBS = insert(JOBS)
_INSERT_METADATA = insert(cast("Table", MetadataRow.__table__))
_INSERT_EVENTS = insert(cast("Table", EventRow.__table__))


class JobOptions(TypedDict):
    """Columns of a job's row that do not come from the state of its optimization."""

    model: str
    reward_model: str
    max_attempts: int
    metadata: NotRequired[dict[str, str] | None]
    priority: NotRequired[int]
    deadline_seconds: NotRequired[float | None]
    external_id: NotRequired[str | None]
    source_id: NotRequired[str | None]


NewJob = tuple[State, IdempotencyRequest | None, JobOptions]
"""A job to create: the state of its optimization, the identity of its request, and its other columns."""


def insert_jobs(session: Session, tenant: str, new_jobs: Sequence[NewJob]) -> list[JobView]:
    """Insert new jobs with their metadata, first events and idempotency keys, and return them."""
    created_at = session.execute(_NOW).scalar_one()
    rows = [_row(tenant, created_at, *each) for each in new_jobs]
    session.execute(_INSERT_JOBS, rows)
    event = {"number": 1, "type": "job.queued", "data": {}, "created_at": created_at}
    session.execute(_INSERT_EVENTS, [{"job_id": row["id"], **event} for row in rows])
    if pairs := [
        {"job_id": row["id"], "tenant": tenant, "key": key, "value": value}
        for row in rows
        for key, value in row["metadata"].items()
    ]:
        session.execute(_INSERT_METADATA, pairs)
    for (state, request, _), row in zip(new_jobs, rows, strict=True):
        save_record(session, row["id"], state)
        record_key(session, tenant, request, job_id=row["id"])
    records = (_NULLS | {ATTRIBUTES[name]: value for name, value in row.items()} for row in rows)
    return [JobView.of(cast("Job", SimpleNamespace(**values))) for values in records]


def input_bytes(state: State) -> int:
    """Return the length of a job's messages in UTF-8."""
    return sum(len(message.content.encode()) for message in state.input)


def _row(
    tenant: str, created_at: float, state: State, request: IdempotencyRequest | None, options: JobOptions
) -> dict[str, Any]:
    deadline = options.get("deadline_seconds")
    return _DEFAULTS | {
        "id": new_id("job_", created_at),
        "tenant": tenant,
        "model": options["model"],
        "reward_model": options["reward_model"],
        "input": [m.model_dump() for m in state.input],
        "input_preview": _preview(state.input[-1].content),
        "input_bytes": input_bytes(state),
        "params": state.params.model_dump(mode="json"),
        "prompts": state.prompts.model_dump(mode="json"),
        "priority": options.get("priority", 0),
        "metadata": options.get("metadata") or {},
        "external_id": options.get("external_id"),
        "fingerprint": request.fingerprint if request else None,
        "source_id": options.get("source_id"),
        "created_at": created_at,
        "queued_at": created_at,
        "deadline_at": None if deadline is None else created_at + deadline,
        "max_attempts": options["max_attempts"],
        "last_event": 1,
        **progress_columns(state, locate(state)),
    }


def _preview(text: str) -> str:
    """Return the beginning of a text, without what a database cannot store in a column of text."""
    return text[:PREVIEW_CHARACTERS].replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
