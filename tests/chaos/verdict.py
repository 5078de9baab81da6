"""What must hold when all is over: every row beside what an uninterrupted run gives."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from testing.processes import StartedCall, timeless
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.core.loop import locate
from tpo.core.run import run
from tpo.core.state import State
from tpo.core.status import TERMINAL
from tpo.jobs.records import progress_columns, read_state, without_progress
from tpo.jobs.tables import EventRow, Job

Claim = Callable[[bool, str], bool]
"""Notes what does not hold, and gives whether it does."""

_ENDS = tuple(f"job.{status}" for status in TERMINAL)


@dataclass
class Told:
    """One event of a job, as it stands."""

    type: str
    at: float
    attempt: int | None


@dataclass
class Verdict:
    """What was found."""

    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    inexact: int = 0
    statuses: "Counter[str]" = field(default_factory=Counter)
    steps: int = 0
    started_calls: int = 0
    repeated_calls: int = 0
    lost_claims: int = 0
    events: dict[str, list[Told]] = field(default_factory=dict)


@dataclass(frozen=True)
class Uninterrupted:
    """A run from the start that nothing disturbs: every state on its way, and every call that it starts."""

    states: Sequence[State]
    digests: Sequence[str]

    @classmethod
    def of(cls, state: State) -> "Uninterrupted":
        """Run it here."""
        states = [without_progress(state)]
        with tempfile.NamedTemporaryFile() as file:
            log = Path(file.name)
            policy, reward = ScriptedPolicy(log=log), ScriptedRewardModel(log=log)
            run(states[0], policy, reward, lambda step: states.append(step.after), lambda: None)
            digests = [line.split()[2] for line in log.read_text().splitlines()]
        return cls([timeless(each) for each in states], digests)


Seen = tuple[str, int, str | None]
"""A job's status, the number of its last event and its output."""


def judge(engine: Engine, accepted: Iterable[str], seen_ended: dict[str, Seen], calls: list[StartedCall]) -> Verdict:
    """Look at every row. `seen_ended`: each job as it stood when it was first seen in a terminal state."""
    verdict = Verdict(started_calls=len(calls))
    started = Counter(call.digest for call in calls)
    accepted = set(accepted)
    with Session(engine) as session:
        ids = set(session.scalars(select(Job.id)))
        for job_id in sorted(accepted - ids):
            verdict.lost += 1
            verdict.wrong.append(f"{job_id} was accepted and is not in the database")
        for job_id in sorted(ids - accepted):
            verdict.doubled += 1
            verdict.wrong.append(f"{job_id} is in the database although no client was given it")
        for job_id in sorted(ids & accepted):
            _judge_job(session, session.get_one(Job, job_id), seen_ended.get(job_id), started, verdict)
            session.expunge_all()
    for digest, count in started.items():
        if count:
            verdict.wrong.append(f"the model call {digest} was started {count} times and belongs to no job")
    return verdict


def _judge_job(session: Session, job: Job, seen: Seen | None, started: "Counter[str]", verdict: Verdict) -> None:
    def claim(holds: bool, what: str) -> bool:
        if not holds:
            verdict.wrong.append(f"{job.id} ({job.status}, fence {job.fence}): {what}")
        return holds

    state = read_state(session, job)
    reference = Uninterrupted.of(state)
    verdict.statuses[job.status] += 1
    verdict.steps += len(state.calls)
    if not claim(job.status in TERMINAL, "has not ended"):
        verdict.lost += 1
    exact = timeless(state) in reference.states
    claim(exact, "its rows are none of an uninterrupted run's")
    if job.status == "completed":
        exact &= claim(timeless(state) == reference.states[-1], "completed before its last step")
        exact &= claim(state.best is not None and job.output == state.best.text, "its output is not the best candidate")
    elif job.status in TERMINAL:
        claim(job.status == "cancelled" and job.cancel_requested_at is not None, f"failed: {job.error_code}")
    progress = progress_columns(state, locate(state))
    for name in ("best_candidate", "best_reward", "input_tokens", "output_tokens", "reward_tokens"):
        exact &= claim(getattr(job, name) == progress[name], f"its {name} is not that of its rows")
    claim(job.lease_owner is None and job.lease_until is None, "has ended and is still held")
    if seen:
        claim(seen == (job.status, job.last_event, job.output), f"changed after it had ended: {seen}")
    verdict.inexact += not exact
    _judge_events(session, job, state, reference, claim, verdict)
    _judge_calls(job, state, reference, started, claim, verdict)


def _judge_events(
    session: Session, job: Job, state: State, reference: Uninterrupted, claim: Claim, verdict: Verdict
) -> None:
    rows = session.scalars(select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.number)).all()
    types = [row.type for row in rows]
    claim([row.number for row in rows] == list(range(1, job.last_event + 1)), "its events are not 1..n")
    claim(types[0] == "job.queued", "its first event is not that it was queued")
    claim([t for t in types if t in _ENDS] == [types[-1]] == [f"job.{job.status}"], f"its end is told as {types[-3:]}")
    claim(types.count("job.started") == job.fence, "it was claimed more or less often than its events tell")
    completed = [row.data["iteration"] for row in rows if row.type == "job.iteration.completed"]
    claim(completed == list(range(len(completed))), f"iterations were told as completed: {completed}")
    # A claim tells of the phase that it finds, and a step of the one that follows.
    steps = [
        (row.data["iteration"], row.data["phase"]) for before, row in pairwise(rows) if _tells_of_step(before, row)
    ]
    expected = [locate(each) for each in reference.states[1 : len(state.calls) + 1]]
    claim(
        steps == [(each.iteration, each.phase) for each in expected if each.phase],
        f"its events tell of other steps: {steps}",
    )
    verdict.events[job.id] = [Told(row.type, row.created_at, row.data.get("attempt")) for row in rows]


def _tells_of_step(before: EventRow, row: EventRow) -> bool:
    return row.type == "job.phase" and before.type != "job.started"


def _judge_calls(
    job: Job, state: State, reference: Uninterrupted, started: "Counter[str]", claim: Claim, verdict: Verdict
) -> None:
    if not claim([c.number for c in state.calls] == list(range(1, len(state.calls) + 1)), "its calls are not 1..n"):
        verdict.doubled += 1
    starts = [started.pop(digest, 0) for digest in reference.digests]
    recorded = len(state.calls)
    claim(all(starts[:recorded]), "a call is recorded that nobody started")
    in_vain = sum(starts) - recorded
    claims_in_vain = job.fence - (job.status == "completed")
    claim(in_vain <= claims_in_vain, f"{in_vain} calls in vain in {claims_in_vain} claims that did not end it")
    verdict.repeated_calls += sum(max(0, count - 1) for count in starts)
    verdict.lost_claims += claims_in_vain
