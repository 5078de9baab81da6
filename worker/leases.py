"""The leases of this process: one thread renews them all, and carries back what the database tells of their jobs.

A lease that could not be renewed in time is taken as lost by the job's own thread, by looking at the clock, so that it
stops even when the database hangs; whether the lease truly is lost, the fenced write decides.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpo.core.errors import CallInterruptedError, InterruptReason, StoreUnavailableError, frames
from tpo.jobs.leases import Flags, Lease
from tpo.settings import Settings
from tpo.store import Store
from worker.drain import Drain
from worker.logs import log

_LOOK_SECONDS = 1.0
"""How often cancel and deadline are looked for: a read, cheaper than a renewal."""


class Held:
    """One job that this process works on."""

    def __init__(self, lease: Lease, drain: Drain) -> None:
        self.lease = lease
        self._drain = drain
        self._stop: InterruptReason | None = None
        self._queue_paused = False
        self._renewed = time.monotonic()
        self._updated = self._renewed
        self._lock = threading.Lock()

    def update(self, flags: Flags | None, asked: float, *, renewed: bool = False) -> None:
        """Apply what was read from the database: None means that another worker has the job.

        `asked` is when the query began, on the monotonic clock; `renewed` says that it also prolonged the lease. The
        job's own thread and the one that keeps all leases read independently. Of two readings that overlap nobody knows
        which is newer, so that a request to stop in either of them counts.
        """
        with self._lock:
            if flags is None:
                self._stop = "lease_lost"
            if flags is None or self._stop == "lease_lost":
                return
            wants: tuple[tuple[bool, InterruptReason], ...] = (
                (flags.cancel_requested, "cancelled"),
                (flags.past_deadline, "deadline"),
                (flags.pause_requested, "paused"),
            )
            overlaps = asked < self._updated
            stop = next((reason for wanted, reason in wants if wanted), None)
            self._stop = stop or (self._stop if overlaps else None)
            self._queue_paused = flags.queue_paused or (overlaps and self._queue_paused)
            self._updated = time.monotonic()
            if renewed:
                # A renewal that took long may have begun before this job was claimed.
                self._renewed = max(self._renewed, asked)

    def interrupt(self) -> None:
        """Raises CallInterruptedError when a running model call has to end now."""
        if self._stop:
            raise CallInterruptedError(self._stop)
        if time.monotonic() - self._renewed >= self.lease.seconds:
            raise CallInterruptedError("lease_lost")
        if self._drain.interrupting.is_set():
            raise CallInterruptedError("drain")

    def between_calls(self) -> None:
        """Raises CallInterruptedError when the next model call must not begin."""
        self.interrupt()
        if self._drain.begun.is_set():
            raise CallInterruptedError("drain")
        if self._queue_paused:
            raise CallInterruptedError("queue_paused")


class Leases:
    """All jobs that this process works on, and the row that tells of the process itself."""

    def __init__(self, store: Store, drain: Drain, worker: str, settings: Settings) -> None:
        self._store = store
        self._drain = drain
        self._worker = worker
        self._settings = settings
        self._lease_seconds = settings.lease_seconds
        self._held: set[Held] = set()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)

    def register(self) -> None:
        """Tell the database that this worker is here. Raises StoreUnavailableError."""
        settings = self._settings
        self._store.workers.register(
            self._worker, model=settings.policy, reward_model=settings.reward_model, concurrency=settings.concurrency
        )

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more. Waits for a renewal that is under way, but not for a database that hangs."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[Held]:
        """Keep a lease for as long as the block runs."""
        held = Held(lease, self._drain)
        with self._lock:
            self._held.add(held)
        try:
            yield held
        finally:
            with self._lock:
                self._held.discard(held)
                self._idle.notify_all()

    def held(self) -> list[Lease]:
        """The leases of the jobs that run now."""
        with self._lock:
            return [held.lease for held in self._held]

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until no job runs here; False when time was up first."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._held, timeout)

    def _keep(self) -> None:
        pause = min(_LOOK_SECONDS, self._lease_seconds / 3)
        renew_at = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                if began >= renew_at:
                    self.register()
                    self._ask(self._renew, renewed=True)
                    renew_at = began + self._lease_seconds / 3
                else:
                    self._ask(self._look)
            except StoreUnavailableError as error:
                log.warning("leases cannot be renewed: %s", error)
            except Exception as error:
                log.error("leases cannot be renewed: %s", frames(error))
            self._stopping.wait(pause)

    def _ask(self, question: Callable[[set[str]], dict[str, tuple[int, Flags]]], *, renewed: bool = False) -> None:
        with self._lock:
            held = list(self._held)
        asked = time.monotonic()
        owned = question({job.lease.job_id for job in held}) if held else {}
        for job in held:
            fence, flags = owned.get(job.lease.job_id, (None, None))
            job.update(flags if fence == job.lease.fence else None, asked, renewed=renewed)

    def _renew(self, job_ids: set[str]) -> dict[str, tuple[int, Flags]]:
        return self._store.leases.renew(self._worker, job_ids, self._lease_seconds)

    def _look(self, job_ids: set[str]) -> dict[str, tuple[int, Flags]]:
        return self._store.leases.check(self._worker, job_ids)
