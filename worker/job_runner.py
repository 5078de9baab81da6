"""Run claimed jobs: each to its end, or until it has to be handed back."""

import threading
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from tpo.backends import LoadedPolicy, LoadedRewardModel
from tpo.backoff import backoff_seconds
from tpo.broker import JobNotifier, is_broker_error
from tpo.core.errors import (
    BackendUnavailableError,
    BrokerUnavailableError,
    CallInterruptedError,
    JobError,
    LeaseLostError,
    StatementFailedError,
    StoreUnavailableError,
    frames,
)
from tpo.core.loop import Step
from tpo.core.ports import Policy, RewardModel
from tpo.core.run import run
from tpo.core.state import State
from tpo.core.status import Status
from tpo.db import is_driver_error
from tpo.jobs.claims import Claimed
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome, outcome_of_deadline, outcome_of_run
from tpo.jobs.scheduling import Rules
from tpo.settings import Settings
from tpo.store import Store
from worker.drain import Drain
from worker.guard import guarded
from worker.leases import HeldJob, Leases
from worker.logs import log

_LONGEST_PAUSE = 2.0
_LONGEST_PAUSE_AFTER_REFUSAL = 30.0
"""A statement that the database refuses is tried less often: it may be refused until somebody fixes the cause."""

Answer = TypeVar("Answer")


class JobRunner:
    """Runs jobs, each in the thread that calls `run_job`."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        notifier: JobNotifier,
        policy: LoadedPolicy,
        reward: LoadedRewardModel,
        leases: Leases,
        drain: Drain,
        name: str,
    ) -> None:
        self._settings = settings
        self.store = store
        self._notifier = notifier
        self._policy = policy
        self._reward = reward
        self._leases = leases
        self._drain = drain
        self._name = name
        self._claiming = threading.Lock()

    def run_job(self, job_id: str) -> None:
        """Claim the next job and run it as far as possible.

        The claimed job need not be `job_id`: the message is only a wake-up, and the database picks the next job.
        """
        if self._drain.begun.is_set():
            self.notify(job_id)
            return
        if claimed := self._claim():
            self._run(claimed, self.notify)
            # Even if no job was queued when this one was claimed: its end may free capacity for another of its tenant.
            self.notify_next()

    def next_waiting(self) -> str | None:
        """Return the next job that this worker can run, or None. Raises StoreUnavailableError."""
        settings = self._settings
        return self.store.queues.next_waiting(settings.policy, settings.reward_model, Rules.from_settings(settings))

    def notify(self, job_id: str) -> None:
        """Notify workers that a job waits. The rescuer repeats a failed notification."""
        with guarded(f"{job_id}: no worker notified, the rescuer will do it"):
            self._notifier.notify_job(job_id, self._settings.policy)

    def run_waiting_job(self, another_waits: Callable[[], None]) -> str | None:
        """Claim the next job and run it without the broker. Returns its id, or None if there is none.

        `another_waits` is called if more jobs wait.
        """
        if self._drain.begun.is_set() or not (claimed := self._claim()):
            return None
        self._run(claimed, lambda _job_id: another_waits())
        return claimed.lease.job_id

    def _run(self, claimed: Claimed, notify: Callable[[str], None]) -> None:
        lease, state, another = claimed
        job_id = lease.job_id
        log.info("%s claimed, attempt %d", job_id, lease.attempt)
        began = time.monotonic()
        with self._leases.holding(lease) as held:
            if another is not None:
                notify(another)
            try:
                ended = self._end(_Work(self, held, state))
            except LeaseLostError:
                ended = "left: its lease is lost"
                if held.cut_off:
                    self._leases.forgive_later(lease)
            except StoreUnavailableError as error:
                ended = f"left: {error}"
                self._leases.forgive_later(lease)
            except Exception as error:
                log.error("%s: its end cannot be recorded: %s", job_id, frames(error))
                ended = "left"
        log.info("%s %s after %.2f s", job_id, ended, time.monotonic() - began)

    def notify_next(self) -> None:
        """Notify workers of the next job, if there is one. The rescuer repeats a failed notification."""
        with guarded("no worker notified of the next job"):
            if job_id := self.next_waiting():
                self.notify(job_id)

    def hand_back(self, lease: Lease) -> Status:
        """Return a job to the queue without counting its attempt.

        Raises LeaseLostError, and StoreUnavailableError during a drain.
        """
        return self.retry_until_stored(lambda: self.store.leases.release(lease))

    def retry_until_stored(self, write: Callable[[], Answer]) -> Answer:
        """Retry until the database accepts a write, so that a restart does not discard a finished model call.

        Every error of the database or its driver is retried: none of them may end a job. Writes are fenced, so only the
        database knows when it is too late. Raises StoreUnavailableError during a drain.
        """
        for attempt in count():
            try:
                return write()
            except (StoreUnavailableError, SQLAlchemyError) as error:
                longest = _LONGEST_PAUSE
                if not isinstance(error, StoreUnavailableError) or isinstance(error, StatementFailedError):
                    longest = _LONGEST_PAUSE_AFTER_REFUSAL
                    log.error("a write is refused and will be repeated: %s", frames(error))
                if self._drain.interrupting.wait(backoff_seconds(attempt, first=0.1, longest=longest)):
                    raise StoreUnavailableError() from error
        raise AssertionError("unreachable")

    def _claim(self) -> Claimed | None:
        settings = self._settings
        # One claim at a time: what this worker holds decides whether the next job is one of the queue or a suspect.
        with self._claiming, guarded("no job claimed"):
            return self.store.leases.claim(
                self._name,
                settings.lease_seconds,
                model=settings.policy,
                reward_model=settings.reward_model,
                rules=Rules.from_settings(settings),
            )
        return None

    def _end(self, work: "_Work") -> str:
        """Run the job and record its outcome. Returns a text for the log."""
        lease = work.held.lease
        try:
            outcome = work.run(self._policy, self._reward)
        except JobError as error:
            outcome = Outcome("failed", error_code=error.code, error_message=str(error))
        except (BackendUnavailableError, MemoryError) as error:
            code, message = _describe_transient(error)
            failing = not self._drain.begun.is_set() or self._drain.exit_code
            if failing and not (self._policy.healthy and self._reward.healthy):
                # Its jobs are lost together, like those of a process that dies: one of them may be the cause.
                if not self._drain.begun.is_set():
                    self._drain.fail("a model has stopped working")
                self.retry_until_stored(lambda: self.store.leases.expire(lease))
                return f"lost with its worker ({code})"
            failures = 0 if work.advanced else lease.consecutive_failures
            if failures < lease.max_attempts:
                delay = backoff_seconds(failures)
                self.retry_until_stored(lambda: self.store.leases.release(lease, delay_seconds=delay, reason=code))
                return f"waits {delay:.1f} s for another attempt ({code})"
            outcome = Outcome("failed", error_code=code, error_message=message)
        except CallInterruptedError as error:
            match error.reason:
                case "cancelled":
                    outcome = Outcome("cancelled")
                case "deadline":
                    outcome = outcome_of_deadline(work.state)
                case "drain" | "paused" | "queue_paused" | "quarantine":
                    return f"handed back: {self.hand_back(lease)}"
                case "lease_lost":
                    raise LeaseLostError() from error
        except LeaseLostError:
            raise
        except Exception as error:
            if _is_infrastructure(error):  # it says nothing about the job: the attempt does not count
                log.error("%s is handed back: %s", lease.job_id, frames(error))
                return f"handed back: {self.hand_back(lease)}"
            log.error("%s failed with an unexpected error: %s", lease.job_id, frames(error))
            message = "An internal error ended this job; the worker's log shows where."
            outcome = Outcome("failed", error_code="internal_error", error_message=message)
        status = self.retry_until_stored(lambda: self.store.leases.finish(lease, outcome))
        return f"{status} ({outcome.error_code})" if outcome.error_code else status


def _is_infrastructure(error: Exception) -> bool:
    """Return whether the database, the broker or a driver of theirs failed, and not the job."""
    ours = isinstance(error, StoreUnavailableError | BrokerUnavailableError | SQLAlchemyError)
    return ours or is_driver_error(error) or is_broker_error(error)


def _describe_transient(error: BackendUnavailableError | MemoryError) -> tuple[str, str]:
    """Return code and message of an error that another attempt may not meet."""
    if isinstance(error, MemoryError):
        return "out_of_memory", "The worker ran out of memory."
    return error.code, str(error)


class _Work:
    """One run of a job: its last stored state, and the checkpoint that stores the next one."""

    def __init__(self, runner: JobRunner, held: HeldJob, state: State) -> None:
        self.held = held
        self.state = state
        self.advanced = False
        self._runner = runner

    def run(self, policy: Policy, reward: RewardModel) -> Outcome:
        """Run the job to its end and return its outcome. Raises whatever stops it."""
        held = self.held
        return outcome_of_run(
            run(self.state, policy, reward, self._checkpoint, held.interrupt, before_call=held.between_calls)
        )

    def _checkpoint(self, step: Step) -> None:
        asked = time.monotonic()
        flags = self._runner.retry_until_stored(lambda: self._runner.store.leases.checkpoint(self.held.lease, step))
        self.state = step.after
        self.advanced = True
        self.held.cleared = self.held.lease.quarantine is not None
        self.held.update(flags, asked, renewed=True)
        call = step.after.calls[-1]
        log.debug("%s call %d (%s) recorded", self.held.lease.job_id, call.number, call.kind)
