"""Breakdown of a job's time: model calls, waiting for a worker, and the product's queue, database and events.

Starts all processes as a user does (`tpo up`), submits jobs over HTTP, and reads the rows that they leave.

    python -m bench.breakdown [--database-url postgresql+psycopg://...]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tpo.cli.stack.temporary import temporary_stack
from tpo.core.state import Call
from tpo.db import connect
from tpo.store import Store

PROMPT = "Hello, I am Maria. The kettle that I bought is broken. I would like a refund."
JOB = {"input": PROMPT, "parameters": {"sample_size": 5, "max_iterations": 2}}
SINGLES = 8
AT_ONCE = 20


@dataclass(frozen=True)
class Timing:
    """Times of one finished job, in seconds."""

    wall: float
    waited: float
    calls: tuple[Call, ...]

    @property
    def in_models(self) -> float:
        """Time inside the back ends: the policy and the reward model, including the wait for a place in their batch."""
        return sum(call.seconds for call in self.calls)

    @property
    def overhead(self) -> float:
        """The rest of the time from submit to end, without the wait for a worker: checkpoints, events, threads."""
        return self.wall - self.waited - self.in_models

    def of(self, kind: str) -> float:
        """Return the time inside the back ends for one kind of call."""
        return sum(call.seconds for call in self.calls if call.kind == kind)


def submit_and_wait(client: httpx.Client, count: int) -> tuple[list[str], float]:
    """Submit jobs at once and wait until all have ended. Returns their ids and the seconds for all of them."""
    begin = time.monotonic()
    ids = [client.post("/v1/jobs", json=_with_seed(seed)).raise_for_status().json()["id"] for seed in range(count)]
    waiting = set(ids)
    while waiting:
        time.sleep(0.05)
        for job_id in list(waiting):
            status = client.get(f"/v1/jobs/{job_id}").raise_for_status().json()["status"]
            if status in ("failed", "cancelled", "expired", "incomplete"):
                raise SystemExit(f"{job_id} ended as {status}, not as completed")
            if status == "completed":
                waiting.discard(job_id)
    return ids, time.monotonic() - begin


def _with_seed(seed: int) -> dict[str, Any]:
    return {**JOB, "parameters": {**JOB["parameters"], "seed": seed}}  # type: ignore[dict-item]


def timing(store: Store, job_id: str) -> Timing:
    """Read one job's times from its rows. The job must have ended."""
    job = store.jobs.get(job_id)
    if job.started_at is None or job.completed_at is None:
        raise SystemExit(f"{job_id} has not ended")
    return Timing(job.completed_at - job.created_at, job.started_at - job.created_at, store.jobs.state(job_id).calls)


def table(singles: Sequence[Timing], concurrent: Sequence[Timing], single_wall: float, concurrent_wall: float) -> str:
    """Format the breakdown as Markdown."""
    lines = ["| part of a job | one at a time | | 20 at once | |", "|---|---:|---:|---:|---:|"]

    def row(name: str, one: Sequence[float], many: Sequence[float]) -> None:
        a, b = statistics.mean(one), statistics.mean(many)
        share_a = a / statistics.mean(t.wall for t in singles)
        share_b = b / statistics.mean(t.wall for t in concurrent)
        lines.append(f"| {name} | {a:.3f} s | {share_a:.1%} | {b:.3f} s | {share_b:.1%} |")

    for kind in ("sample", "critique", "gradient", "update", "score"):
        row(f"model: {kind}", [t.of(kind) for t in singles], [t.of(kind) for t in concurrent])
    row("waiting for a worker", [t.waited for t in singles], [t.waited for t in concurrent])
    row("queue, database, events", [t.overhead for t in singles], [t.overhead for t in concurrent])
    row("all, submit to end", [t.wall for t in singles], [t.wall for t in concurrent])
    ratio = concurrent_wall / single_wall
    lines += ["", f"{AT_ONCE} jobs at once took {concurrent_wall:.2f} s, one {single_wall:.2f} s: {ratio:.1f} times."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Break down a job's time, with the demo models.")
    parser.add_argument("--database-url", help="default: a new SQLite file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tpo-bench-") as folder:
        database_url = arguments.database_url or f"sqlite:///{folder}/tpo.db"
        with (
            temporary_stack(Path(folder), {"TPO_DATABASE_URL": database_url, "TPO_CONCURRENCY": str(AT_ONCE)}) as stack,
            httpx.Client(base_url=stack.facts["api"], timeout=30) as client,
        ):
            submit_and_wait(client, 1)  # the first job warms the models up
            singles = [submit_and_wait(client, 1) for _ in range(SINGLES)]
            concurrent, concurrent_wall = submit_and_wait(client, AT_ONCE)
            store = Store(connect(database_url))
            one = [timing(store, ids[0]) for ids, _ in singles]
            many = [timing(store, job_id) for job_id in concurrent]
            print(table(one, many, statistics.mean(seconds for _, seconds in singles), concurrent_wall))


if __name__ == "__main__":
    main()
