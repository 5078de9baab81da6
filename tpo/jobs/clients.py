"""What clients ask. Every query is the tenant's own: another's job is not found, exactly as one that never was."""

import secrets
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, Unpack, cast

from sqlalchemy import Select, Table, bindparam, exists, insert, inspect, select, union_all
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from tpo.errors import ExternalIdTaken, JobNotFound, StoreUnavailable
from tpo.jobs.bound import Bound
from tpo.jobs.database import asking, now, reading, write
from tpo.jobs.once import RACES, Once, remember, said_before
from tpo.jobs.quotas import Limits, Room, check_room
from tpo.jobs.records import fresh, progress_of, read_state, write_difference
from tpo.jobs.tables import EventRow, Job, MetadataRow
from tpo.loop import standing
from tpo.state import State
from tpo.status import Status

# Statements that every request needs are built once: building one costs more than running it.
_JOBS = cast("Table", Job.__table__)
_ATTRIBUTES = {column.key: inspect(Job).get_property_by_column(column).key for column in _JOBS.columns}
_AS_JOB = [column.label(_ATTRIBUTES[column.key]) for column in _JOBS.columns]
"""A job's columns under the names of its attributes: such a row reads as a Job, at half of the cost."""
_NOTHING: dict[str, Any] = dict.fromkeys(_ATTRIBUTES.values())
_BLANK: dict[str, Any] = {
    c.key: c.default.arg for c in _JOBS.columns if isinstance(c.default, ScalarElementColumnDefault)
}
_MOMENT = select(now())
_OWN = select(*_AS_JOB).where(_JOBS.c.id == bindparam("job_id"), _JOBS.c.tenant == bindparam("tenant"))
_INSERT_JOBS = insert(_JOBS)
_INSERT_METADATA = insert(cast("Table", MetadataRow.__table__))
_INSERT_EVENTS = insert(cast("Table", EventRow.__table__))


class JobOptions(TypedDict):
    """What stands on a job's row beside its optimization."""

    model: str
    reward_model: str
    max_attempts: int
    metadata: NotRequired[dict[str, str] | None]
    priority: NotRequired[int]
    deadline_seconds: NotRequired[float | None]
    external_id: NotRequired[str | None]
    source_id: NotRequired[str | None]


class Submitted(NamedTuple):
    """A job that was asked for."""

    job: Job
    new: bool
    room: Room | None
    """How much more the tenant may ask for now; None where nothing limits it, or nothing was made."""


NewJob = tuple[State, Once | None, JobOptions]
"""A job to be made: its optimization, what names the request, and what stands on its row beside."""


class ClientQueries(Bound):
    """The part of the store that the API uses, for one tenant."""

    def create(self, state: State, **of_job: Unpack[JobOptions]) -> Job:
        """Commit a new job and its first event."""
        return self.submit(state, **of_job).job

    def submit(
        self,
        state: State,
        *,
        once: Once | None = None,
        limits: Limits | None = None,
        **of_job: Unpack[JobOptions],
    ) -> Submitted:
        """Commit a new job, its first event and what names the request; or give the job that the request made before.

        Raises SameKeyOtherBody, ExternalIdTaken and QuotaExceeded; then nothing was written.
        """
        external_id = of_job.get("external_id")

        def make(session: Session) -> Submitted:
            if known := self._known(session, once, external_id):
                return Submitted(known, new=False, room=None)
            room = check_room(session, self.tenant, limits) if limits else None
            [job] = self._insert(session, [(state, once, of_job)])
            return Submitted(job, new=True, room=room)

        for _ in range(RACES):
            try:
                return write(self._engine, make)
            except IntegrityError:
                # Another process made the same job a moment ago: the next round finds it.
                if once is None and external_id is None:
                    raise
        raise StoreUnavailable()

    def get(self, job_id: str) -> Job:
        """One job. Raises JobNotFound."""
        with asking(self._engine) as connection:
            # One query whether it is not there or not theirs: nobody learns which by its time.
            job = connection.execute(_OWN, {"job_id": job_id, "tenant": self.tenant}).one_or_none()
            if job is None:
                raise JobNotFound(f"There is no job {job_id!r}.")
            return cast("Job", job)

    def page(
        self,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        statuses: Sequence[Status] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> Sequence[Job]:
        """A page of jobs by their age; `after` is the id that the last page ended with."""

        def first_of(query: Select[str], job_id: InstrumentedAttribute[str]) -> Select[str]:
            """As many as the page needs, read off an index that ends with the job's id."""
            if after is not None:
                query = query.where(job_id > after if order == "asc" else job_id < after)
            return query.order_by(job_id if order == "asc" else job_id.desc()).limit(limit)

        if metadata:
            ids = first_of(_with_metadata(self.tenant, metadata, statuses), MetadataRow.job_id)
        elif statuses:
            # One status after the other: of several, no index holds the jobs in the order of their ids.
            each = [select(Job.id).where(Job.tenant == self.tenant, Job.status == s) for s in dict.fromkeys(statuses)]
            some = union_all(*(select(first_of(one, Job.id).subquery().c.id) for one in each)).subquery().c.id
            ids = select(some).order_by(some if order == "asc" else some.desc()).limit(limit)
        else:
            ids = first_of(select(Job.id).where(Job.tenant == self.tenant), Job.id)
        query = select(*_AS_JOB).where(Job.id.in_(ids)).order_by(Job.id if order == "asc" else Job.id.desc())
        with asking(self._engine) as connection:
            return cast("Sequence[Job]", connection.execute(query).all())

    def state(self, job_id: str) -> State:
        """All that is recorded of one job's optimization. Raises JobNotFound."""
        with reading(self._engine) as session:
            return read_state(session, self._own(session, job_id))

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[EventRow]:
        """The events of a job that follow the number `after`."""
        query = (
            select(EventRow)
            .join(Job, Job.id == EventRow.job_id)
            .where(Job.id == job_id, Job.tenant == self.tenant, EventRow.number > after)
        )
        with reading(self._engine) as session:
            return session.scalars(query.order_by(EventRow.number).limit(limit)).all()

    def _known(self, session: Session, once: Once | None, external_id: str | None) -> Job | None:
        """The job that this request has made before. Raises SameKeyOtherBody, ExternalIdTaken."""
        if said := said_before(session, self.tenant, once):
            return session.get_one(Job, said.job_id)
        if external_id is None:
            return None
        query = select(Job).where(Job.tenant == self.tenant, Job.external_id == external_id)
        job = session.scalars(query).one_or_none()
        if job is not None:
            if once is None or job.fingerprint != once.fingerprint:
                raise ExternalIdTaken()
            remember(session, self.tenant, once, job_id=job.id)
        return job

    def _insert(self, session: Session, wanted: Sequence[NewJob]) -> list[Job]:
        """Write new jobs and their first events."""
        moment = session.execute(_MOMENT).scalar_one()
        rows = [self._row(moment, *each) for each in wanted]
        session.execute(_INSERT_JOBS, rows)
        told = {"number": 1, "type": "job.queued", "data": {}, "created_at": moment}
        session.execute(_INSERT_EVENTS, [{"job_id": row["id"], **told} for row in rows])
        if pairs := [
            {"job_id": row["id"], "tenant": self.tenant, "key": key, "value": value}
            for row in rows
            for key, value in row["metadata"].items()
        ]:
            session.execute(_INSERT_METADATA, pairs)
        for (state, once, _), row in zip(wanted, rows, strict=True):
            if (before := fresh(state)) != state:
                write_difference(session, row["id"], before, state)
            remember(session, self.tenant, once, job_id=row["id"])
        written = (_NOTHING | {_ATTRIBUTES[name]: value for name, value in row.items()} for row in rows)
        return [cast("Job", SimpleNamespace(**values)) for values in written]

    def _row(self, moment: float, state: State, once: Once | None, of_job: JobOptions) -> dict[str, Any]:
        deadline = of_job.get("deadline_seconds")
        return _BLANK | {
            "id": new_job_id(moment),
            "tenant": self.tenant,
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
            "rung_at": moment,
            "deadline_at": None if deadline is None else moment + deadline,
            "max_attempts": of_job["max_attempts"],
            "last_event": 1,
            **progress_of(state, standing(state)),
        }

    def _own(self, session: Session, job_id: str, *, lock: bool = False) -> Job:
        """The tenant's job. One query whether it is not there or not theirs: nobody learns which by its time."""
        query = select(Job).where(Job.id == job_id, Job.tenant == self.tenant)
        job = session.scalars(query.with_for_update() if lock else query).one_or_none()
        if job is None:
            raise JobNotFound(f"There is no job {job_id!r}.")
        return job


def _with_metadata(tenant: str, metadata: Mapping[str, str], statuses: Sequence[Status]) -> Select[str]:
    """The ids of a tenant's jobs that have all these pairs: those with the first one, looked through for the rest."""
    (key, value), *others = metadata.items()
    query = select(MetadataRow.job_id).where(
        MetadataRow.tenant == tenant, MetadataRow.key == key, MetadataRow.value == value
    )
    for key, value in others:
        other = aliased(MetadataRow)
        query = query.where(exists().where(other.job_id == MetadataRow.job_id, other.key == key, other.value == value))
    if statuses:
        query = query.where(exists().where(Job.id == MetadataRow.job_id, Job.status.in_(statuses)))
    return query


def new_job_id(seconds: float) -> str:
    """An id that sorts by the time of its making and cannot be guessed: 48 bits of milliseconds, 80 random bits."""
    return f"job_{int(seconds * 1000):012x}{secrets.token_hex(10)}"
