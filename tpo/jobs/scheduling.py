"""Fair scheduling: the rule that picks the next waiting job. Pure: it has no clock and no database of its own.

1. Priority first. A point of priority is worth `priority_seconds` of waiting: the effective priority of a tenant's
   jobs rises by a point for each such time without a claim, up to the highest waiting one. So nothing starves.
2. Then the tenant with the fewest running jobs, then the one whose last claim is the oldest. A tenant with 10,000 jobs
   gets as many claims as one with 10.
3. Within a tenant, the priority that has waited longest for a claim; then the oldest job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from tpo.settings import Settings


@dataclass(frozen=True)
class Rules:
    """Rules that an operator sets."""

    priority_seconds: float = 60.0
    """Seconds of waiting that outweigh one point of priority."""
    max_running: int | None = None
    """Maximum number of running jobs of a tenant that has no limit of its own. None is no limit."""
    suspect_patience: float = 30.0
    """Seconds that the suspects of a crash wait for an empty worker before a busy one empties itself for them."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the rules from the settings."""
        return cls(settings.priority_seconds, settings.max_jobs_running, suspect_patience=settings.lease_seconds)


@dataclass(frozen=True)
class QueueHead:
    """The waiting jobs of one tenant at one priority in one queue, represented by the oldest."""

    job_id: str
    tenant: str
    priority: int
    queued_at: float
    """When the oldest was queued, in Unix seconds."""
    last_claimed_at: float | None = None
    """When a job of this tenant and priority was last claimed in this queue, in Unix seconds."""
    tenant_last_claimed_at: float = 0.0
    """When a job of this tenant, of any priority, was last claimed in this queue, in Unix seconds."""
    max_running: int | None = None
    """The tenant's own limit on running jobs."""

    @property
    def waiting_since(self) -> float:
        """The start of its wait for a claim, in Unix seconds."""
        return max(self.queued_at, self.last_claimed_at or 0.0)


def pick_next(heads: Sequence[QueueHead], running: Mapping[str, int], now: float, rules: Rules) -> QueueHead | None:
    """Pick the next head; `running` counts each tenant's running jobs in this queue."""
    if not heads:
        return None
    highest = max(head.priority for head in heads)

    def is_high(head: QueueHead) -> bool:
        return head.priority + (now - head.waiting_since) // rules.priority_seconds >= highest

    def key(head: QueueHead) -> tuple[int, float, float, str]:
        return running.get(head.tenant, 0), head.tenant_last_claimed_at, head.waiting_since, head.job_id

    # A head of the highest priority is eligible whatever the clock says, so there is always an eligible one.
    return min((head for head in heads if head.priority == highest or is_high(head)), key=key)


def with_capacity(heads: Sequence[QueueHead], running: Mapping[str, int], rules: Rules) -> list[QueueHead]:
    """Return the heads of tenants that may have one more running job; `running` counts over all queues."""

    def has_capacity(head: QueueHead) -> bool:
        limit = limit_of(head, rules)
        return limit is None or running.get(head.tenant, 0) < limit

    return [head for head in heads if has_capacity(head)]


def limit_of(head: QueueHead, rules: Rules) -> int | None:
    """Return the limit on running jobs of a head's tenant. None is no limit."""
    return rules.max_running if head.max_running is None else head.max_running
