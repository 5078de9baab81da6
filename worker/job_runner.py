"""What the workers do: `run_job` carries one job to its end or hands it back, `sweep` brings lost ones back."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tpo.backends import LoadedPolicy, LoadedRewardModel
from tpo.broker import Doorbell
from tpo.core.errors import (
    BackendUnavailable,
    Interrupted,
    JobError,
    LeaseLost,
    QueueUnavailable,
    StoreUnavailable,
    frames,
)
from tpo.core.ports import Policy, RewardModel
from tpo.core.run import run
from tpo.core.state import State
from tpo.core.status import Status
from tpo.jobs.claims import Claimed
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome, outcome_of_deadline, outcome_of_run
from tpo.jobs.scheduling import Rules
from tpo.settings import Settings
from tpo.store import Store
from worker.drain import Drain
from worker.leases import Held, Leases
from worker.logs import log

_LONGEST_DELAY = 60.0
_LONGEST_PAUSE = 2.0

Answer = TypeVar("Answer")


def rules_of(settings: Settings) -> Rules:
    """The rules of the order of jobs."""
    return Rules(settings.priority_seconds, settings.max_jobs_running)


class JobRunner:
    """Runs jobs, each in the thread that it is called in."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        doorbell: Doorbell,
        policy: LoadedPolicy,
        reward: LoadedRewardModel,
        leases: Leases,
        drain: Drain,
        name: str,
    ) -> None:
        self._settings = settings
        self.store = store
        self._doorbell = doorbell
        self._policy = policy
        self._reward = reward
        self._leases = leases
        self._drain = drain
        self._name = name

    def run_job(self, job_id: str) -> None:
        """Claim the job whose turn it is, which need not be the one rung for, and carry it as far as it goes."""
        if self._drain.begun.is_set():
            self._ring(job_id)
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
                self._ring(another)
            try:
                ended = self._end(_Work(self, held, state))
            except LeaseLost:
                ended = "left: another worker has it"
            except StoreUnavailable as error:
                ended = f"left: {error}"
            except Exception as error:
                log.error("%s cannot be ended: %s", job_id, frames(error))
                ended = "left"
        log.info("%s %s after %.2f s", job_id, ended, time.monotonic() - began)
        # Also where nothing was left when this one was claimed: its end may make room for another of its tenant.
        self.ring_for_next()

    def ring_for_next(self) -> None:
        """Ring for the job whose turn it is now, if there is one. What fails now, the sweeper does."""
        settings = self._settings
        try:
            job_id = self.store.queues.next_waiting(settings.policy, settings.reward_model, rules_of(settings))
        except StoreUnavailable as error:
            log.warning("not rung for the next job: %s", error)
        except Exception as error:
            log.error("not rung for the next job: %s", frames(error))
        else:
            if job_id is not None:
                self._ring(job_id)

    def hand_back(self, lease: Lease) -> Status:
        """Give a job back, its attempt not counted. Raises LeaseLost, and StoreUnavailable in a drain."""
        return self.insist(lambda: self.store.leases.release(lease))

    def insist(self, write: Callable[[], Answer]) -> Answer:
        """Do it as often as it takes to reach the database: what a model call gave is not thrown away for a restart.

        The write is fenced, so that only the database knows when it is too late. Raises StoreUnavailable in a drain.
        """
        pause = 0.05
        while True:
            try:
                return write()
            except StoreUnavailable:
                if self._drain.interrupting.wait(pause * random.uniform(0.5, 1)):  # noqa: S311 - jitter
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _claim(self) -> Claimed | None:
        settings = self._settings
        try:
            return self.store.leases.claim(
                self._name,
                settings.lease_seconds,
                model=settings.policy,
                reward_model=settings.reward_model,
                rules=rules_of(settings),
            )
        except StoreUnavailable as error:
            log.warning("no job claimed: %s", error)
        except Exception as error:
            log.error("no job can be claimed: %s", frames(error))
        return None

    def _end(self, work: "_Work") -> str:
        """Run the job and record how it ended. Gives the words for the log."""
        lease = work.held.lease
        try:
            outcome = work.run(self._policy, self._reward)
        except JobError as error:
            outcome = Outcome("failed", error_code=error.code, error_message=str(error))
        except (BackendUnavailable, QueueUnavailable, MemoryError) as error:
            code, message = _passing(error)
            if not (self._policy.healthy and self._reward.healthy) and not self._drain.begun.is_set():
                self._drain.fail("a model has stopped working")
            in_vain = 0 if work.advanced else lease.attempts_in_vain
            if in_vain < lease.max_attempts:
                delay = min(2.0**in_vain, _LONGEST_DELAY) * random.uniform(0.5, 1)  # noqa: S311 - jitter
                self.insist(lambda: self.store.leases.release(lease, delay_seconds=delay, reason=code))
                return f"waits {delay:.1f} s for another attempt ({code})"
            outcome = Outcome("failed", error_code=code, error_message=message)
        except Interrupted as error:
            match error.reason:
                case "cancelled":
                    outcome = Outcome("cancelled")
                case "deadline":
                    outcome = outcome_of_deadline(work.state)
                case "drain" | "paused" | "queue_paused":
                    return f"handed back: {self.hand_back(lease)}"
                case "lease_lost":
                    raise LeaseLost() from error
        except (LeaseLost, StoreUnavailable):
            raise
        except Exception as error:
            log.error("%s met an unexpected error: %s", lease.job_id, frames(error))
            message = "An internal error ended this job; the worker's log tells where."
            outcome = Outcome("failed", error_code="internal_error", error_message=message)
        status = self.insist(lambda: self.store.leases.finish(lease, outcome))
        return f"{status} ({outcome.error_code})" if outcome.error_code else status

    def _ring(self, job_id: str) -> None:
        try:
            self._doorbell.ring(job_id, self._settings.policy)
        except QueueUnavailable as error:
            log.warning("%s not rung for, the sweeper will ring: %s", job_id, error)


def _passing(error: BackendUnavailable | QueueUnavailable | MemoryError) -> tuple[str, str]:
    """Code and message of an error that another attempt may not meet."""
    if isinstance(error, MemoryError):
        return "out_of_memory", "The worker ran out of memory."
    return error.code, str(error)


class _Work:
    """One job's run: the last state that stands in the database, and the step that adds to it."""

    def __init__(self, runner: JobRunner, held: Held, state: State) -> None:
        self.held = held
        self.state = state
        self.advanced = False
        self._runner = runner

    def run(self, policy: Policy, reward: RewardModel) -> Outcome:
        """The outcome of a run to its end. Raises whatever stops it."""
        held = self.held
        return outcome_of_run(
            run(self.state, policy, reward, self._checkpoint, held.interrupt, before_call=held.between_calls)
        )

    def _checkpoint(self, after: State) -> None:
        asked = time.monotonic()
        flags = self._runner.insist(lambda: self._runner.store.leases.checkpoint(self.held.lease, self.state, after))
        self.state = after
        self.advanced = True
        self.held.update(flags, asked, renewed=True)
        call = after.calls[-1]
        log.debug("%s call %d (%s) recorded", self.held.lease.job_id, call.number, call.kind)
