"""Queues as operators see them: list, pause and resume."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, exists, func, or_, select, update

from tpo.core.errors import InvalidInputError
from tpo.db import Queries, insert_if_new, now, reading, writing
from tpo.jobs.claims import QUEUED, RUNNING, Pair, is_waiting, next_waiting_job, waiting_pairs
from tpo.jobs.scheduling import Rules
from tpo.jobs.tables import Job, Queue, Worker
from tpo.jobs.workers import is_live


@dataclass(frozen=True)
class QueueInfo:
    """The queue of one policy, as operators see it."""

    model: str
    paused_at: float | None
    waiting: int
    running: int
    workers: int
    quarantined: int = 0
    """Jobs that are suspected of having killed their worker, among those that wait or run."""


class QueueQueries(Queries):
    """The part of the store that shows, pauses and resumes queues."""

    def next_waiting(self, model: str, reward_model: str, rules: Rules | None = None) -> str | None:
        """Return the next job; None if no job may run."""
        with reading(self._engine) as session:
            return next_waiting_job(session, Pair(model, reward_model), rules or Rules())

    def pause(self, model: str) -> None:
        """Pause a queue: running jobs are handed back after their current step. Raises InvalidInputError."""
        self._set_paused(model, paused=True)

    def resume(self, model: str) -> Sequence[str]:
        """Resume a queue. Returns the jobs to notify workers of, one per reward model. Raises InvalidInputError."""
        self._set_paused(model, paused=False)
        with reading(self._engine) as session:
            found = [next_waiting_job(session, pair, Rules()) for pair in waiting_pairs(session) if pair.model == model]
            return [job_id for job_id in found if job_id]

    def page(self, silent_seconds: float) -> Sequence[QueueInfo]:
        """Return the queues by policy: those with live workers, with queued or running jobs, and paused ones."""
        job_counts = select(
            Job.model,
            func.count().filter(Job.status == QUEUED).label("waiting"),
            func.count().filter(Job.status.in_(RUNNING)).label("running"),
            func.count().filter(Job.quarantine.is_not(None)).label("quarantined"),
        ).where(or_(Job.status == QUEUED, Job.status.in_(RUNNING)))
        with reading(self._engine) as session:
            paused = {row.model: row.paused_at for row in session.scalars(select(Queue))}
            live = select(Worker.model, func.count().label("workers")).where(is_live(silent_seconds))
            workers = {row.model: row.workers for row in session.execute(live.group_by(Worker.model))}
            jobs = {row.model: row for row in session.execute(job_counts.group_by(Job.model))}
        return [
            QueueInfo(
                model,
                paused.get(model),
                waiting=jobs[model].waiting if model in jobs else 0,
                running=jobs[model].running if model in jobs else 0,
                workers=workers.get(model, 0),
                quarantined=jobs[model].quarantined if model in jobs else 0,
            )
            for model in sorted({*paused, *workers, *jobs})
        ]

    def stalled(self, waiting_seconds: float, silent_seconds: float, rules: Rules) -> Sequence[str]:
        """Return the policies whose jobs have waited that long although live workers of them have free slots."""
        with reading(self._engine) as session:
            found = []
            for pair in waiting_pairs(session):
                serves = and_(Worker.model == pair.model, Worker.reward_model == pair.reward_model)
                live = select(Worker).where(serves, is_live(silent_seconds))
                slots = {worker.id: worker.concurrency for worker in session.scalars(live)}
                held = select(func.count()).where(Job.lease_owner.in_(slots), Job.status.in_(RUNNING))
                free = sum(slots.values()) > session.execute(held).scalar_one() if slots else False
                if free and next_waiting_job(session, pair, rules, waiting_seconds=waiting_seconds):
                    found.append(pair.model)
        return found

    def _set_paused(self, model: str, *, paused: bool) -> None:
        with writing(self._engine) as session:
            waits = or_(is_waiting(Job), Job.quarantine.is_not(None))
            has_jobs = exists().where(Job.model == model, or_(waits, Job.status.in_(RUNNING)))
            known = select(1).where(or_(has_jobs, *(exists().where(t.model == model) for t in (Queue, Worker))))
            if session.execute(known).first() is None:
                raise InvalidInputError(
                    f"There is no queue {model!r}: no worker serves that policy and no job asks for it."
                )
            session.execute(insert_if_new(session, Queue).values(model=model, paused_at=None))
            same = Queue.paused_at.is_(None) if paused else Queue.paused_at.is_not(None)
            session.execute(update(Queue).where(Queue.model == model, same).values(paused_at=now() if paused else None))
