"""Bounded shutdown: log each stage with its time, and end the process if it takes too long, saying what still runs."""

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

logger = logging.getLogger("api")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_RESORT_SECONDS = 2.0
"""After this much more, a timer in C ends a process in which no Python thread gets to run."""


class ShutdownWatchdog:
    """Ends the process `seconds` after a stop signal, whatever its threads and its event loop do.

    A Python signal handler runs only when the main thread next executes bytecode, so a main thread that is stuck would
    never see the signal. The interpreter's wake-up descriptor is written at once, and this thread reads it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._began: float | None = None

    def start(self) -> None:
        """Watch for stop signals from now on. Call this in the main thread."""
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="shutdown-watchdog", daemon=True).start()

    def watch_loop(self) -> None:
        """Include the tasks of the running event loop in what is reported."""
        self._loop = asyncio.get_running_loop()

    def begin(self) -> None:
        """Take the time of the signal. Safe in a signal handler, and to repeat."""
        self._began = self._began or time.monotonic()

    def log_stage(self, stage: str) -> None:
        """Log a stage of the shutdown with the time since the signal. Without a signal, log nothing."""
        if self._began is not None:
            logger.info("shutdown: %s after %.2f s", stage, time.monotonic() - self._began)

    def _watch(self, reader: socket.socket) -> None:
        while not set(reader.recv(1)) & set(_STOP_SIGNALS):
            pass
        self.begin()
        logger.info("shutdown: signal received, at most %.0f s remain", self._seconds)
        faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT_SECONDS, exit=True)
        time.sleep(self._seconds)
        try:
            logger.critical("shutdown: not complete after %.0f s; still running:\n%s", self._seconds, self._report())
            logging.shutdown()
        finally:
            os._exit(1)

    def _report(self) -> str:
        """Return the stacks of all threads and tasks: functions and lines only, because values may hold texts."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = threading.get_ident()
        lines = []
        for ident, frame in sys._current_frames().items():
            if ident != own:
                lines.append(f"thread {names.get(ident, '?')}: {_stack(reversed(list(_frames(frame))))}")
        for task in asyncio.all_tasks(self._loop) if self._loop else ():
            coroutine = getattr(task.get_coro(), "__qualname__", "?")
            lines.append(f"task {coroutine}: {_stack(task.get_stack())}")
        return "\n".join(lines)


def _frames(frame: FrameType) -> Iterable[FrameType]:
    following: FrameType | None = frame
    while following is not None:
        yield following
        following = following.f_back


def _stack(frames: Iterable[FrameType]) -> str:
    return " > ".join(f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_name}" for f in frames)
