"""Whose turn it is: the rule by which waiting jobs are put into an order. No clock and no database of its own.

1. Priority first. A point of priority is worth `priority_seconds` of waiting: what a tenant waits for at one priority
   rises by a point for each such time without a turn, up to the highest priority that waits. So nothing starves.
2. Of those that are then equally high: the tenant with the fewest running jobs, then the one whose last turn is longest
   ago. A tenant with 10,000 jobs gets as many turns as one with 10.
3. Within a tenant: what has waited longest for a turn; then the oldest job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What an operator sets."""

    priority_seconds: float = 60.0
    """How long a wait outweighs one point of priority."""
    max_running: int | None = None
    """Jobs of one tenant that run at once, where it has no limit of its own; None is no limit."""


@dataclass(frozen=True)
class QueueHead:
    """The jobs of one tenant that wait at one priority in one queue, by the oldest of them."""

    job_id: str
    tenant: str
    priority: int
    since: float
    """Unix seconds: when the oldest came into line."""
    served: float | None = None
    """Unix seconds: when a job of this tenant and priority last had its turn here."""
    tenant_served: float = 0.0
    """Unix seconds: when a job of this tenant, of any priority, last had its turn here."""
    max_running: int | None = None
    """The tenant's own limit of jobs that run at once."""

    @property
    def waits_from(self) -> float:
        """From when on its wait for a turn counts."""
        return max(self.since, self.served or 0.0)


def pick_next(heads: Sequence[QueueHead], running: Mapping[str, int], now: float, rules: Rules) -> QueueHead | None:
    """Whose turn it is; `running` tells how many jobs each tenant has running in this queue."""
    if not heads:
        return None
    highest = max(head.priority for head in heads)

    def is_high(head: QueueHead) -> bool:
        return head.priority + (now - head.waits_from) // rules.priority_seconds >= highest

    def key(head: QueueHead) -> tuple[int, float, float, str]:
        return running.get(head.tenant, 0), head.tenant_served, head.waits_from, head.job_id

    # The head of the highest priority is there whatever the clock says, so that there is always one.
    return min((head for head in heads if head.priority == highest or is_high(head)), key=key)


def with_capacity(heads: Sequence[QueueHead], running: Mapping[str, int], rules: Rules) -> list[QueueHead]:
    """The heads of tenants that may have one more running job; `running` is over all queues."""

    def room(head: QueueHead) -> bool:
        most = limit_of(head, rules)
        return most is None or running.get(head.tenant, 0) < most

    return [head for head in heads if room(head)]


def limit_of(head: QueueHead, rules: Rules) -> int | None:
    """How many jobs of this tenant may run at once; None is no limit."""
    return rules.max_running if head.max_running is None else head.max_running
