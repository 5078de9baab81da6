"""Real worker processes for tests: started with an environment, watched through the database, stopped or killed."""

import contextlib
import os
import re
import secrets
import signal
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from sqlalchemy import Engine

from testing.forking import ForkedPython
from testing.ports import free_port
from testing.services import Valkey
from testing.waiting import HANG_SECONDS, eventually
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.broker import JobNotifier
from tpo.core import prompts
from tpo.core.errors import BrokerUnavailableError
from tpo.core.run import run
from tpo.core.state import Message, Params, State
from tpo.db import connect
from tpo.jobs.insertion import JobOptions
from tpo.jobs.tables import Job
from tpo.settings import SCRIPTED
from tpo.store import Store


class Process:
    """One process of ours and its log."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, folder: Path) -> None:
        self.command = command
        self.log = log
        with log.open("w") as file:
            self.popen = ForkedPython(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until the log holds a text."""
        eventually(lambda: text in self.output or self.popen.poll() is not None, why=text)
        assert text in self.output, f"the process ended with {self.popen.returncode} before it said {text!r}"

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(timeout=HANG_SECONDS)

    def pause(self) -> None:
        """Stop it where it stands, and wait until it does."""
        self.popen.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED, why="it stands still")

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; gives the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(timeout=HANG_SECONDS)


class System:
    """A database, a broker and whichever processes a test starts on them."""

    def __init__(self, database_url: str, folder: Path, broker: Valkey) -> None:
        self.folder = folder
        self.broker = broker
        self.calls_log = folder / "calls.log"
        self.environment = {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "TPO_DATABASE_URL": database_url,
            "TPO_BROKER_URL": broker.url,
            "TPO_POLICY": SCRIPTED,
            "TPO_REWARD_MODEL": SCRIPTED,
            "TPO_SCRIPTED_LOG": str(self.calls_log),
            "TPO_SCRIPTED_LATENCY": "0.3",
            "TPO_CONCURRENCY": "4",
            # A busy machine may be silent for seconds: those who want a lease to run out say so.
            "TPO_LEASE_SECONDS": "60",
            "TPO_SWEEP_SECONDS": "0.3",
            "TPO_RENOTIFY_SECONDS": "1",
            "TPO_DRAIN_SECONDS": "10",
        }
        self.engine: Engine = connect(database_url)
        self.store = Store(self.engine)
        self.processes: list[Process] = []

    def start(self, *command: str, **settings: object) -> Process:
        """Start Python with a command; settings are spelled as in the Settings class."""
        own = {f"TPO_{name.upper()}": str(value) for name, value in settings.items()}
        environment = {**os.environ, **self.environment, **own}
        log = self.folder / f"{len(self.processes)}.log"
        process = Process(command, environment, log, self.folder)
        self.processes.append(process)
        return process

    def worker(self, **settings: object) -> Process:
        """Start a worker and wait until it is ready."""
        process = self.start("-m", "worker", **settings)
        process.wait_for("is ready")
        return process

    def maintenance(self, **settings: object) -> Process:
        """Start beat and the sweeper, and wait until they are ready."""
        process = self.start("-m", "worker.maintenance", **settings)
        process.wait_for("is ready")
        return process

    def pause(self, process: Process) -> None:
        """Stop a process where it stands, but not within a write: SQLite would let nobody else write meanwhile."""
        process.pause()
        while self._locked():
            process.go_on()
            process.pause()

    def _locked(self) -> bool:
        if self.engine.dialect.name != "sqlite":
            return False
        with contextlib.closing(sqlite3.connect(str(self.engine.url.database), timeout=2)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
        return False

    def process_of(self, pid: int) -> Process:
        return next(p for p in self.processes if p.pid == pid)

    def submit(
        self,
        query: str = "Why is the sky blue?",
        *,
        ring: bool = True,
        max_attempts: int = 3,
        priority: int = 0,
        **params: object,
    ) -> str:
        """Commit a job and ring for it, as the API does."""
        state = State(
            input=(Message(role="user", content=query),),
            params=Params.model_validate({"sample_size": 3, "max_iterations": 1, **params}),
            prompts=prompts.load(self.environment.get("TPO_PROMPT_SET", "conversation")),
        )
        model, reward_model = self.environment["TPO_POLICY"], self.environment["TPO_REWARD_MODEL"]
        options = JobOptions(model=model, reward_model=reward_model, max_attempts=max_attempts, priority=priority)
        job = self.store.jobs.submit(state, **options).job
        if ring:
            self.notify_job(job.id)
        return job.id

    def notify_job(self, job_id: str) -> None:
        """Ring for a job; a broker that is down is no error."""
        notifier = JobNotifier(self.broker.url)
        with contextlib.suppress(BrokerUnavailableError):
            notifier.notify_job(job_id, self.environment["TPO_POLICY"])
        notifier.close()

    def wait_for_end(self, job_id: str) -> Job:
        """The job when it is in a terminal state."""

        def ended() -> Job | None:
            job = self.store.jobs.get(job_id)
            return job if job.completed_at is not None else None

        return eventually(ended, why=f"the end of {job_id}")

    def wait_for_status(self, job_id: str, status: str) -> None:
        eventually(lambda: self.store.jobs.get(job_id).status == status, why=f"{job_id} is {status}")

    def calls(self) -> list["StartedCall"]:
        """The model calls that any process has started, in their order."""
        if not self.calls_log.exists():
            return []
        return [StartedCall(*line.split()) for line in self.calls_log.read_text().splitlines()]

    def close(self) -> None:
        """End all processes and print what they said; pytest shows it when the test failed."""
        for process in self.processes:
            if process.popen.poll() is None:
                process.go_on()
                process.kill()
        for process in self.processes:
            print(f"--- {' '.join(process.command)} rc={process.popen.returncode}\n{process.output}")
        self.engine.dispose()


class StartedCall:
    """A line of the scripted back end's log."""

    def __init__(self, kind: str, iteration: str, digest: str, pid: str) -> None:
        self.phase = (kind, int(iteration))
        self.digest = digest
        self.pid = int(pid)


def uninterrupted(state: State) -> State:
    """What a run from the start gives that nothing disturbs; times are left out."""
    fresh = state.model_copy(update={"candidates": (), "iterations": (), "calls": ()})
    return timeless(run(fresh, ScriptedPolicy(), ScriptedRewardModel(), lambda _state: None, lambda: None))


def timeless(state: State) -> State:
    """The state without the wall time of its calls, the one thing that two equal runs differ in."""
    return state.model_copy(update={"calls": tuple(c.model_copy(update={"seconds": 0.0}) for c in state.calls)})


@contextlib.contextmanager
def running_system(database_url: str, folder: Path) -> Iterator[System]:
    """A system on an existing database with a broker of its own."""
    broker = Valkey(folder / "broker", free_port())
    broker.start()
    system = System(database_url, folder, broker)
    try:
        yield system
    finally:
        system.close()
        broker.stop(kill=True)


def worker_pid(job: Job) -> int:
    """The process that holds a job's lease."""
    found = re.fullmatch(r"tpo-worker-(\d+)@.*", job.lease_owner or "")
    assert found, f"{job.id} is held by {job.lease_owner}"
    return int(found.group(1))


def marker() -> str:
    """A word that is nowhere else."""
    return f"marker{secrets.token_hex(8)}"
