"""Verification of a run: compares every row with those of an uninterrupted run of the same job."""

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

Expect = Callable[[bool, str], bool]
"""Records a message if the condition does not hold, and returns the condition."""

_END_EVENTS = tuple(f"job.{status}" for status in TERMINAL)


@dataclass
class JobEvent:
    """A stored event of a job."""

    type: str
    at: float
    attempt: int | None


@dataclass
class Verdict:
    """Findings of a verification."""

    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    inexact: int = 0
    statuses: "Counter[str]" = field(default_factory=Counter)
    steps: int = 0
    started_calls: int = 0
    repeated_calls: int = 0
    lost_claims: int = 0
    events: dict[str, list[JobEvent]] = field(default_factory=dict)


@dataclass(frozen=True)
class Uninterrupted:
    """Undisturbed run of a job from its start: all states and the digests of all started calls."""

    states: Sequence[State]
    digests: Sequence[str]

    @classmethod
    def of(cls, state: State) -> "Uninterrupted":
        """Run the job in this process."""
        states = [without_progress(state)]
        with tempfile.NamedTemporaryFile() as file:
            log = Path(file.name)
            policy, reward = ScriptedPolicy(log=log), ScriptedRewardModel(log=log)
            run(states[0], policy, reward, lambda step: states.append(step.after), lambda: None)
            digests = [line.split()[2] for line in log.read_text().splitlines()]
        return cls([timeless(each) for each in states], digests)


Seen = tuple[str, int, str | None]
"""Status of a job, number of its last event, and output."""


def judge(engine: Engine, accepted: Iterable[str], seen_ended: dict[str, Seen], calls: list[StartedCall]) -> Verdict:
    """Verify every row. `seen_ended` holds each job as it was when first seen in a terminal state."""
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
    def expect(holds: bool, message: str) -> bool:
        if not holds:
            verdict.wrong.append(f"{job.id} ({job.status}, fence {job.fence}): {message}")
        return holds

    state = read_state(session, job)
    reference = Uninterrupted.of(state)
    verdict.statuses[job.status] += 1
    verdict.steps += len(state.calls)
    if not expect(job.status in TERMINAL, "has not ended"):
        verdict.lost += 1
    exact = timeless(state) in reference.states
    expect(exact, "its rows are not in an uninterrupted run")
    if job.status == "completed":
        exact &= expect(timeless(state) == reference.states[-1], "completed before its last step")
        exact &= expect(
            state.best is not None and job.output == state.best.text, "its output is not the best candidate"
        )
    elif job.status in TERMINAL:
        expect(job.status == "cancelled" and job.cancel_requested_at is not None, f"failed: {job.error_code}")
    progress = progress_columns(state, locate(state))
    for name in ("best_candidate", "best_reward", "input_tokens", "output_tokens", "reward_tokens"):
        exact &= expect(getattr(job, name) == progress[name], f"its {name} differs from its rows")
    expect(job.lease_owner is None and job.lease_until is None, "has ended and is still held")
    if seen:
        expect(seen == (job.status, job.last_event, job.output), f"changed after it had ended: {seen}")
    verdict.inexact += not exact
    _judge_events(session, job, state, reference, expect, verdict)
    _judge_calls(job, state, reference, started, expect, verdict)


def _judge_events(
    session: Session, job: Job, state: State, reference: Uninterrupted, expect: Expect, verdict: Verdict
) -> None:
    rows = session.scalars(select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.number)).all()
    types = [row.type for row in rows]
    expect([row.number for row in rows] == list(range(1, job.last_event + 1)), "its events are not 1..n")
    expect(types[0] == "job.queued", "its first event is not job.queued")
    expect(
        [t for t in types if t in _END_EVENTS] == [types[-1]] == [f"job.{job.status}"],
        f"its last events are {types[-3:]}",
    )
    expect(types.count("job.started") == job.fence, "it was claimed more or less often than its events show")
    completed = [row.data["iteration"] for row in rows if row.type == "job.iteration.completed"]
    expect(completed == list(range(len(completed))), f"events of completed iterations: {completed}")
    # A claim publishes the current phase, and a step the next one.
    steps = [
        (row.data["iteration"], row.data["phase"]) for before, row in pairwise(rows) if _is_step_event(before, row)
    ]
    expected = [locate(each) for each in reference.states[1 : len(state.calls) + 1]]
    expect(
        steps == [(each.iteration, each.phase) for each in expected if each.phase],
        f"its events show other steps: {steps}",
    )
    verdict.events[job.id] = [JobEvent(row.type, row.created_at, row.data.get("attempt")) for row in rows]


def _is_step_event(before: EventRow, row: EventRow) -> bool:
    return row.type == "job.phase" and before.type != "job.started"


def _judge_calls(
    job: Job, state: State, reference: Uninterrupted, started: "Counter[str]", expect: Expect, verdict: Verdict
) -> None:
    if not expect([c.number for c in state.calls] == list(range(1, len(state.calls) + 1)), "its calls are not 1..n"):
        verdict.doubled += 1
    starts = [started.pop(digest, 0) for digest in reference.digests]
    recorded = len(state.calls)
    expect(all(starts[:recorded]), "a call is recorded that no worker started")
    unrecorded = sum(starts) - recorded
    unfinished = job.fence - (job.status == "completed")
    expect(unrecorded <= unfinished, f"{unrecorded} unrecorded calls in {unfinished} claims that did not end it")
    verdict.repeated_calls += sum(max(0, count - 1) for count in starts)
    verdict.lost_claims += unfinished
