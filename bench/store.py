"""Cost of the store's operations with 1,000 jobs and with 1,000,000, as ratios within one run.

Both databases are of the same kind and on the same disk. Each operation is timed alternately in both, so that a busy
moment of the machine affects both. A million jobs with ten million candidates take about 11 GB of disk in the temporary
folder, which is freed at the end.

    python -m bench.store [--jobs 1000000] [--database sqlite|postgresql] [--rounds 100]
"""

import argparse
import contextlib
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine, text

from testing.fakes import FakeReward, make_step
from testing.jobs import claim_one
from testing.seeding import CANDIDATES, SERVES, SeededDatabase, new_job, policy, seed_database
from testing.services import new_database, postgres_server
from tpo.core.loop import pending
from tpo.core.state import State
from tpo.db import connect, schema
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome
from tpo.store import Store
from tpo.tenants.idempotency import IdempotencyRequest
from tpo.tenants.tenants import Limits

SMALL = 1000
MAX_RATIO = 1.2
MAX_STEP_MS = {"sqlite": 5.0, "postgresql": 10.0}
"""Target for the product's own time per model call. Heartbeats are extra: every 10 s, one renewal of all leases."""
HELD = 64
"""Jobs that workers hold during the measurement: a fleet does not grow with the store."""
LOST = 5
PURGED = 5
READ_REPEATS = 5
"""Repetitions of each read in a row: one takes less time than other events on the machine."""
KEY_SECONDS = 24 * 3600.0


@dataclass
class Subject:
    """A seeded database, the jobs held in it, and the measured seconds of each operation."""

    engine: Engine
    seeded: SeededDatabase
    bytes: int
    held: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store(self.engine)
        for _ in range(HELD):
            self.held.append(self.claim(self.submit())[0].job_id)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record how long the block takes."""
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def submit(self) -> str:
        """Submit a job with an idempotency key, as a client does, and return its id."""
        idempotency = IdempotencyRequest(fingerprint="hash", key=secrets.token_hex(16), keep_seconds=KEY_SECONDS)
        metadata = {"run": self.seeded.run}
        state = new_job()
        return self.store.jobs.submit(
            state, idempotency=idempotency, max_attempts=3, metadata=metadata, **SERVES
        ).job.id

    def claim(self, job_id: str, seconds: float = 3600) -> tuple[Lease, State]:
        """Claim a job for a worker."""
        claimed = claim_one(self.store, job_id, "worker-1", seconds, **SERVES)
        if claimed is None:
            raise SystemExit(f"{job_id} could not be claimed")
        return claimed


def whole_job(subject: Subject) -> None:
    """Run one job from its submission to its end, and time each operation."""
    with subject.timed("submit"):
        job_id = subject.submit()
    with subject.timed("pick and claim the next job"):
        first = subject.store.leases.claim("worker-1", 3600, **SERVES)
    if first is None:
        raise SystemExit("no job could be claimed")
    subject.store.leases.release(first.lease)
    lease, state = subject.claim(job_id)
    while pending(state):
        step = make_step(state, policy(), FakeReward())
        with subject.timed("checkpoint"):
            subject.store.leases.checkpoint(lease, step)
        state = step.after
    with subject.timed("finish"):
        subject.store.leases.finish(lease, Outcome("completed", output="Draft"))


def limited_submit(subject: Subject) -> None:
    """Submit and cancel a job of a tenant with limits; it has few live jobs, while other tenants have many."""
    tenant = subject.store.for_tenant("limited")
    with subject.timed("submit, with limits"):
        job = tenant.jobs.submit(new_job(), limits=Limits(100, 1_000_000), max_attempts=3, **SERVES).job
    with subject.timed("cancel"):
        tenant.jobs.cancel(job.id)


def reads(subject: Subject) -> None:
    """Time the reads of clients, event streams and workers."""
    store, middle, run = subject.store, subject.seeded.middle, {"run": subject.seeded.run}
    pages: dict[str, Callable[[], object]] = {
        "get": lambda: store.jobs.get(middle),
        "state (candidates, iterations)": lambda: store.jobs.state(middle),
        "list: newest": lambda: store.jobs.page(limit=20),
        "list: from the middle": lambda: store.jobs.page(limit=20, after=middle),
        "list: from the middle, oldest first": lambda: store.jobs.page(limit=20, after=middle, order="asc"),
        "list: status=completed, from the middle": lambda: store.jobs.page(
            limit=20, after=middle, statuses=["completed"]
        ),
        "list: status=failed, from the middle": lambda: store.jobs.page(limit=4, after=middle, statuses=["failed"]),
        "list: status=queued,failed,expired": lambda: store.jobs.page(
            limit=20, statuses=["queued", "failed", "expired"]
        ),
        "list: status=cancelling (none)": lambda: store.jobs.page(limit=20, statuses=["cancelling"]),
        "list: metadata, from the middle": lambda: store.jobs.page(limit=20, after=middle, metadata=run),
        "list: metadata and status": lambda: store.jobs.page(limit=4, after=middle, metadata=run, statuses=["failed"]),
        "list: metadata (none)": lambda: store.jobs.page(limit=20, metadata={"run": "nothing"}),
        "events of a job": lambda: store.jobs.events(middle),
        f"new events of {HELD} jobs": lambda: store.events.new_events(dict.fromkeys(subject.held, 1)),
        "worker: check its jobs": lambda: store.leases.check("worker-1", subject.held),
    }
    for name, read in pages.items():
        for _ in range(READ_REPEATS):
            with subject.timed(name):
                read()


def heartbeat(subject: Subject) -> None:
    """Time the renewal of all leases of a worker."""
    with subject.timed(f"worker: renew {HELD} leases"):
        subject.store.leases.renew("worker-1", subject.held, 3600)


def sweep(subject: Subject) -> None:
    """Time a sweep with the same number of lost leases in both databases, and one with none."""
    lost = [subject.claim(subject.submit(), seconds=-1)[0].job_id for _ in range(LOST)]
    with subject.timed(f"sweep: {LOST} lost"):
        subject.store.maintenance.sweep(renotify_seconds=KEY_SECONDS, worker_retention_seconds=60)
    with subject.timed("sweep: nothing to do"):
        subject.store.maintenance.sweep(renotify_seconds=KEY_SECONDS, worker_retention_seconds=60)
    for job_id in lost:
        if subject.store.jobs.cancel(job_id).attempt != 1:
            raise SystemExit(f"{job_id} was not rescued by the sweep")


def purge(subject: Subject) -> None:
    """Time the purge of the oldest jobs and idempotency keys."""
    with subject.timed(f"purge: {PURGED} jobs"):
        subject.store.maintenance.purge(1.0, batch=PURGED)
    with subject.timed(f"purge: {PURGED} keys"):
        subject.store.idempotency_keys.purge(1.0, batch=PURGED)


OPERATIONS: tuple[tuple[Callable[[Subject], None], int], ...] = (
    (whole_job, 1),
    (limited_submit, 1),
    (reads, 1),
    (heartbeat, 1),
    (sweep, 2),
    (purge, 5),
)
"""Each operation with its period in rounds."""


def measure(small: Subject, large: Subject, rounds: int) -> None:
    """Time every operation alternately in both databases."""
    for number in range(rounds):
        for operation, period in OPERATIONS:
            if number % period == 0:
                for subject in (small, large) if number // period % 2 else (large, small):
                    operation(subject)


def table(small: Subject, large: Subject) -> str:
    """Format the medians and their ratios as Markdown."""
    lines = [
        f"| operation | {small.seeded.jobs:,} jobs | {large.seeded.jobs:,} jobs | ratio |",
        "|---|---:|---:|---:|",
    ]
    slower = []
    step_ms = 1000 * statistics.median(large.seconds["checkpoint"])
    max_step_ms = MAX_STEP_MS[large.engine.dialect.name]
    for name, seconds in small.seconds.items():
        a, b = statistics.median(seconds), statistics.median(large.seconds[name])
        lines.append(f"| {name} | {1000 * a:.2f} ms | {1000 * b:.2f} ms | {b / a:.2f} |")
        if b / a > MAX_RATIO:
            slower.append(name)
    size = large.bytes / large.seeded.jobs
    lines += [
        "",
        f"On disk: {large.bytes / 1e9:.2f} GB, {size / 1000:.1f} kB per job with {CANDIDATES} candidates.",
        f"Ratio over {MAX_RATIO}: {', '.join(slower) or 'none'}.",
        f"Time of one checkpoint, events included: {step_ms:.1f} ms (target: at most {max_step_ms:.0f} ms).",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def databases(kind: str) -> Iterator[tuple[str, str]]:
    """Create two databases of one kind and remove them at the end. Yields their URLs."""
    with contextlib.ExitStack() as stack:
        if kind == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tpo-bench-"))
            yield f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db"
        else:
            url = stack.enter_context(postgres_server(durable=True)).admin_url
            yield stack.enter_context(new_database(url)), stack.enter_context(new_database(url))


@contextlib.contextmanager
def subject(url: str, jobs: int) -> Iterator[Subject]:
    """Fill the database at `url` with `jobs` jobs."""
    schema.upgrade(url)
    engine = connect(url)
    began = time.monotonic()
    seeded = seed_database(engine, jobs)
    size = _size(engine)
    print(f"{jobs:,} jobs: {size / 1e9:.2f} GB in {time.monotonic() - began:.0f} s", flush=True)
    yield Subject(engine, seeded, size)
    engine.dispose()


def _size(engine: Engine) -> int:
    if engine.dialect.name == "sqlite":
        return Path(engine.url.database or "").stat().st_size
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())


def main() -> None:
    """Fill two databases, measure and print."""
    parser = argparse.ArgumentParser(description="Compare the store's operations with 1,000 jobs and with many.")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="jobs in the large database")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    with (
        databases(arguments.database) as (small_url, large_url),
        subject(small_url, SMALL) as small,
        subject(large_url, arguments.jobs) as large,
    ):
        measure(small, large, 5)  # warm up connections, caches and compiled statements
        small.seconds.clear()
        large.seconds.clear()
        measure(small, large, arguments.rounds)
        print(f"\n{arguments.database}, medians of {arguments.rounds} rounds\n\n{table(small, large)}")


if __name__ == "__main__":
    main()
