"""A worker without its process: one thread's work, with models and a database that fail when a test says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpo import prompts
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.errors import QueueUnavailable, StoreUnavailable
from tpo.jobs.store import Claimed, Flags, Lease, Store
from tpo.jobs.tables import Job
from tpo.ports import Generate, Generation, Interrupt, Rewards, Score
from tpo.queue import Doorbell
from tpo.settings import Settings
from tpo.state import Message, Params, State
from tpo.status import Status
from worker.drain import Drain
from worker.lease import Leases
from worker.tasks import JobRunner

SECRET = "a text of a user"


class Bells(Doorbell):
    """A doorbell that remembers."""

    def __init__(self) -> None:
        self.rung: list[str] = []
        self.broken = False

    def ring(self, job_id: str, model: str) -> None:
        if self.broken:
            raise QueueUnavailable()
        self.rung.append(job_id)


class Policy(ScriptedPolicy):
    """The scripted policy, that fails when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[Generate, Interrupt], None] = lambda _request, _interrupt: None

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        self.before(request, interrupt)
        return super().generate(request, interrupt)


class Reward(ScriptedRewardModel):
    """The scripted reward model, that does what the test says before it scores."""

    before: Callable[[Score, Interrupt], None] = staticmethod(lambda _request, _interrupt: None)

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        self.before(request, interrupt)
        return super().score(request, interrupt)


class FlakyStore(Store):
    """A store whose database goes away for some calls."""

    fails: dict[str, int]
    on_failure: Callable[[], None] = staticmethod(lambda: None)
    watch: Callable[[State], None] = staticmethod(lambda _after: None)

    def _maybe(self, name: str) -> None:
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            self.on_failure()
            raise StoreUnavailable()

    def claim_next(self, *args: Any, **kwargs: Any) -> Claimed | None:
        self._maybe("claim")
        return super().claim_next(*args, **kwargs)

    def next_waiting(self, *args: Any, **kwargs: Any) -> str | None:
        self._maybe("next")
        return super().next_waiting(*args, **kwargs)

    def checkpoint(self, lease: Lease, before: State, after: State) -> Flags:
        self._maybe("checkpoint")
        flags = super().checkpoint(lease, before, after)
        self._maybe("answer of checkpoint")
        self.watch(after)
        return flags

    def finish(self, *args: Any) -> Status:
        self._maybe("finish")
        return super().finish(*args)


@dataclass
class Bench:
    """A worker without its process."""

    store: FlakyStore
    policy: Policy
    reward: Reward
    bells: Bells
    drain: Drain
    leases: Leases
    runner: JobRunner
    settings: Settings

    def create(self, max_attempts: int = 3, deadline_seconds: float | None = None, **params: Any) -> str:
        state = State(
            input=(Message(role="user", content=SECRET),),
            params=Params.model_validate({"sample_size": 2, "max_iterations": 1, **params}),
            prompts=prompts.load("conversation"),
        )
        job = self.store.create(
            state,
            model="scripted",
            reward_model="scripted",
            max_attempts=max_attempts,
            deadline_seconds=deadline_seconds,
        )
        return job.id

    def run(self, job_id: str) -> Job:
        self.runner.run_job(job_id)
        assert self.leases.held() == []
        return self.store.get(job_id)
