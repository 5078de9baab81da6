"""One polling query per process for new events of every job that has a subscriber."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import and_, or_, select

from tpo.db import Queries, reading
from tpo.jobs.tables import EventRow, Job

_BATCH = 200


@dataclass(frozen=True)
class NewEvents:
    """Events since the last query."""

    events: tuple[EventRow, ...]
    """The events, ordered by job and number."""
    deleted_jobs: frozenset[str]
    """Jobs that no longer exist."""


class EventQueries(Queries):
    """The part of the store that event streams share. It reads for every tenant."""

    def new_events(self, seen: Mapping[str, int]) -> NewEvents:
        """Return the new events of these jobs. `seen` maps each job's id to the number of its last known event."""
        found: list[EventRow] = []
        existing: set[str] = set()
        with reading(self._engine) as session:
            jobs = list(seen)
            for ids in (jobs[i : i + _BATCH] for i in range(0, len(jobs), _BATCH)):
                rows = session.execute(select(Job.id, Job.last_event).where(Job.id.in_(ids)))
                last = {row.id: row.last_event for row in rows}
                existing |= last.keys()
                unseen = [and_(EventRow.job_id == i, EventRow.number > seen[i]) for i, n in last.items() if n > seen[i]]
                if unseen:
                    query = select(EventRow).where(or_(*unseen)).order_by(EventRow.job_id, EventRow.number)
                    found += session.scalars(query)
        return NewEvents(tuple(found), frozenset(seen.keys() - existing))
