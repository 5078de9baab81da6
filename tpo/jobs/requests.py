"""Submit and read jobs. Every query is bound to the tenant: another tenant's job is not found."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, Unpack, cast

from sqlalchemy import Select, bindparam, exists, func, literal, null, select, union_all
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from tpo.core.errors import ExternalIdTakenError, JobNotFoundError, StoreUnavailableError
from tpo.core.state import Message, State
from tpo.core.status import Status
from tpo.db import Queries, reading, single_query, write
from tpo.jobs.insertion import ATTRIBUTES, JOBS, JobOptions, input_bytes, insert_jobs
from tpo.jobs.quotas import RateLimitStatus, check_quota, free_slots
from tpo.jobs.records import read_state
from tpo.jobs.tables import EventRow, Job, MetadataRow
from tpo.jobs.view import JobView, read_messages
from tpo.tenants.idempotency import MAX_CONFLICT_RETRIES, IdempotencyRequest, find_existing, record_key
from tpo.tenants.tenants import Limits

# Statements that every request needs are built once: building one costs more than running it.
_AS_JOB = [column.label(ATTRIBUTES[column.key]) for column in JOBS.columns]
"""A job's columns, labelled as its attributes: such a row can be read like a Job, at about half the cost."""
_WITHOUT_TEXTS = [
    (null() if column.key in ("input", "output") else column).label(ATTRIBUTES[column.key]) for column in JOBS.columns
]
_OWN = select(*_AS_JOB).where(JOBS.c.id == bindparam("job_id"), JOBS.c.tenant == bindparam("tenant"))


class Submitted(NamedTuple):
    """A submitted job."""

    job: JobView
    new: bool
    rate_limit: RateLimitStatus | None
    """The tenant's remaining quota; None if there is no limit, or if no job was created."""


TextField = Literal["input", "output"]


class Texts(NamedTuple):
    """The texts of a job that a list was asked for."""

    input: tuple[Message, ...] | None
    output: str | None


class JobRequests(Queries):
    """Submit and read the jobs of one tenant."""

    def submit(
        self,
        state: State,
        *,
        idempotency: IdempotencyRequest | None = None,
        limits: Limits | None = None,
        **options: Unpack[JobOptions],
    ) -> Submitted:
        """Create a job with its first event and idempotency key, or return the job that the same request created.

        Raises IdempotencyConflictError, ExternalIdTakenError and QuotaExceededError, and then writes nothing.
        """
        external_id = options.get("external_id")

        def create(session: Session) -> Submitted:
            if known := self._known(session, idempotency, external_id):
                return Submitted(JobView.of(known), new=False, rate_limit=None)
            rate_limit = check_quota(session, self.tenant, limits, input_bytes(state)) if limits else None
            [job] = insert_jobs(session, self.tenant, [(state, idempotency, options)])
            return Submitted(job, new=True, rate_limit=rate_limit)

        for _ in range(MAX_CONFLICT_RETRIES):
            try:
                return write(self._engine, create)
            except IntegrityError:
                # A concurrent request created the same job: the next round finds it.
                if idempotency is None and external_id is None:
                    raise
        raise StoreUnavailableError()

    def get(self, job_id: str) -> JobView:
        """Return one job. Raises JobNotFoundError."""
        with single_query(self._engine) as connection:
            # The same query for a missing job and another tenant's, so that their response times do not differ.
            job = connection.execute(_OWN, {"job_id": job_id, "tenant": self.tenant}).one_or_none()
            if job is None:
                raise JobNotFoundError(f"There is no job {job_id!r}.")
            return JobView.of(cast("Job", job))

    def page(
        self,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        statuses: Sequence[Status] = (),
        metadata: Mapping[str, str] | None = None,
        texts: bool = True,
    ) -> Sequence[JobView]:
        """Return a page of jobs, ordered by age. `after` is the last id of the previous page.

        Without `texts` their inputs and outputs are not read, and are empty.
        """

        def first_of(query: Select[str], job_id: InstrumentedAttribute[str]) -> Select[str]:
            """Limit a query to one page, read from an index that ends with the job's id."""
            if after is not None:
                query = query.where(job_id > after if order == "asc" else job_id < after)
            return query.order_by(job_id if order == "asc" else job_id.desc()).limit(limit)

        if metadata:
            ids = first_of(_with_metadata(self.tenant, metadata, statuses), MetadataRow.job_id)
        elif statuses:
            # One query for each status: no index orders the jobs of several statuses by id.
            each = [select(Job.id).where(Job.tenant == self.tenant, Job.status == s) for s in dict.fromkeys(statuses)]
            page_ids = union_all(*(select(first_of(one, Job.id).subquery().c.id) for one in each)).subquery().c.id
            ids = select(page_ids).order_by(page_ids if order == "asc" else page_ids.desc()).limit(limit)
        else:
            ids = first_of(select(Job.id).where(Job.tenant == self.tenant), Job.id)
        columns = _AS_JOB if texts else _WITHOUT_TEXTS
        query = select(*columns).where(Job.id.in_(ids)).order_by(Job.id if order == "asc" else Job.id.desc())
        with single_query(self._engine) as connection:
            return [JobView.of(cast("Job", row)) for row in connection.execute(query)]

    def texts(self, job_ids: Sequence[str], fields: Collection[TextField], max_bytes: int) -> list[Texts]:
        """Return the texts of the first of these jobs: of as many as fit into about `max_bytes`, but of one at least.

        Fields that are not wanted, and those of a job that was deleted meanwhile, are None.
        """
        columns = [JOBS.c[name] if name in fields else null().label(name) for name in ("input", "output")]
        input_bytes = JOBS.c.input_bytes if "input" in fields else literal(0)
        output_bytes = func.coalesce(func.length(JOBS.c.output), 0) if "output" in fields else literal(0)
        own = (JOBS.c.tenant == self.tenant, JOBS.c.id.in_(job_ids))
        with reading(self._engine) as session:
            sizes = {
                row.id: row.bytes
                for row in session.execute(select(JOBS.c.id, (input_bytes + output_bytes).label("bytes")).where(*own))
            }
            totals = accumulate(sizes.get(job_id, 0) for job_id in job_ids)
            fitting = max(1, sum(total <= max_bytes for total in totals))
            which = (*own, JOBS.c.id.in_(job_ids[:fitting]))
            found = {
                row.id: Texts(None if row.input is None else read_messages(row.input), row.output)
                for row in session.execute(select(JOBS.c.id, *columns).where(*which))
            }
        return [found.get(job_id, Texts(None, None)) for job_id in job_ids[:fitting]]

    def state(self, job_id: str) -> State:
        """Return the recorded state of one job's optimization. Raises JobNotFoundError."""
        with reading(self._engine) as session:
            return read_state(session, self._own(session, job_id))

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[EventRow]:
        """Return the events of a job after event number `after`."""
        query = (
            select(EventRow)
            .join(Job, Job.id == EventRow.job_id)
            .where(Job.id == job_id, Job.tenant == self.tenant, EventRow.number > after)
        )
        with reading(self._engine) as session:
            return session.scalars(query.order_by(EventRow.number).limit(limit)).all()

    def free_slots(self, limits: Limits) -> int | None:
        """Return how many more jobs of the tenant may be in flight; None if there is no limit."""
        with reading(self._engine) as session:
            return free_slots(session, self.tenant, limits)

    def _known(self, session: Session, idempotency: IdempotencyRequest | None, external_id: str | None) -> Job | None:
        """Return the job that this request created before. Raises IdempotencyConflictError, ExternalIdTakenError."""
        if known := find_existing(session, self.tenant, idempotency):
            return session.get_one(Job, known.job_id)
        if external_id is None:
            return None
        query = select(Job).where(Job.tenant == self.tenant, Job.external_id == external_id)
        job = session.scalars(query).one_or_none()
        if job is not None:
            if idempotency is None or job.fingerprint != idempotency.fingerprint:
                raise ExternalIdTakenError()
            record_key(session, self.tenant, idempotency, job_id=job.id)
        return job

    def _own(self, session: Session, job_id: str, *, lock: bool = False) -> Job:
        """Return the tenant's job. Raises JobNotFoundError, also for another tenant's job, after the same query."""
        query = select(Job).where(Job.id == job_id, Job.tenant == self.tenant)
        job = session.scalars(query.with_for_update() if lock else query).one_or_none()
        if job is None:
            raise JobNotFoundError(f"There is no job {job_id!r}.")
        return job


def _with_metadata(tenant: str, metadata: Mapping[str, str], statuses: Sequence[Status]) -> Select[str]:
    """Select the ids of a tenant's jobs that have all these pairs: those with the first pair, filtered by the rest."""
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
