"""Maintenance loops: each task repeats in a thread of its own, so that a slow one delays no other.

Pauses are measured by the monotonic clock: setting a machine's clock neither stops a loop nor hurries it.
"""

import threading
import time
from collections.abc import Callable, Sequence

from worker.drain import Drain
from worker.guard import guarded
from worker.logs import log

_LONG_SECONDS = 10.0
_STUCK_SECONDS = 300.0
_CHECK_SECONDS = 1.0
_JOIN_SECONDS = 2.0


class Loop:
    """A task that repeats every `seconds`, and at once while it returns True. The next round repeats what fails."""

    def __init__(
        self, name: str, seconds: float, task: Callable[[], bool | None], *, long_seconds: float = _LONG_SECONDS
    ) -> None:
        self.name = name
        self.long_seconds = long_seconds
        self._seconds = seconds
        self._task = task
        self._wake = threading.Event()
        self._stopping = False
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. Its first round begins at once."""
        self._thread.start()

    def wake(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    def stop(self) -> None:
        """Begin no further round, and wait for the current one for a short time."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def step_seconds(self) -> float:
        """Return for how long the current round has been running; 0 between two rounds."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self) -> None:
        while not self._stopping:
            self._began, more = time.monotonic(), False
            with guarded(f"{self.name} has failed"):
                more = bool(self._task())
            if (seconds := self.step_seconds()) >= self.long_seconds:
                log.warning("%s: a step took %.0f s", self.name, seconds)
            self._began = None
            if not more:
                self._wake.wait(self._seconds)
            self._wake.clear()


class LoopWatch:
    """Notices steps that take long. A step that is stuck ends the process, so that its supervisor restarts it."""

    def __init__(self, loops: Sequence[Loop], drain: Drain, *, stuck_seconds: float = _STUCK_SECONDS) -> None:
        self._loops = loops
        self._drain = drain
        self._stuck_seconds = stuck_seconds
        self._reported: dict[str, float] = {}

    def start(self) -> None:
        """Start the thread that checks."""
        threading.Thread(target=self._watch, name="watch-loops", daemon=True).start()

    def check(self) -> None:
        """Log each step that takes long, again whenever its time has doubled."""
        for loop in self._loops:
            seconds = loop.step_seconds()
            due = max(loop.long_seconds, 2 * self._reported.get(loop.name, 0.0))
            if seconds < loop.long_seconds:
                self._reported.pop(loop.name, None)
            elif seconds >= due:
                log.warning("%s: a step has been running for %.0f s", loop.name, seconds)
                self._reported[loop.name] = seconds
            if seconds >= self._stuck_seconds and not self._drain.begun.is_set():
                self._drain.fail(f"{loop.name}: a step is stuck")

    def _watch(self) -> None:
        while not self._drain.begun.wait(_CHECK_SECONDS):
            self.check()
