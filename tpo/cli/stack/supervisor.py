"""Supervisor of child processes: starts them, restarts them with back-off, and drains them in order.

No child outlives the supervisor.
"""

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tpo.signals import stop_signals

MAX_RESTARTS = 5
"""Maximum number of consecutive restarts of a child. One more failure stops everything.

A child that ran for longer than HEALTHY_SECONDS is counted from zero again.
"""

MAX_RESTARTS_DURING_STARTUP = 1
"""The limit until all services are ready. A child that fails during startup usually has a wrong setting."""

HEALTHY_SECONDS = 60.0
_BACK_OFF = (0.5, 15.0)
_MAX_LOG_BYTES = 10_000_000
_ROTATE_SECONDS = 10.0
_POLL_SECONDS = 0.2


class Stopped(Exception):
    """The supervisor was stopped by Ctrl-C, SIGTERM or a closed terminal."""


class ChildLost(Exception):
    """A child process cannot be kept running."""


@dataclass(frozen=True)
class Service:
    """The command of one child. The highest stage is drained first, and children of one stage together."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    stage: int
    drain_seconds: float = 10.0


@dataclass
class _Child:
    service: Service
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    due_at: float = 0.0
    failures: int = 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with each event (`started`, `ended`, `stopping` or `stopped`) and its facts, such as the service's name."""


@dataclass
class Supervisor:
    """A context manager whose children are restarted while it waits, and drained when it exits.

    Signals wake it through a socket, so it sleeps until something happens. Use it in the main thread: the kernel kills
    the children when the thread that started them ends.
    """

    logs: Path
    on_event: OnEvent
    _children: list[_Child] = field(default_factory=list)
    _stop_signals: int = 0
    _max_restarts: int = MAX_RESTARTS_DURING_STARTUP

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._wake_writer, self._wake_reader = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._wake_reader.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._old_handlers: dict[int, Any] = {s: signal.signal(s, self._on_stop) for s in stop_signals()}
        self._old_handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _on_child)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._drain()
        finally:
            for child in self._children:
                if child.running:
                    self._kill(child)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_wakeup)
            self._selector.close()
            self._wake_writer.close()
            self._wake_reader.close()

    @property
    def forced(self) -> bool:
        """True if a second stop signal ended the drain, so that children were killed."""
        return self._stop_signals > 1

    def start(self, service: Service) -> None:
        """Start a child and supervise it from now on."""
        child = _Child(service, self.logs / f"{service.name}.log")
        rotate(child.log)
        self._children.append(child)
        self._spawn(child)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Supervise the children until the condition holds. Raises Stopped, and ChildLost after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise ChildLost(f"{what} did not come up within {seconds:g} s; read the logs in {self.logs}")
            self._supervise(_POLL_SECONDS)

    def watch(self) -> None:
        """Supervise the children until a stop signal arrives. Raises Stopped and ChildLost."""
        self._max_restarts = MAX_RESTARTS
        while True:
            self._supervise(_ROTATE_SECONDS)
            for child in self._children:
                rotate(child.log)

    def _supervise(self, seconds: float | None) -> None:
        """Sleep until a signal arrives, a restart is due or the time is over; then restart children."""
        due = [max(0.0, c.due_at - time.monotonic()) for c in self._children if c.process is None]
        self._sleep(min([*due, *([] if seconds is None else [seconds])], default=None))
        if self._stop_signals:
            raise Stopped
        for child in self._children:
            if child.process is None and time.monotonic() >= child.due_at:
                self._spawn(child)
            elif child.process is not None and not child.running:
                self._on_end(child, child.process.returncode)

    def _sleep(self, seconds: float | None) -> None:
        """Sleep until a signal arrives or the time is over."""
        if self._selector.select(seconds):
            while True:
                try:
                    self._wake_reader.recv(512)
                except BlockingIOError:
                    return

    def _spawn(self, child: _Child) -> None:
        parent = os.getpid()
        with child.log.open("ab") as log:
            child.process = subprocess.Popen(  # noqa: S603 - our own commands
                child.service.command,
                env=child.service.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: Ctrl-C in a terminal reaches only the parent, which drains in the right order.
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        child.started_at = time.monotonic()
        self.on_event("started", {"service": child.service.name, "pid": child.process.pid})

    def _on_end(self, child: _Child, code: int) -> None:
        child.process = None
        if time.monotonic() - child.started_at > HEALTHY_SECONDS:
            child.failures = 0
        child.failures += 1
        if child.failures > self._max_restarts:
            raise ChildLost(
                f"{child.service.name} ended {child.failures} times in a row, last with {_describe(code)}: "
                f"{_last_line(child.log)}\nIts log: {child.log}"
            )
        first, longest = _BACK_OFF
        delay = min(first * 2 ** (child.failures - 1), longest)
        child.due_at = time.monotonic() + delay
        self.on_event(
            "ended",
            {"service": child.service.name, "how": _describe(code), "restart": child.failures, "restart_in": delay},
        )

    def _drain(self) -> None:
        """Send SIGTERM to one stage after the other. After a further stop signal, the rest is killed."""
        before = self._stop_signals
        for stage in sorted({c.service.stage for c in self._children}, reverse=True):
            children = [c for c in self._children if c.service.stage == stage and c.running]
            for child in children:
                self.on_event("stopping", {"service": child.service.name})
                if child.process is not None:
                    child.process.terminate()
            deadline = time.monotonic() + max((c.service.drain_seconds for c in children), default=0.0)
            while any(c.running for c in children) and time.monotonic() < deadline and self._stop_signals == before:
                self._sleep(deadline - time.monotonic())
            for child in children:
                self._kill(child)
            if self._stop_signals != before:
                return

    def _kill(self, child: _Child) -> None:
        """Kill a child if it still runs, and report its end."""
        if child.process is None:
            return
        if child.running:
            child.process.kill()
        child.process.wait()
        self.on_event("stopped", {"service": child.service.name, "how": _describe(child.process.returncode)})

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_signals += 1


def rotate(log: Path) -> None:
    """Move the end of a log that is too long to `.log.1`, and empty it. Its child appends to it, and need not know."""
    if not log.exists() or (size := log.stat().st_size) <= _MAX_LOG_BYTES:
        return
    with log.open("rb+") as full:
        full.seek(size - _MAX_LOG_BYTES)
        log.with_suffix(".log.1").write_bytes(full.read(_MAX_LOG_BYTES))
        full.truncate(0)


def _on_child(number: int, frame: FrameType | None) -> None:
    """Do nothing. Only a signal with a handler wakes the parent."""


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


if sys.platform == "linux":
    _PR_SET_PDEATHSIG = 1
    _prctl = ctypes.CDLL(None).prctl

    def die_with(parent: int) -> None:
        """Let the kernel kill this process together with its parent. Call it in the child before its program starts."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

else:

    def die_with(parent: int) -> None:
        """Do nothing: other kernels have no such signal, so a parent that gets SIGKILL leaves its children behind."""
