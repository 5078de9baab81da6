"""The leases of this process: one thread renews them all and fetches the stop requests for their jobs.

The job's own thread treats a lease as lost if it was not renewed in time. It only reads the clock, so it stops even if
the database hangs. The fenced write decides whether the lease really is lost.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tpo.core.errors import CallInterruptedError, InterruptReason, StoreUnavailableError, frames
from tpo.jobs.leases import Flags, Lease
from tpo.jobs.scheduling import Rules
from tpo.settings import Settings
from tpo.store import Store
from worker.drain import Drain
from worker.logs import log

_CHECK_SECONDS = 1.0
"""Interval between two checks for a cancellation or a deadline. A check is a read, cheaper than a renewal."""


class HeldJob:
    """A job that this process runs, with the state of its lease."""

    def __init__(self, lease: Lease, drain: Drain, yields: Callable[[], bool] = lambda: False) -> None:
        self.lease = lease
        self.cut_off = False
        """Whether the database could not be reached when the lease was last to be renewed."""
        self.cleared = False
        """True once a job that was in quarantine has recorded a step: it leaves the worker of the other suspects."""
        self._drain = drain
        self._yields = yields
        self._stop: InterruptReason | None = None
        self._queue_paused = False
        self._renewed = time.monotonic()
        self._updated = self._renewed
        self._lock = threading.Lock()

    def update(self, flags: Flags | None, asked: float, *, renewed: bool = False) -> None:
        """Apply the flags read from the database; None means that another worker has the job.

        `asked` is the start of the query on the monotonic clock; `renewed` means that the query also extended the
        lease. The job's own thread and the renewal thread read independently. If two reads overlap, either may be the
        newer one, so a stop request in either of them counts.
        """
        with self._lock:
            if flags is None:
                self._stop = "lease_lost"
            if flags is None or self._stop == "lease_lost":
                return
            requests: tuple[tuple[bool, InterruptReason], ...] = (
                (flags.cancel_requested, "cancelled"),
                (flags.past_deadline, "deadline"),
                (flags.pause_requested, "paused"),
            )
            overlaps = asked < self._updated
            stop = next((reason for requested, reason in requests if requested), None)
            self._stop = stop or (self._stop if overlaps else None)
            self._queue_paused = flags.queue_paused or (overlaps and self._queue_paused)
            self._updated = time.monotonic()
            if renewed:
                # A slow renewal may have begun before this job was claimed.
                self._renewed = max(self._renewed, asked)
                self.cut_off = False

    def interrupt(self) -> None:
        """Raise CallInterruptedError if a running model call must end now."""
        if self._stop:
            raise CallInterruptedError(self._stop)
        if time.monotonic() - self._renewed >= self.lease.seconds:
            raise CallInterruptedError("lease_lost")
        if self._drain.interrupting.is_set():
            raise CallInterruptedError("drain")

    def between_calls(self) -> None:
        """Raise CallInterruptedError if the next model call must not begin."""
        self.interrupt()
        if self._drain.begun.is_set():
            raise CallInterruptedError("drain")
        if self._queue_paused:
            raise CallInterruptedError("queue_paused")
        if self.cleared or (self.lease.quarantine is None and self._yields()):
            raise CallInterruptedError("quarantine")


class Leases:
    """All jobs that this process runs, and its row in the table of workers."""

    def __init__(self, store: Store, drain: Drain, worker: str, settings: Settings) -> None:
        self._store = store
        self._drain = drain
        self._worker = worker
        self._settings = settings
        self._lease_seconds = settings.lease_seconds
        self._held: set[HeldJob] = set()
        self._unforgiven: list[Lease] = []
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._stopping = threading.Event()
        self._yields = threading.Event()
        """Set while this worker empties itself for suspects of a crash."""
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)

    def register(self) -> None:
        """Register this worker in the database. Calling it again is a heartbeat.

        Raises StoreUnavailableError.
        """
        settings = self._settings
        self._store.workers.register(
            self._worker, model=settings.policy, reward_model=settings.reward_model, concurrency=settings.concurrency
        )

    def start(self) -> None:
        """Start the renewal thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop renewing. Waits for a renewal in progress, but not for a hung database."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[HeldJob]:
        """Keep a lease renewed while the block runs."""
        held = HeldJob(lease, self._drain, self._yields.is_set)
        if lease.quarantine is not None:
            self._yields.clear()  # it is empty now
        with self._lock:
            self._held.add(held)
        try:
            yield held
        finally:
            with self._lock:
                self._held.discard(held)
                self._idle.notify_all()

    def forgive_later(self, lease: Lease) -> None:
        """Take back the attempt of a lost lease as soon as the database can be reached."""
        with self._lock:
            self._unforgiven.append(lease)

    def held(self) -> list[Lease]:
        """Return the leases of the running jobs."""
        with self._lock:
            return [held.lease for held in self._held]

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until no job runs here. Returns False on timeout."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._held, timeout)

    def _keep(self) -> None:
        pause = min(_CHECK_SECONDS, self._lease_seconds / 3)
        renew_at = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                if began >= renew_at:
                    if not self._drain.exit_code:  # a process that fails is as good as dead
                        self.register()
                    self._ask(self._renew, renewed=True)
                    self._forgive()
                    self._set_yields()
                    renew_at = began + self._lease_seconds / 3
                else:
                    self._ask(self._check)
            except StoreUnavailableError as error:
                log.warning("leases cannot be renewed: %s", error)
                self.mark_cut_off()
            except Exception as error:
                log.error("leases cannot be renewed: %s", frames(error))
                self.mark_cut_off()
            self._stopping.wait(pause)

    def mark_cut_off(self) -> None:
        """Note for all held jobs that the database cannot be reached: if they lose their leases, this is why."""
        with self._lock:
            for held in self._held:
                held.cut_off = True

    def _forgive(self) -> None:
        with self._lock:
            leases = list(self._unforgiven)
        for lease in leases:
            self._store.leases.forgive(lease)
            log.info("%s: its attempt does not count, because the database was away", lease.job_id)
            with self._lock:
                self._unforgiven.remove(lease)

    def _ask(self, query: Callable[[set[str]], dict[str, tuple[int, Flags]]], *, renewed: bool = False) -> None:
        with self._lock:
            held = list(self._held)
        asked = time.monotonic()
        owned = query({job.lease.job_id for job in held}) if held else {}
        for job in held:
            fence, flags = owned.get(job.lease.job_id, (None, None))
            job.update(flags if fence == job.lease.fence else None, asked, renewed=renewed)

    def _set_yields(self) -> None:
        settings = self._settings
        yields = self._store.leases.must_yield(
            self._worker,
            model=settings.policy,
            reward_model=settings.reward_model,
            rules=Rules.from_settings(settings),
        )
        if yields and not self._yields.is_set():
            log.info("jobs are handed back after their calls: suspects of a crash need a worker of their own")
        (self._yields.set if yields else self._yields.clear)()

    def _renew(self, job_ids: set[str]) -> dict[str, tuple[int, Flags]]:
        return self._store.leases.renew(self._worker, job_ids, self._lease_seconds)

    def _check(self, job_ids: set[str]) -> dict[str, tuple[int, Flags]]:
        return self._store.leases.check(self._worker, job_ids)
