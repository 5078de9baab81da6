"""Quarantine: the rules that find the job which kills its worker. Pure: they have no clock and no database.

A worker process that dies takes all its jobs with it, and any of them may be the cause. So none of them loses an
attempt; they become suspects instead:

1. The suspects are split into groups (`split_suspects`). A group runs in a worker that runs nothing else.
2. A suspect is cleared when it records a step. It leaves the worker at once, so that a group only shrinks.
3. If the worker of a group dies as well, the jobs that it held then are split again, down to single jobs.
4. Only a job that was alone in its worker loses an attempt. It waits behind the other suspects.

So a poison job is found after two shared crashes for groups of up to 16, and then ends after its own attempts.
"""

from collections.abc import Collection, Sequence
from enum import Enum
from math import isqrt
from typing import NamedTuple

_ONE_BY_ONE = 4
"""At most this many suspects run one by one: a further crash costs more than their calls."""


class LostJob(NamedTuple):
    """A job whose worker process died."""

    job_id: str
    tenant: str


class Source(Enum):
    """A place that a claim takes its job from."""

    QUEUE = "queue"
    QUARANTINE = "quarantine"


def split_suspects(lost: Collection[LostJob]) -> list[list[str]]:
    """Split the jobs of a dead worker into groups that run apart; jobs of a tenant stay together where possible.

    Groups are about as many as their members: fewer groups need more crashes, and more groups need more calls in a row.
    """
    job_ids = [job.job_id for job in sorted(lost, key=lambda job: (job.tenant, job.job_id))]
    size = 1 if len(job_ids) <= _ONE_BY_ONE else isqrt(len(job_ids))
    return [job_ids[start : start + size] for start in range(0, len(job_ids), size)]


def claim_sources(
    *, held: int, group: str | None, suspects_since: float | None, queue_since: float | None, yields: bool
) -> tuple[Source, ...]:
    """Return where a worker may claim from, in the order to try. Suspects never share a worker with other jobs.

    `held` counts the worker's jobs, and `group` is the quarantine group that it runs. `suspects_since` and
    `queue_since` are the times since when the first suspect and the next job of the queue wait; None if there is none.
    A worker that `yields` empties itself for suspects that have waited for long.
    """
    if group is not None:
        return (Source.QUARANTINE,)
    if suspects_since is None:
        return (Source.QUEUE,)
    if held:
        return () if yields else (Source.QUEUE,)
    if yields or queue_since is None or suspects_since <= queue_since:
        return (Source.QUARANTINE, Source.QUEUE)
    return (Source.QUEUE, Source.QUARANTINE)


def must_yield(*, worker: str, live: Sequence[str], waited: float, patience: float, quarantine_runs: bool) -> bool:
    """Return whether a worker must empty itself for suspects that have waited for `waited` seconds.

    One worker of a queue does so at a time, the first by name, and none while another one already runs suspects: most
    of the capacity stays with the other jobs.
    """
    return waited >= patience and not quarantine_runs and bool(live) and worker == min(live)
