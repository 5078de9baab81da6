"""Verification of a chaos run: the judge finds each kind of error, so that a pass means something."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine

from testing.fakes import new_state
from testing.jobs import claim, create, execute, put
from testing.processes import StartedCall
from tests.chaos.verdict import Seen, Verdict, judge
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.core.run import run
from tpo.jobs.outcomes import Outcome
from tpo.store import Store


class CompletedJob:
    """A job that completed undisturbed, and the model calls that were started for it."""

    def __init__(self, engine: Engine, store: Store, log: Path) -> None:
        self.engine = engine
        self.store = store
        self.job_id = create(store, new_state(sample_size=2, max_iterations=1))
        lease, state = claim(store, self.job_id)
        checkpoint = partial(store.leases.checkpoint, lease)
        final = run(state, ScriptedPolicy(log=log), ScriptedRewardModel(log=log), checkpoint, lambda: None)
        assert final.best
        store.leases.finish(lease, Outcome("completed", output=final.best.text))
        self.calls = [StartedCall(*line.split()) for line in log.read_text().splitlines()]
        self.accepted = {self.job_id}

    def judged(self) -> Verdict:
        job = self.store.jobs.get(self.job_id)
        return judge(self.engine, self.accepted, {self.job_id: (job.status, job.last_event, job.output)}, self.calls)


@pytest.fixture
def completed(engine: Engine, store: Store, tmp_path: Path) -> CompletedJob:
    return CompletedJob(engine, store, tmp_path / "calls.log")


def test_undisturbed_job_has_no_findings(completed: CompletedJob) -> None:
    verdict = completed.judged()
    assert (verdict.wrong, verdict.lost, verdict.doubled, verdict.inexact) == ([], 0, 0, 0)
    assert (verdict.steps, verdict.started_calls, verdict.repeated_calls) == (6, 6, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.accepted.add("job_" + 32 * "0"), "is not in the database"),
        (lambda d: create(d.store), "no client was given it"),
        (lambda d: d.calls.append(d.calls[2]), "unrecorded calls"),
        (lambda d: d.calls.append(StartedCall("sample", "0", "f" * 16, "1")), "belongs to no job"),
        (lambda d: d.calls.pop(), "that no worker started"),
        (lambda d: execute(d.engine, "DELETE FROM events WHERE number = 3"), "not 1..n"),
        (lambda d: execute(d.engine, "UPDATE candidates SET text = text || '!' WHERE sample = 1"), "not in an"),
        (lambda d: execute(d.engine, "DELETE FROM calls WHERE number = 6"), "not in an"),
        (lambda d: put(d.engine, d.job_id, fence=2), "claimed more or less often"),
        (lambda d: put(d.engine, d.job_id, lease_owner="worker-1"), "still held"),
        (lambda d: put(d.engine, d.job_id, input_tokens=1), "input_tokens"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_each_kind_of_damage_is_found(
    completed: CompletedJob, damage: Callable[[CompletedJob], object], message: str
) -> None:
    damage(completed)
    assert [found for found in completed.judged().wrong if message in found]


def test_change_after_the_end_is_found(completed: CompletedJob) -> None:
    seen: dict[str, Seen] = {completed.job_id: ("in_progress", 1, None)}
    assert [
        found
        for found in judge(completed.engine, completed.accepted, seen, completed.calls).wrong
        if "changed after" in found
    ]
