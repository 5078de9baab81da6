"""Claim the next job fairly."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Double,
    Executable,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    exists,
    func,
    inspect,
    literal_column,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, aliased

from tpo.core.state import State
from tpo.core.status import HELD
from tpo.db import insert_if_new, now, reading, writing
from tpo.jobs.leases import CheckpointQueries, Lease, claim_job, claimable, queue_is_paused
from tpo.jobs.quarantine import Source, claim_sources, must_yield
from tpo.jobs.scheduling import QueueHead, Rules, limit_of, pick_next, with_capacity
from tpo.jobs.tables import Job, LastClaim, Worker
from tpo.jobs.workers import is_live
from tpo.tenants.tables import Tenant
from tpo.tenants.tenants import ensure_tenant

QUEUED: ColumnElement[str] = literal_column("'queued'")
RUNNING: list[ColumnElement[str]] = [literal_column(f"'{status}'") for status in HELD]
"""Literals, not parameters: only then do the databases use the partial index."""

_MAX_SUSPECTS = 100
"""At most this many waiting suspects are looked at in one claim."""

_INDEXED = {"sqlite": "jobs INDEXED BY {}", "postgresql": "jobs"}
"""FROM clauses that force the index on SQLite: its planner rates all indexes that start with `status` equally good."""


@dataclass(frozen=True)
class Pair:
    """A policy and a reward model that a worker serves. Their jobs form one queue."""

    model: str
    reward_model: str


class Claimed(NamedTuple):
    """A claimed job."""

    lease: Lease
    state: State
    another: str | None
    """Another waiting job, of which a worker should be notified; None if there is none."""


class LeaseQueries(CheckpointQueries):
    """The part of the store that workers use: claim jobs, and write as the holder of their leases."""

    def must_yield(self, worker: str, *, model: str, reward_model: str, rules: Rules | None = None) -> bool:
        """Return whether this worker must hand its jobs back, so that it is empty for suspects of a crash."""
        with reading(self._engine) as session:
            pair, rules = Pair(model, reward_model), rules or Rules()
            suspects = _suspects(session, pair, rules, group=None)
            return bool(suspects) and _yields(session, pair, rules, worker, suspects[0])

    def claim(
        self, worker: str, lease_seconds: float, *, model: str, reward_model: str, rules: Rules | None = None
    ) -> Claimed | None:
        """Claim the next job that this worker can serve; None if no job may run."""
        with writing(self._engine) as session:
            return _claim(session, Pair(model, reward_model), rules or Rules(), worker, lease_seconds)


def _claim(session: Session, pair: Pair, rules: Rules, worker: str, lease_seconds: float) -> Claimed | None:
    """Claim the first job that can be claimed, from the queue or from the quarantine."""
    _lock_queue(session, pair)
    group, is_waiting = session.execute(_QUARANTINE, {**asdict(pair), "worker": worker}).one()
    if group is None and not is_waiting:
        return _claim_queued(session, pair, rules, worker, lease_seconds)
    suspects = _suspects(session, pair, rules, group)
    for source in _sources(session, pair, rules, worker, group, suspects):
        claimed = (
            _claim_queued(session, pair, rules, worker, lease_seconds)
            if source is Source.QUEUE
            else _claim_suspect(session, pair, rules, worker, lease_seconds, suspects)
        )
        if claimed:
            return claimed
    return None


def _sources(
    session: Session, pair: Pair, rules: Rules, worker: str, group: str | None, suspects: "list[_Suspect]"
) -> tuple[Source, ...]:
    """Return where a worker may claim from now, while there are suspects."""
    held = session.execute(_HELD, {"worker": worker}).scalar_one()
    head = None if held or group else _snapshot_queue(session, pair, rules).next()
    return claim_sources(
        held=held,
        group=group,
        suspects_since=suspects[0].head.queued_at if suspects else None,
        queue_since=head.waiting_since if head else None,
        yields=bool(suspects) and group is None and _yields(session, pair, rules, worker, suspects[0]),
    )


def _claim_suspect(
    session: Session, pair: Pair, rules: Rules, worker: str, lease_seconds: float, suspects: "list[_Suspect]"
) -> Claimed | None:
    """Claim the suspect that has waited longest. While the worker runs a group, only that group is given."""
    for suspect in suspects:
        head = suspect.head
        which = and_(Job.id == head.job_id, claimable())
        free = session.scalars(select(Job.id).where(which).with_for_update(skip_locked=True)).one_or_none()
        if free is None or not _has_capacity(session, head, rules):
            continue
        if claimed := claim_job(session, Job.id == head.job_id, worker, lease_seconds):
            _record_claim(session, pair, head)
            same = [s.head.job_id for s in suspects if s.group == suspect.group and s is not suspect]
            return Claimed(*claimed, same[0] if same else next_waiting_job(session, pair, rules))
    return None


def _claim_queued(session: Session, pair: Pair, rules: Rules, worker: str, lease_seconds: float) -> Claimed | None:
    """Claim the first job of the queue that can be claimed."""
    queue = _snapshot_queue(session, pair, rules)
    while head := queue.next():
        if not _has_capacity(session, head, rules):
            queue.exclude(head.tenant)
            continue
        if job_id := session.scalars(_OLDEST_FREE, _which(pair, head)).one_or_none():
            if claimed := claim_job(session, Job.id == job_id, worker, lease_seconds):
                _record_claim(session, pair, head)
                others = [other.job_id for other in queue.heads if other != head]
                more = others[0] if others else session.scalars(_OLDEST, _which(pair, head)).one_or_none()
                return Claimed(*claimed, more)
            queue = _snapshot_queue(session, pair, rules)  # its record was unreadable: it left the queue
            continue
        queue.exclude(head.tenant, head.priority)
    return None


def waiting_pairs(session: Session) -> list[Pair]:
    """Return the pairs of models for which jobs wait, by skipping from one to the next in an index."""
    found: list[Pair] = []
    dialect = session.get_bind().dialect.name
    while row := session.execute(_next_pair(dialect, found[-1] if found else None)).one_or_none():
        found.append(Pair(row.model, row.reward_model))
    pairs = [Pair(row.model, row.reward_model) for row in session.execute(_SUSPECT_PAIRS)]
    return found + [pair for pair in pairs if pair not in found]


def next_waiting_job(session: Session, pair: Pair, rules: Rules, waiting_seconds: float | None = None) -> str | None:
    """Return the next job, or None. With `waiting_seconds`, return it only if some job has waited for that long."""
    queue = _snapshot_queue(session, pair, rules)
    suspects = _suspects(session, pair, rules, group=None)
    waited = [queue.now - h.queued_at for h in queue.heads] + [suspect.waited for suspect in suspects]
    if waiting_seconds is not None and not any(seconds >= waiting_seconds for seconds in waited):
        return None
    while head := queue.next():
        if job_id := session.scalars(_OLDEST, _which(pair, head)).one_or_none():
            return job_id
        queue.exclude(head.tenant, head.priority)
    return suspects[0].head.job_id if suspects else None


class _Suspect(NamedTuple):
    """A waiting suspect of a crash."""

    head: QueueHead
    group: str
    waited: float
    """Seconds."""


def _suspects(session: Session, pair: Pair, rules: Rules, group: str | None) -> list[_Suspect]:
    """Return the waiting suspects of a queue, or of one group, the longest wait first.

    Suspects of tenants that may not run one more job are left out.
    """
    query = _SUSPECTS if group is None else _SUSPECTS.where(Job.quarantine == group)
    rows = session.execute(query, asdict(pair)).all()
    if not rows:
        return []
    running: dict[str, int] = {}
    for _, _, tenant, count in session.execute(_running(session.get_bind().dialect.name)):
        running[tenant] = running.get(tenant, 0) + count
    suspects = [
        _Suspect(
            QueueHead(row.id, row.tenant, row.priority, row.queued_at, max_running=row.max_jobs_running),
            group=row.quarantine,
            waited=row.now - row.queued_at,
        )
        for row in rows
    ]
    allowed = set(with_capacity([suspect.head for suspect in suspects], running, rules))
    return [suspect for suspect in suspects if suspect.head in allowed]


def _yields(session: Session, pair: Pair, rules: Rules, worker: str, first: _Suspect) -> bool:
    """Return whether this worker empties itself for the suspect that has waited longest."""
    return must_yield(
        worker=worker,
        live=session.scalars(_LIVE_WORKERS, {**asdict(pair), "seconds": 2 * rules.suspect_patience}).all(),
        waited=first.waited,
        patience=rules.suspect_patience,
        quarantine_runs=session.execute(_QUARANTINE_RUNS, asdict(pair)).scalar_one(),
    )


class _WaitingQueue:
    """Snapshot of the waiting tenants, taken at the start of a claim."""

    def __init__(self, heads: list[QueueHead], running: Mapping[str, int], now: float, rules: Rules) -> None:
        self.heads = heads
        self.now = now
        self._running = running
        self._rules = rules

    def next(self) -> QueueHead | None:
        """Pick the next head by the scheduling rules; None if none is left."""
        return pick_next(self.heads, self._running, self.now, self._rules)

    def exclude(self, tenant: str, priority: int | None = None) -> None:
        """Exclude a tenant, or only its jobs of one priority."""
        self.heads = [h for h in self.heads if h.tenant != tenant or priority not in (None, h.priority)]


def _snapshot_queue(session: Session, pair: Pair, rules: Rules) -> _WaitingQueue:
    """Take a snapshot of the queue of a pair: its heads that may run, and the running jobs of each tenant."""
    rows = session.execute(_HEADS, asdict(pair)).all()
    if not rows:
        return _WaitingQueue([], {}, 0.0, rules)
    if len(rows) == 1 and rules.max_running is None and rows[0].max_jobs_running is None:
        (row,) = rows  # a single head without a limit: there is nothing to compare
        return _WaitingQueue([QueueHead(row.id, row.tenant, row.priority, row.queued_at)], {}, row.now, rules)
    last_claims = {(row.tenant, row.priority): row.claimed_at for row in session.execute(_LAST_CLAIMS, asdict(pair))}
    tenant_last_claims: dict[str, float] = {}
    for (tenant, _), claimed_at in last_claims.items():
        tenant_last_claims[tenant] = max(tenant_last_claims.get(tenant, 0.0), claimed_at)
    heads = [
        QueueHead(
            *(row.id, row.tenant, row.priority, row.queued_at),
            last_claimed_at=last_claims.get((row.tenant, row.priority)),
            tenant_last_claimed_at=tenant_last_claims.get(row.tenant, 0.0),
            max_running=row.max_jobs_running,
        )
        for row in rows
    ]
    running_here: dict[str, int] = {}
    running_everywhere: dict[str, int] = {}
    for model, reward_model, tenant, count in session.execute(_running(session.get_bind().dialect.name)):
        running_everywhere[tenant] = running_everywhere.get(tenant, 0) + count
        if Pair(model, reward_model) == pair:
            running_here[tenant] = count
    return _WaitingQueue(with_capacity(heads, running_everywhere, rules), running_here, rows[0].now, rules)


def is_waiting(job: type[Job]) -> ColumnElement[bool]:
    """Match jobs that are in the queue: queued, not delayed until a later attempt, and not in quarantine."""
    return and_(job.status == QUEUED, job.next_attempt_at.is_(None), job.quarantine.is_(None))


def _serves(job: type[Job]) -> ColumnElement[bool]:
    return and_(job.model == bindparam("model"), job.reward_model == bindparam("reward_model"))


def _of_pair(job: type[Job]) -> ColumnElement[bool]:
    return and_(is_waiting(job), _serves(job))


def _heads() -> Select[*tuple[Any, ...]]:
    first, last, next_priority, next_tenant, job = (aliased(Job) for _ in range(5))

    def one(found: type[Job], *which: ColumnElement[bool]) -> ColumnElement[str]:
        query = select(found.id).where(_of_pair(found), *which).order_by(found.tenant, found.priority, found.id)
        return query.limit(1).correlate(last).scalar_subquery()

    heads = select(one(first, ~queue_is_paused(bindparam("model"))).label("id")).cte("heads", recursive=True)
    # In two steps: when two columns are compared with those of a row, SQLite searches by the first only.
    following = func.coalesce(
        one(next_priority, next_priority.tenant == last.tenant, next_priority.priority > last.priority),
        one(next_tenant, next_tenant.tenant > last.tenant),
    )
    heads = heads.union_all(select(following).select_from(heads.join(last, last.id == heads.c.id)))
    return (
        select(
            *(job.id, job.tenant, job.priority, job.queued_at),
            *(Tenant.max_jobs_running, now().label("now")),
        )
        .select_from(heads.join(job, job.id == heads.c.id))
        .outerjoin(Tenant, Tenant.id == job.tenant)
    )


def _oldest() -> Select[str]:
    group = (Job.tenant, Job.priority)
    here = (bindparam("tenant", type_=String), bindparam("priority", type_=Integer))
    # A range instead of an equality: otherwise PostgreSQL sees that only the ids determine the order, and uses their
    # index, which contains the jobs of all other queues as well.
    after = and_(
        tuple_(*group, Job.id) >= tuple_(*here, bindparam("job_id", type_=String)), tuple_(*group) <= tuple_(*here)
    )
    return select(Job.id).where(_of_pair(Job), after, claimable()).order_by(*group, Job.id).limit(1)


# Built once: building them costs more than running them.
_HEADS = _heads()
"""The oldest waiting job of each tenant and priority, in arbitrary order; none while the queue is paused."""
_OLDEST = _oldest()
"""The oldest job of a tenant and priority that can be claimed."""
_OLDEST_FREE = _OLDEST.with_for_update(skip_locked=True)
_IN_QUARANTINE = and_(_serves(Job), Job.quarantine.is_not(None))
_RUNS_IN_QUARANTINE = and_(_IN_QUARANTINE, Job.status.in_(RUNNING))
_WAITS_IN_QUARANTINE = and_(_IN_QUARANTINE, Job.status == QUEUED, Job.next_attempt_at.is_(None))
_QUARANTINE = select(
    select(Job.quarantine)
    .where(_RUNS_IN_QUARANTINE, Job.lease_owner == bindparam("worker"))
    .limit(1)
    .scalar_subquery()
    .label("group"),
    exists(select(Job.id).where(_WAITS_IN_QUARANTINE)).label("is_waiting"),
)
"""The quarantine group that a worker runs, and whether suspects wait."""
_QUARANTINE_RUNS = select(exists(select(Job.id).where(_RUNS_IN_QUARANTINE)))
_SUSPECTS = (
    select(
        *(Job.id, Job.tenant, Job.priority, Job.queued_at, Job.quarantine),
        # Not a join: PostgreSQL would read all tenants.
        select(Tenant.max_jobs_running).where(Tenant.id == Job.tenant).scalar_subquery().label("max_jobs_running"),
        now().label("now"),
    )
    .where(_WAITS_IN_QUARANTINE, claimable(), ~queue_is_paused(bindparam("model")))
    .order_by(Job.queued_at, Job.id)
    .limit(_MAX_SUSPECTS)
)
_SUSPECT_PAIRS = (
    select(Job.model, Job.reward_model)
    .where(Job.quarantine.is_not(None), Job.status == QUEUED, Job.next_attempt_at.is_(None))
    .distinct()
)
_HELD = select(func.count()).where(Job.status.in_(RUNNING), Job.lease_owner == bindparam("worker"))
_LIVE_WORKERS = select(Worker.id).where(
    Worker.model == bindparam("model"),
    Worker.reward_model == bindparam("reward_model"),
    is_live(bindparam("seconds", type_=Double)),
)
_LAST_CLAIMS = select(LastClaim.tenant, LastClaim.priority, LastClaim.claimed_at).where(
    LastClaim.model == bindparam("model"), LastClaim.reward_model == bindparam("reward_model")
)


def _which(pair: Pair, head: QueueHead) -> dict[str, str | int]:
    return {**asdict(pair), "tenant": head.tenant, "priority": head.priority, "job_id": head.job_id}


def _next_pair(dialect: str, pair: Pair | None) -> Executable:
    # In two steps, each an index search: in a row comparison, SQLite searches by the first column only.
    jump = (
        f"SELECT * FROM (SELECT model, reward_model FROM {_INDEXED[dialect].format('jobs_in_line')}"  # noqa: S608
        " WHERE status = 'queued' AND next_attempt_at IS NULL AND quarantine IS NULL AND {}"
        " ORDER BY model, reward_model LIMIT 1) AS {}"
    )
    same = jump.format("model = :model AND reward_model > :reward_model", "same")
    later = jump.format("model > :model", "later")
    query = text(f"{same} UNION ALL {later} ORDER BY model, reward_model LIMIT 1")
    return query.bindparams(**asdict(pair or Pair("", "")))


def _running(dialect: str) -> Executable:
    return text(
        f"SELECT model, reward_model, tenant, count(*) FROM {_INDEXED[dialect].format('jobs_running')}"  # noqa: S608
        " WHERE status IN ('in_progress', 'cancelling') GROUP BY model, reward_model, tenant"
    )


def _has_capacity(session: Session, head: QueueHead, rules: Rules) -> bool:
    """Return whether a tenant may run one more job. A tenant with a limit is locked against other claims."""
    limit = limit_of(head, rules)
    if limit is None:
        return True
    ensure_tenant(session, head.tenant)
    mine = select(Tenant.id).where(Tenant.id == head.tenant).with_for_update(skip_locked=True)
    if session.scalars(mine).one_or_none() is None:
        return False
    running = select(func.count()).select_from(Job).where(Job.tenant == head.tenant, Job.status.in_(HELD))
    return session.execute(running).scalar_one() < limit


def _record_claim(session: Session, pair: Pair, head: QueueHead) -> None:
    """Record the time of the last claim of a tenant and priority."""
    key = {**asdict(pair), "tenant": head.tenant, "priority": head.priority}
    parameters = {f"of_{name}": value for name, value in key.items()}
    # Skip a row that another claim has locked: that claim records the same time.
    if not session.execute(_UPDATE_CLAIM, parameters).first() and not session.execute(_FIND_CLAIM, parameters).first():
        session.execute(insert_if_new(session, LastClaim).values(**key, claimed_at=now()))


_THIS_CLAIM = and_(*(c == bindparam(f"of_{c.key}", type_=c.type) for c in inspect(LastClaim).primary_key))
_FIND_CLAIM = select(LastClaim.tenant).where(_THIS_CLAIM)
_UPDATE_CLAIM = (
    update(LastClaim)
    .where(_THIS_CLAIM, exists(_FIND_CLAIM.with_for_update(skip_locked=True)))
    .values(claimed_at=now())
    .returning(LastClaim.tenant)
    .execution_options(synchronize_session=False)
)


def _lock_queue(session: Session, pair: Pair) -> None:
    """Serialise the claims of one queue. On SQLite the transaction already holds the only write lock."""
    if session.get_bind().dialect.name != "postgresql":
        return
    digest = hashlib.blake2b(f"{pair.model}\0{pair.reward_model}".encode(), digest_size=8).digest()
    key = {"key": int.from_bytes(digest, signed=True)}
    if session.execute(_TRY_LOCK, key).scalar_one():
        return
    try:
        with session.begin_nested():
            session.execute(_LOCK, {**key, "timeout": f"{_LOCK_TIMEOUT_MILLISECONDS}ms"})
    except OperationalError as error:
        # A worker that hangs in its claim must not block the others: after the timeout they continue without the lock.
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise


_LOCK_NOT_AVAILABLE = "55P03"
_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:key)")
_LOCK = text("SELECT set_config('lock_timeout', :timeout, true), pg_advisory_xact_lock(:key)")
_LOCK_TIMEOUT_MILLISECONDS = 500
