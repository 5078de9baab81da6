"""Run claimed jobs: each to its end, or until it has to be handed back."""

import threading
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from tpo.backends import LoadedPolicy, LoadedRewardModel
from tpo.backoff import backoff_seconds
from tpo.broker import JobNotifier
from tpo.core.errors import (
    BackendUnavailableError,
    BrokerUnavailableError,
    CallInterruptedError,
    JobError,
    LeaseLostError,
    StoreUnavailableError,
    frames,
)
from tpo.core.loop import Step
from tpo.core.ports import Policy, RewardModel
from tpo.core.run import run
from tpo.core.state import State
from tpo.core.status import Status
from tpo.jobs.claims import Claimed
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome, outcome_of_deadline, outcome_of_run
from tpo.settings import Settings
from tpo.store import Store
from worker.drain import Drain
from worker.guard import guarded
from worker.leases import HeldJob, Leases, scheduling_rules
from worker.logs import log

_LONGEST_PAUSE = 2.0

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
            self._notify(job_id)
            return
        claimed = self._claim()
        if claimed is None:
            return
        lease, state, another = claimed
        job_id = lease.job_id
        log.info("%s claimed, attempt %d", job_id, lease.attempt)
        began = time.monotonic()
        with self._leases.holding(lease) as held:
            if another is not None:
                self._notify(another)
            try:
                ended = self._end(_Work(self, held, state))
            except LeaseLostError:
                ended = "left: another worker has it"
            except StoreUnavailableError as error:
                ended = f"left: {error}"
            except Exception as error:
                log.error("%s: its end cannot be recorded: %s", job_id, frames(error))
                ended = "left"
        log.info("%s %s after %.2f s", job_id, ended, time.monotonic() - began)
        # Even if no job was queued when this one was claimed: its end may free capacity for another of its tenant.
        self.notify_next()

    def notify_next(self) -> None:
        """Notify workers of the next job, if there is one. The rescuer repeats a failed notification."""
        settings = self._settings
        with guarded("no worker notified of the next job"):
            if job_id := self.store.queues.next_waiting(
                settings.policy, settings.reward_model, scheduling_rules(settings)
            ):
                self._notify(job_id)

    def hand_back(self, lease: Lease) -> Status:
        """Return a job to the queue without counting its attempt.

        Raises LeaseLostError, and StoreUnavailableError during a drain.
        """
        return self.retry_until_stored(lambda: self.store.leases.release(lease))

    def retry_until_stored(self, write: Callable[[], Answer]) -> Answer:
        """Retry until the database is reachable, so that a restart does not discard a finished model call.

        Writes are fenced, so only the database knows when it is too late. Raises StoreUnavailableError during a drain.
        """
        for attempt in count():
            try:
                return write()
            except StoreUnavailableError:
                if self._drain.interrupting.wait(backoff_seconds(attempt, first=0.1, longest=_LONGEST_PAUSE)):
                    raise
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
                rules=scheduling_rules(settings),
            )
        return None

    def _end(self, work: "_Work") -> str:
        """Run the job and record its outcome. Returns a text for the log."""
        lease = work.held.lease
        try:
            outcome = work.run(self._policy, self._reward)
        except JobError as error:
            outcome = Outcome("failed", error_code=error.code, error_message=str(error))
        except (BackendUnavailableError, BrokerUnavailableError, MemoryError) as error:
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
        except (LeaseLostError, StoreUnavailableError):
            raise
        except Exception as error:
            log.error("%s failed with an unexpected error: %s", lease.job_id, frames(error))
            message = "An internal error ended this job; the worker's log shows where."
            outcome = Outcome("failed", error_code="internal_error", error_message=message)
        status = self.retry_until_stored(lambda: self.store.leases.finish(lease, outcome))
        return f"{status} ({outcome.error_code})" if outcome.error_code else status

    def _notify(self, job_id: str) -> None:
        with guarded(f"{job_id}: no worker notified, the rescuer will do it"):
            self._notifier.notify_job(job_id, self._settings.policy)


def _describe_transient(error: BackendUnavailableError | BrokerUnavailableError | MemoryError) -> tuple[str, str]:
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
