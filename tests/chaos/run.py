"""A run: start all processes, submit jobs, cause faults, wait for the jobs, stop, and verify every row."""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import select

from testing.ports import free_port
from testing.processes import StartedCall
from testing.waiting import HANG_SECONDS
from tests.chaos.children import Child, python
from tests.chaos.databases import Database, database
from tests.chaos.load import Load
from tests.chaos.monkey import Monkey
from tests.chaos.verdict import Seen, Verdict, judge
from tpo.cli.stack.valkey import valkey_command
from tpo.core.errors import StoreUnavailableError
from tpo.core.status import TERMINAL
from tpo.db import connect, reading
from tpo.jobs.tables import Job

_SAMPLE_SECONDS = 5.0
_POLL_SECONDS = 0.5
_IDS_PER_QUERY = 500


@dataclass(frozen=True)
class Plan:
    """Parameters of a run."""

    database: str
    seed: int
    seconds: float
    jobs_per_second: float = 1.5
    most_open: int = 100
    mean_gap: float = 5.0
    """Mean seconds from one fault to the next."""
    lease: float = 4.0
    workers: int = 3
    """Number of workers, in addition to one that is spared and whose memory is sampled."""
    settle_seconds: float = 180.0
    each_fault_once: bool = False
    """For a short run: give each fault and each labelled point the same frequency."""


@dataclass
class Sample:
    """Resources of a process that lives as long as the run, at one moment."""

    at: float
    rss: int
    handles: int
    threads: int


@dataclass
class Result:
    """Everything that a run has recorded."""

    plan: Plan
    seconds: float
    load: Load
    monkey: Monkey
    verdict: Verdict
    samples: dict[str, list[Sample]]
    settled_in: float
    ends: dict[str, int | None] = field(default_factory=dict)
    alarms: dict[str, int] = field(default_factory=dict)


class Watcher(threading.Thread):
    """Polls the jobs during the run, and records each job as it was when first seen in a terminal state."""

    def __init__(self, url: str, load: Load) -> None:
        super().__init__(daemon=True)
        self.engine = connect(url)
        self.ended: dict[str, Seen] = {}
        self._load = load
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            with contextlib.suppress(StoreUnavailableError):
                self.check()

    def open_jobs(self) -> list[str]:
        return [job_id for job_id in self._load.accepted() if job_id not in self.ended]

    def check(self) -> None:
        """Query the jobs that had not ended. Raises StoreUnavailableError."""
        open_jobs = self.open_jobs()
        for first in range(0, len(open_jobs), _IDS_PER_QUERY):
            ids = open_jobs[first : first + _IDS_PER_QUERY]
            query = select(Job.id, Job.status, Job.last_event, Job.output)
            with reading(self.engine) as session:
                rows = session.execute(query.where(Job.id.in_(ids), Job.status.in_(TERMINAL))).all()
            self.ended.update({row.id: (row.status, row.last_event, row.output) for row in rows})

    def paused(self) -> list[str]:
        """Return the ids of paused jobs. Raises StoreUnavailableError."""
        with reading(self.engine) as session:
            return list(session.scalars(select(Job.id).where(Job.status == "paused")))

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=HANG_SECONDS)


def run(plan: Plan, stop_requested: threading.Event, log: Callable[[str], None]) -> Result:
    """Run the plan, or its first part if a stop is requested. All started processes have ended on return."""
    folder = Path(tempfile.mkdtemp(prefix="tpo-chaos-run-"))
    try:
        with database(plan.database, folder) as store:
            return _run(plan, folder, store, stop_requested, log)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    plan: Plan, folder: Path, store: Database, stop_requested: threading.Event, log: Callable[[str], None]
) -> Result:
    ports = [free_port() for _ in range(3)]
    points = folder / "points"
    points.mkdir()
    children = _children(plan, folder, points, store, ports)
    load = Load([f"http://127.0.0.1:{port}" for port in ports[1:]], plan.seed, plan.jobs_per_second, plan.most_open)
    monkey = Monkey(
        children,
        store,
        ports[0],
        points,
        random.Random(plan.seed),
        mean_gap=plan.mean_gap,
        lease=plan.lease,
        each_fault_once=plan.each_fault_once,
    )
    watcher = Watcher(store.url, load)
    load.open_jobs = lambda: len(watcher.open_jobs())
    samples: dict[str, list[Sample]] = {child.name: [] for child in children if child.spared}
    try:
        _start_all(children)
        load.start()
        watcher.start()
        began = time.monotonic()
        _disturb(plan, children, monkey, watcher, samples, stop_requested, log)
        lasted = time.monotonic() - began
        log("no more faults: waiting for the remaining jobs")
        settled_in = _settle(plan, load, monkey, watcher, stop_requested)
        _start_all(children)  # a process that is still starting has no signal handler yet
        ends = _end_all(children)
        watcher.stop()
        with contextlib.suppress(StoreUnavailableError):
            watcher.check()
        log("verifying every row")
        calls = [StartedCall(*line.split()) for line in (folder / "calls.log").read_text().splitlines()]
        verdict = judge(watcher.engine, load.accepted(), watcher.ended, calls)
        result = Result(plan, lasted, load, monkey, verdict, samples, settled_in, ends)
        for child in children:
            for alarm, count in child.alarms.items():
                result.alarms[f"{child.kind}: {alarm}"] = result.alarms.get(f"{child.kind}: {alarm}", 0) + count
        return result
    finally:
        store.resume()
        for child in children:
            if child.kind != "database" and child.running:
                child.signal(signal.SIGKILL, all_of_it=True)
                child.wait(10)
        watcher.engine.dispose()


def _disturb(
    plan: Plan,
    children: list[Child],
    monkey: Monkey,
    watcher: Watcher,
    samples: dict[str, list[Sample]],
    stop_requested: threading.Event,
    log: Callable[[str], None],
) -> None:
    end = time.monotonic() + plan.seconds
    sample_at, log_at = 0.0, time.monotonic() + 60
    while time.monotonic() < end and not stop_requested.wait(0.05):
        monkey.tick(more=True)
        if time.monotonic() >= sample_at:
            sample_at = time.monotonic() + max(_SAMPLE_SECONDS, plan.seconds / 500)
            for child in children:
                if child.spared and child.running:
                    samples[child.name].append(_sample(child))
        if time.monotonic() >= log_at:
            log_at = time.monotonic() + 60
            log(
                f"{len(watcher.ended)} jobs have ended, {len(watcher.open_jobs())} are open, "
                f"{len(monkey.faults)} faults; {max(0.0, end - time.monotonic()):.0f} s to go"
            )


def _settle(plan: Plan, load: Load, monkey: Monkey, watcher: Watcher, stop_requested: threading.Event) -> float:
    """Wait until every client is done and every job has ended, at most `settle_seconds`. Returns the seconds."""
    load.stop()
    monkey.end_faults()
    requested_before = stop_requested.is_set()
    began = time.monotonic()
    while time.monotonic() - began < plan.settle_seconds:
        monkey.tick(more=False)
        with contextlib.suppress(StoreUnavailableError):
            if load.idle():
                for job_id in watcher.paused():
                    load.resume(job_id)
                if not watcher.open_jobs():
                    break
        if stop_requested.wait(0.1) and not requested_before:
            break
    return time.monotonic() - began


def _children(plan: Plan, folder: Path, points: Path, store: Database, ports: list[int]) -> list[Child]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TPO_")}
    environment = {
        **inherited,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TPO_DATABASE_URL": store.url,
        "TPO_BROKER_URL": f"redis://127.0.0.1:{ports[0]}/0",
        "TPO_POLICY": "scripted",
        "TPO_REWARD_MODEL": "scripted",
        "TPO_SCRIPTED_LOG": str(folder / "calls.log"),
        "TPO_SCRIPTED_LATENCY": "0.15",
        "TPO_CONCURRENCY": "8",
        "TPO_LEASE_SECONDS": str(plan.lease),
        "TPO_SWEEP_SECONDS": "1",
        "TPO_RENOTIFY_SECONDS": "3",
        # Crashes count as attempts, and here there are many. Another test covers the limit.
        "TPO_MAX_ATTEMPTS": "1000",
    }

    def ours(name: str, kind: str, *, spared: bool = False, **more: str) -> Child:
        return python(name, kind, points, {**environment, **more}, folder, spared=spared)

    (folder / "broker").mkdir()
    broker = Child("broker", "broker", valkey_command(ports[0], folder / "broker"), dict(os.environ), folder)
    apis = [ours(f"api-{n}", "api", spared=n == 0, TPO_PORT=str(port)) for n, port in enumerate(ports[1:])]
    workers = [ours(f"worker-{n}", "worker", spared=n == 0) for n in range(plan.workers + 1)]
    return [broker, *([store.child] if store.child else []), ours("maintenance", "maintenance"), *apis, *workers]


def _start_all(children: list[Child]) -> None:
    ready = {"api": "Listening on", "worker": "is ready", "maintenance": "is ready"}
    for child in children:
        if not child.running:
            child.start()
    for child in children:
        end = time.monotonic() + 60
        while child.kind in ready and ready[child.kind] not in child.output():
            if not child.running or time.monotonic() > end:
                raise RuntimeError(f"{child.name} did not start:\n{child.log_tail()}")
            time.sleep(0.05)


def _end_all(children: list[Child]) -> dict[str, int | None]:
    """Terminate the processes of the product. Returns their exit codes, None for one that did not end."""
    ours = [child for child in children if child.kind in ("api", "worker", "maintenance")]
    for child in ours:
        if child.running:
            child.signal(signal.SIGTERM)
    ends: dict[str, int | None] = {}
    for child in ours:
        if child.popen is not None:
            ends[child.name] = child.popen.returncode if child.wait(35) else None
            child.remember_alarms()
    return ends


def _sample(child: Child) -> Sample:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        return Sample(time.monotonic(), process.memory_info().rss, process.num_fds(), process.num_threads())
    return Sample(time.monotonic(), 0, 0, 0)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set. A second signal raises KeyboardInterrupt."""
    requested = threading.Event()
    times = 0

    def request_stop(_number: int, _frame: object) -> None:
        nonlocal times
        times += 1
        if times > 1:
            raise KeyboardInterrupt
        requested.set()

    old = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
