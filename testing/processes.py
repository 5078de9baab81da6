"""Real worker processes for tests: start them with an environment, observe them in the database, stop or kill them."""

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
from tpo.jobs.view import JobView
from tpo.settings import SCRIPTED
from tpo.store import Store


class Process:
    """A process of the product and its log."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, folder: Path) -> None:
        self.command = command
        self.log = log
        with log.open("w") as file:
            self.popen = ForkedPython(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.popen.pid

    @property
    def output(self) -> str:
        """The log so far: stdout and stderr."""
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until the log contains a text. Fails if the process ends first."""
        eventually(lambda: text in self.output or self.popen.poll() is not None, why=text)
        assert text in self.output, f"the process ended with {self.popen.returncode} before it logged {text!r}"

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self.popen.kill()
        self.popen.wait(timeout=HANG_SECONDS)

    def pause(self) -> None:
        """Suspend the process, and wait until it is suspended."""
        self.popen.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED, why="the process is suspended")

    def proceed(self) -> None:
        """Resume a suspended process."""
        self.popen.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a stop signal, wait for the end and return the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(timeout=HANG_SECONDS)


class System:
    """A database, a broker and the processes that a test starts on them."""

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
            # A busy machine may suspend a worker for seconds: tests that need an expired lease set a shorter one.
            "TPO_LEASE_SECONDS": "60",
            "TPO_SWEEP_SECONDS": "0.3",
            "TPO_RENOTIFY_SECONDS": "1",
            "TPO_DRAIN_SECONDS": "10",
        }
        self.engine: Engine = connect(database_url, create=True)
        self.store = Store(self.engine)
        self.processes: list[Process] = []

    def start(self, *command: str, **settings: object) -> Process:
        """Start Python with a command. Settings have the names of the fields of the Settings class."""
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
        """Start the maintenance worker and beat, and wait until they are ready."""
        process = self.start("-m", "worker.maintenance", **settings)
        process.wait_for("is ready")
        return process

    def pause(self, process: Process) -> None:
        """Suspend a process, but not within a write: SQLite would block all other writers until it resumes."""
        process.pause()
        while self._locked():
            process.proceed()
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
        """Return the started process with this id."""
        return next(p for p in self.processes if p.pid == pid)

    def submit(
        self,
        query: str = "Why is the sky blue?",
        *,
        notify: bool = True,
        max_attempts: int = 3,
        priority: int = 0,
        **params: object,
    ) -> str:
        """Commit a job and, with `notify`, notify workers of it, as the API does. Returns its id."""
        state = State(
            input=(Message(role="user", content=query),),
            params=Params.model_validate({"sample_size": 3, "max_iterations": 1, **params}),
            prompts=prompts.load(self.environment.get("TPO_PROMPT_SET", "conversation")),
        )
        model, reward_model = self.environment["TPO_POLICY"], self.environment["TPO_REWARD_MODEL"]
        options = JobOptions(model=model, reward_model=reward_model, max_attempts=max_attempts, priority=priority)
        job = self.store.jobs.submit(state, **options).job
        if notify:
            self.notify_job(job.id)
        return job.id

    def notify_job(self, job_id: str) -> None:
        """Notify workers of a job. An unreachable broker is not an error."""
        notifier = JobNotifier(self.broker.url)
        with contextlib.suppress(BrokerUnavailableError):
            notifier.notify_job(job_id, self.environment["TPO_POLICY"])
        notifier.close()

    def wait_for_end(self, job_id: str) -> JobView:
        """Wait until the job is in a terminal state, and return it."""

        def ended() -> JobView | None:
            job = self.store.jobs.get(job_id)
            return job if job.completed_at is not None else None

        return eventually(ended, why=f"the end of {job_id}")

    def wait_for_status(self, job_id: str, status: str) -> None:
        """Wait until the job has this status."""
        eventually(lambda: self.store.jobs.get(job_id).status == status, why=f"{job_id} is {status}")

    def calls(self) -> list["StartedCall"]:
        """Return the model calls that all processes have started, in order."""
        if not self.calls_log.exists():
            return []
        return [StartedCall(*line.split()) for line in self.calls_log.read_text().splitlines()]

    def close(self) -> None:
        """End all processes and print their output; pytest shows it if the test failed."""
        for process in self.processes:
            if process.popen.poll() is None:
                process.proceed()
                process.kill()
        for process in self.processes:
            print(f"--- {' '.join(process.command)} rc={process.popen.returncode}\n{process.output}")
        self.engine.dispose()


class StartedCall:
    """A line of the scripted back end's log: a model call that has started."""

    def __init__(self, kind: str, iteration: str, digest: str, pid: str) -> None:
        self.phase = (kind, int(iteration))
        self.digest = digest
        self.pid = int(pid)


def uninterrupted(state: State) -> State:
    """Return the result of an undisturbed run from the start, without times."""
    fresh = state.model_copy(update={"candidates": (), "iterations": (), "calls": ()})
    return timeless(run(fresh, ScriptedPolicy(), ScriptedRewardModel(), lambda _state: None, lambda: None))


def timeless(state: State) -> State:
    """Return the state without the wall time of its calls, the only difference between two equal runs."""
    return state.model_copy(update={"calls": tuple(c.model_copy(update={"seconds": 0.0}) for c in state.calls)})


@contextlib.contextmanager
def running_system(database_url: str, folder: Path) -> Iterator[System]:
    """Run a system on an existing database with its own broker."""
    broker = Valkey(folder / "broker", free_port())
    broker.start()
    system = System(database_url, folder, broker)
    try:
        yield system
    finally:
        system.close()
        broker.stop(kill=True)


def worker_pid(job: JobView) -> int:
    """Return the id of the process that holds a job's lease."""
    match = re.fullmatch(r"tpo-worker-(\d+)-\w+@.*", job.lease_owner or "")
    assert match, f"{job.id} is held by {job.lease_owner}, not by a worker process"
    return int(match.group(1))


def marker() -> str:
    """Return a word that occurs nowhere else."""
    return f"marker{secrets.token_hex(8)}"
