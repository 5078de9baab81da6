"""The registry of live workers and what they serve."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, delete, insert, select, update

from tpo.db import Queries, now, reading, writing
from tpo.jobs.tables import Job, Worker
from tpo.jobs.transitions import update_job

_WAITS_AS_SUSPECT = (Job.quarantine.is_not(None), Job.status.in_(("queued", "paused")))


def is_live(silent_seconds: float | ColumnElement[float]) -> ColumnElement[bool]:
    """Match workers with a heartbeat within that time."""
    return Worker.seen_at > now() - silent_seconds


class WorkerQueries(Queries):
    """The part of the store that registers workers. They serve every tenant."""

    def register(self, worker: str, *, model: str, reward_model: str, concurrency: int) -> None:
        """Register a worker and the models that it serves. Calling it again is a heartbeat.

        A worker that lost its jobs and lives on was cut off or suspended: none of those jobs killed it.
        """
        values = {"model": model, "reward_model": reward_model, "concurrency": concurrency, "seen_at": now()}
        with writing(self._engine) as session:
            known = session.execute(update(Worker).where(Worker.id == worker).values(values).returning(Worker.id))
            if known.first() is None:
                session.execute(insert(Worker).values(id=worker, started_at=now(), **values))
            session.execute(update_job(and_(Job.lost_with == worker, *_WAITS_AS_SUSPECT), {"quarantine": None}))

    def deregister(self, worker: str) -> None:
        """Remove a worker from the registry: it claims no more jobs."""
        with writing(self._engine) as session:
            session.execute(delete(Worker).where(Worker.id == worker))

    def live(self, silent_seconds: float) -> Sequence[Worker]:
        """Return the workers that were seen within that time."""
        with reading(self._engine) as session:
            return session.scalars(select(Worker).where(is_live(silent_seconds))).all()
