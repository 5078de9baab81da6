"""Processes of a run: each has its own session and a bounded log, and ends with the harness."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from testing.forking import ForkedPython
from tpo.cli.stack.supervisor import die_with

_MAX_LOG_BYTES = 4_000_000
_CLAIMED = re.compile(r"(job_[0-9a-f]{32}) claimed, attempt (\d+)")
_ENDED = re.compile(r"(job_[0-9a-f]{32}) \S.* after [\d.]+ s$", re.MULTILINE)
_ALARM = re.compile(r"^\S+ \S+ (?:ERROR|CRITICAL) (.*)", re.MULTILINE)
_VARIABLE = re.compile(r"job_[0-9a-f]{32}|tpo-\w+-\d+@\S+|\d+(?:\.\d+)?")


@dataclass
class Child:
    """Process that is restarted whenever it ends."""

    name: str
    kind: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    user: str | None = None
    spared: bool = False
    popen: "subprocess.Popen[bytes] | None" = None
    terminated: str | None = None
    """Kind of fault that ended it; None if no fault did."""
    asked_at: float = 0.0
    starts_at: float = 0.0
    stopped: bool = False
    starts: int = 0
    log_offset: int = 0
    alarms: "Counter[str]" = field(default_factory=Counter)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    @property
    def pid(self) -> int:
        return self.popen.pid if self.popen else 0

    def start(self, **more: str) -> None:
        """Start the process. The kernel ends it together with the harness."""
        if self.log.exists() and self.log.stat().st_size > _MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.log_offset = log.tell()
            options: dict[str, Any] = {
                "env": {**self.environment, **more},
                "cwd": "/",
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": subprocess.STDOUT,
                "start_new_session": True,
            }
            if self.command[0] == sys.executable:
                self.popen = ForkedPython(self.command[1:], dies_with_parent=True, **options)
            else:
                parent = os.getpid()
                self.popen = subprocess.Popen(
                    self.command, user=self.user, preexec_fn=lambda: die_with(parent), **options
                )
        self.terminated = None
        self.stopped = False
        self.starts += 1

    def output(self) -> str:
        """Return the log since the last start."""
        with self.log.open("rb") as log:
            log.seek(self.log_offset)
            return log.read().decode(errors="replace")

    def held_jobs(self) -> dict[str, int]:
        """Return the jobs that the worker has logged as claimed and not as left, each with its attempt."""
        log = self.output()
        held: dict[str, tuple[int, int]] = {m[1]: (m.start(), int(m[2])) for m in _CLAIMED.finditer(log)}
        for end in _ENDED.finditer(log):
            if end[1] in held and held[end[1]][0] < end.start():
                del held[end[1]]
        return {job_id: attempt for job_id, (_, attempt) in held.items()}

    def family(self) -> list[psutil.Process]:
        """Return the process and its descendants."""
        try:
            mine = psutil.Process(self.pid)
            return [mine, *mine.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: signal.Signals, *, all_of_it: bool = False) -> None:
        """Send a signal to the process or, with `all_of_it`, to its descendants and then to it."""
        for process in reversed(self.family()) if all_of_it else self.family()[:1]:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        self.stopped = number == signal.SIGSTOP or (self.stopped and number != signal.SIGCONT)

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the end, and return whether it came."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            time.sleep(0.02)
        return not self.running

    def remember_alarms(self) -> None:
        """Count the errors of the log, with ids and numbers removed."""
        self.alarms.update(_VARIABLE.sub("…", found)[:200] for found in _ALARM.findall(self.output()))

    def log_tail(self, lines: int = 25) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.output().splitlines()[-lines:])


def python(name: str, kind: str, points: Path, environment: Mapping[str, str], folder: Path, *, spared: bool) -> Child:
    """Create a process of the product, with labelled points unless it is to be spared."""
    plain = {"worker": "worker", "maintenance": "worker.maintenance", "api": "api"}[kind]
    module = [plain] if spared else ["tests.chaos.process", kind, str(points)]
    return Child(name, kind, [sys.executable, "-m", *module], environment, folder, spared=spared)
