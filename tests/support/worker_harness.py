"""A worker without its process, for tests: one thread, with models and a database that fail on request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.broker import JobNotifier
from tpo.core import prompts
from tpo.core.errors import BrokerUnavailableError, StoreUnavailableError
from tpo.core.loop import Step
from tpo.core.ports import Generate, Generation, Interrupt, Rewards, Score
from tpo.core.state import Message, Params, State
from tpo.core.status import Status
from tpo.db import DEFAULT_TENANT
from tpo.jobs.claims import Claimed, LeaseQueries
from tpo.jobs.leases import Flags, Lease
from tpo.jobs.queues import QueueQueries
from tpo.jobs.view import JobView
from tpo.settings import Settings
from tpo.store import Store
from worker.drain import Drain
from worker.job_runner import JobRunner
from worker.leases import Leases

SECRET = "a text of a user"


class RecordingNotifier(JobNotifier):
    """A notifier that records the jobs it was asked to notify workers of."""

    def __init__(self) -> None:
        self.notified: list[str] = []
        self.broken = False

    def notify_job(self, job_id: str, model: str) -> None:
        if self.broken:
            raise BrokerUnavailableError()
        self.notified.append(job_id)


class Policy(ScriptedPolicy):
    """The scripted policy, with a hook that runs before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[Generate, Interrupt], None] = lambda _request, _interrupt: None

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        self.before(request, interrupt)
        return super().generate(request, interrupt)


class Reward(ScriptedRewardModel):
    """The scripted reward model, with a hook that runs before each call."""

    before: Callable[[Score, Interrupt], None] = staticmethod(lambda _request, _interrupt: None)

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        self.before(request, interrupt)
        return super().score(request, interrupt)


class FlakyStore(Store):
    """A store whose database is unavailable for some calls.

    fails: number of calls that fail, by name of the operation.
    on_failure: called before each failure.
    watch: called with the state after each checkpoint.
    """

    def __init__(self, engine: Engine, tenant: str = DEFAULT_TENANT) -> None:
        super().__init__(engine, tenant)
        self.fails: dict[str, int] = {}
        self.on_failure: Callable[[], None] = lambda: None
        self.watch: Callable[[State], None] = lambda _after: None
        self.leases = _FlakyLeases(self)
        self.queues = _FlakyQueues(self)

    def maybe_fail(self, name: str) -> None:
        """Raise StoreUnavailableError if a failure of this operation is left."""
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            self.on_failure()
            raise StoreUnavailableError()


class _FlakyQueues(QueueQueries):
    def __init__(self, store: FlakyStore) -> None:
        super().__init__(store.engine)
        self._maybe_fail = store.maybe_fail

    def next_waiting(self, *args: Any, **kwargs: Any) -> str | None:
        self._maybe_fail("next")
        return super().next_waiting(*args, **kwargs)


class _FlakyLeases(LeaseQueries):
    def __init__(self, store: FlakyStore) -> None:
        super().__init__(store.engine)
        self._store = store

    def claim(self, *args: Any, **kwargs: Any) -> Claimed | None:
        self._store.maybe_fail("claim")
        return super().claim(*args, **kwargs)

    def checkpoint(self, lease: Lease, step: Step) -> Flags:
        self._store.maybe_fail("checkpoint")
        flags = super().checkpoint(lease, step)
        self._store.maybe_fail("acknowledgement of checkpoint")
        self._store.watch(step.after)
        return flags

    def release(self, *args: Any, **kwargs: Any) -> Status:
        self._store.maybe_fail("release")
        return super().release(*args, **kwargs)

    def finish(self, *args: Any) -> Status:
        self._store.maybe_fail("finish")
        return super().finish(*args)


@dataclass
class Bench:
    """A worker without its process."""

    store: FlakyStore
    policy: Policy
    reward: Reward
    notifier: RecordingNotifier
    drain: Drain
    leases: Leases
    runner: JobRunner
    settings: Settings

    def create(self, max_attempts: int = 3, deadline_seconds: float | None = None, **params: Any) -> str:
        """Submit a job and return its id."""
        state = State(
            input=(Message(role="user", content=SECRET),),
            params=Params.model_validate({"sample_size": 2, "max_iterations": 1, **params}),
            prompts=prompts.load("conversation"),
        )
        submitted = self.store.jobs.submit(
            state,
            model="scripted",
            reward_model="scripted",
            max_attempts=max_attempts,
            deadline_seconds=deadline_seconds,
        )
        return submitted.job.id

    def run(self, job_id: str) -> JobView:
        """Pass a wake-up for the job to the worker, and return the job afterwards."""
        self.runner.run_job(job_id)
        assert self.leases.held() == []
        return self.store.jobs.get(job_id)
