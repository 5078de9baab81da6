"""Fair scheduling: the rule that picks the next of the waiting jobs. Pure: no clock and no database of its own.

1. Priority first. A point of priority is worth `priority_seconds` of waiting: a tenant's effective
   priority rises by a point for each such time without a claim, up to the highest one that waits. So nothing starves.
2. Then the tenant with the fewest running jobs, then the one whose last claim is the oldest. A tenant with 10,000 jobs
   gets as many claims as one with 10.
3. Within a tenant, the priority that has waited longest for a claim; then the oldest job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Rules that an operator sets."""

    priority_seconds: float = 60.0
    """How long a wait outweighs one point of priority, in seconds."""
    max_running: int | None = None
    """How many jobs of a tenant may run at once, if it has no limit of its own; None is no limit."""


@dataclass(frozen=True)
class QueueHead:
    """The waiting jobs of one tenant at one priority in one queue, represented by the oldest."""

    job_id: str
    tenant: str
    priority: int
    since: float
    """Unix seconds: when the oldest was queued."""
    served: float | None = None
    """Unix seconds: when a job of this tenant and priority was last claimed here."""
    tenant_served: float = 0.0
    """Unix seconds: when a job of this tenant, of any priority, was last claimed here."""
    max_running: int | None = None
    """The tenant's own limit of jobs that run at once."""

    @property
    def waits_from(self) -> float:
        """The start of its wait for a claim, in Unix seconds."""
        return max(self.since, self.served or 0.0)


def pick_next(heads: Sequence[QueueHead], running: Mapping[str, int], now: float, rules: Rules) -> QueueHead | None:
    """Pick the next head; `running` counts each tenant's running jobs in this queue."""
    if not heads:
        return None
    highest = max(head.priority for head in heads)

    def is_high(head: QueueHead) -> bool:
        return head.priority + (now - head.waits_from) // rules.priority_seconds >= highest

    def key(head: QueueHead) -> tuple[int, float, float, str]:
        return running.get(head.tenant, 0), head.tenant_served, head.waits_from, head.job_id

    # The head of the highest priority is eligible whatever the clock says, so that there is always one.
    return min((head for head in heads if head.priority == highest or is_high(head)), key=key)


def with_capacity(heads: Sequence[QueueHead], running: Mapping[str, int], rules: Rules) -> list[QueueHead]:
    """Return the heads of tenants that may have one more running job; `running` counts over all queues."""

    def room(head: QueueHead) -> bool:
        most = limit_of(head, rules)
        return most is None or running.get(head.tenant, 0) < most

    return [head for head in heads if room(head)]


def limit_of(head: QueueHead, rules: Rules) -> int | None:
    """Return how many jobs of this tenant may run at once; None is no limit."""
    return rules.max_running if head.max_running is None else head.max_running
