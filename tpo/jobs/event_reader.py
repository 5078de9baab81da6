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
    """Each job's events in the order of their numbers."""
    gone: frozenset[str]
    """Jobs that no longer exist."""


class EventQueries(Queries):
    """The part of the store that event streams share. It reads for every tenant."""

    def new_events(self, seen: Mapping[str, int]) -> NewEvents:
        """Return the events of these jobs after the numbers that were seen."""
        found: list[EventRow] = []
        there: set[str] = set()
        with reading(self._engine) as session:
            jobs = list(seen)
            for ids in (jobs[i : i + _BATCH] for i in range(0, len(jobs), _BATCH)):
                rows = session.execute(select(Job.id, Job.last_event).where(Job.id.in_(ids)))
                last = {row.id: row.last_event for row in rows}
                there |= last.keys()
                ahead = [and_(EventRow.job_id == i, EventRow.number > seen[i]) for i, n in last.items() if n > seen[i]]
                if ahead:
                    query = select(EventRow).where(or_(*ahead)).order_by(EventRow.job_id, EventRow.number)
                    found += session.scalars(query)
        return NewEvents(tuple(found), frozenset(seen.keys() - there))
