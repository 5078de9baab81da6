"""Child processes under one parent: started, watched, restarted with back-off, drained in order. None outlives it."""

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
"""A child that ends more often than this, each time within HEALTHY_SECONDS, takes everything down."""

MAX_RESTARTS_AT_FIRST = 1
"""The same until all is up: what never ran, most often has a setting that is wrong."""

HEALTHY_SECONDS = 60.0
_BACK_OFF = (0.5, 15.0)
_MAX_LOG_BYTES = 10_000_000
_ASK_AGAIN_SECONDS = 0.2


class Stopped(Exception):
    """Somebody asked for the end: Ctrl-C, SIGTERM or a closed terminal."""


class ChildLost(Exception):
    """A child cannot be kept running."""


@dataclass(frozen=True)
class Service:
    """What one child runs. The highest stage is drained first; children of one stage together."""

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


Tell = Callable[[str, dict[str, Any]], None]
"""Told of what happens: `started`, `ended`, `stopping`, `stopped`, with the service's name and the like."""


@dataclass
class Supervisor:
    """A context: children started in it are restarted while it waits, and drained when it is left.

    Signals wake it through a socket, so that it sleeps until something happens. Use it in the main thread: the kernel
    ends the children when the thread that started them is gone.
    """

    logs: Path
    tell: Tell
    _children: list[_Child] = field(default_factory=list)
    _stop_signals: int = 0
    _max_restarts: int = MAX_RESTARTS_AT_FIRST

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._old_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
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
                    self._end(child)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_wakeup)
            self._selector.close()
            self._wake.close()
            self._woken.close()

    @property
    def hurried(self) -> bool:
        """Whether the end was asked for a second time, and children were killed."""
        return self._stop_signals > 1

    def start(self, service: Service) -> None:
        """Start a child and look after it from now on."""
        child = _Child(service, self.logs / f"{service.name}.log")
        if child.log.exists() and child.log.stat().st_size > _MAX_LOG_BYTES:
            child.log.replace(child.log.with_suffix(".log.1"))
        self._children.append(child)
        self._spawn(child)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Look after the children until the condition holds. Raises Stopped, ChildLost."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise ChildLost(f"{what} did not come up within {seconds:g} s; look into {self.logs}")
            self._look_after(_ASK_AGAIN_SECONDS)

    def watch(self) -> None:
        """Look after the children until the end is asked for. Raises Stopped, ChildLost."""
        self._max_restarts = MAX_RESTARTS
        while True:
            self._look_after(None)

    def _look_after(self, seconds: float | None) -> None:
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
        """Until a signal arrives or the time is over."""
        if self._selector.select(seconds):
            while True:
                try:
                    self._woken.recv(512)
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
                # Its own session: a terminal's Ctrl-C reaches the parent alone, which drains in the right order.
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        child.started_at = time.monotonic()
        self.tell("started", {"service": child.service.name, "pid": child.process.pid})

    def _on_end(self, child: _Child, code: int) -> None:
        child.process = None
        if time.monotonic() - child.started_at > HEALTHY_SECONDS:
            child.failures = 0
        child.failures += 1
        if child.failures > self._max_restarts:
            raise ChildLost(
                f"{child.service.name} ended {child.failures} times in a row, last with {_meaning(code)}: "
                f"{_last_line(child.log)}\nIts log: {child.log}"
            )
        first, longest = _BACK_OFF
        delay = min(first * 2 ** (child.failures - 1), longest)
        child.due_at = time.monotonic() + delay
        self.tell(
            "ended",
            {"service": child.service.name, "how": _meaning(code), "restart": child.failures, "restart_in": delay},
        )

    def _drain(self) -> None:
        """SIGTERM to one stage after the other; a second stop signal leaves the rest to be killed."""
        asked = self._stop_signals
        for stage in sorted({c.service.stage for c in self._children}, reverse=True):
            children = [c for c in self._children if c.service.stage == stage and c.running]
            for child in children:
                self.tell("stopping", {"service": child.service.name})
                if child.process is not None:
                    child.process.terminate()
            deadline = time.monotonic() + max((c.service.drain_seconds for c in children), default=0.0)
            while any(c.running for c in children) and time.monotonic() < deadline and self._stop_signals == asked:
                self._sleep(deadline - time.monotonic())
            for child in children:
                self._end(child)
            if self._stop_signals != asked:
                return

    def _end(self, child: _Child) -> None:
        """Wait for no more: what still runs is killed."""
        if child.process is None:
            return
        if child.running:
            child.process.kill()
        child.process.wait()
        self.tell("stopped", {"service": child.service.name, "how": _meaning(child.process.returncode)})

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_signals += 1


def _on_child(number: int, frame: FrameType | None) -> None:
    """Nothing to do: that the signal has a handler is what wakes the parent."""


def _meaning(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


if sys.platform == "linux":
    _PR_SET_PDEATHSIG = 1
    _prctl = ctypes.CDLL(None).prctl

    def die_with(parent: int) -> None:
        """In the child, before its program starts: the kernel ends it together with its parent."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

else:

    def die_with(parent: int) -> None:
        """Other kernels have no such thing: there, a parent that is killed by SIGKILL leaves its children behind."""
