"""The registry of live workers and what they serve."""

from collections.abc import Sequence

from sqlalchemy import delete, insert, select, update

from tpo.db import Queries, now, reading, writing
from tpo.jobs.tables import Worker


class WorkerQueries(Queries):
    """The part of the store that knows the workers. They serve every tenant."""

    def register(self, worker: str, *, model: str, reward_model: str, concurrency: int) -> None:
        """Tell that a worker is ready and what it serves; said again, that it is still there."""
        values = {"model": model, "reward_model": reward_model, "concurrency": concurrency, "seen_at": now()}
        with writing(self._engine) as session:
            known = session.execute(update(Worker).where(Worker.id == worker).values(values).returning(Worker.id))
            if known.first() is None:
                session.execute(insert(Worker).values(id=worker, started_at=now(), **values))

    def deregister(self, worker: str) -> None:
        """Tell that a worker takes no more jobs."""
        with writing(self._engine) as session:
            session.execute(delete(Worker).where(Worker.id == worker))

    def live(self, silent_seconds: float) -> Sequence[Worker]:
        """The workers that were heard of within that time."""
        with reading(self._engine) as session:
            return session.scalars(select(Worker).where(Worker.seen_at > now() - silent_seconds)).all()
