"""The judge finds what is wrong: a run that passes has been looked at by one who can tell."""

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


class Done:
    """A job that was done without any trouble, and the calls that were started for it."""

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
def done(engine: Engine, store: Store, tmp_path: Path) -> Done:
    return Done(engine, store, tmp_path / "calls.log")


def test_nothing_is_wrong_with_a_job_that_nothing_disturbed(done: Done) -> None:
    verdict = done.judged()
    assert (verdict.wrong, verdict.lost, verdict.doubled, verdict.inexact) == ([], 0, 0, 0)
    assert (verdict.steps, verdict.started_calls, verdict.repeated_calls) == (6, 6, 0)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: d.accepted.add("job_" + 32 * "0"), "is not in the database"),
        (lambda d: create(d.store), "no client was given it"),
        (lambda d: d.calls.append(d.calls[2]), "calls in vain"),
        (lambda d: d.calls.append(StartedCall("sample", "0", "f" * 16, "1")), "belongs to no job"),
        (lambda d: d.calls.pop(), "that nobody started"),
        (lambda d: execute(d.engine, "DELETE FROM events WHERE number = 3"), "not 1..n"),
        (lambda d: execute(d.engine, "UPDATE candidates SET text = text || '!' WHERE sample = 1"), "none of an"),
        (lambda d: execute(d.engine, "DELETE FROM calls WHERE number = 6"), "none of an"),
        (lambda d: put(d.engine, d.job_id, fence=2), "claimed more or less often"),
        (lambda d: put(d.engine, d.job_id, lease_owner="worker-1"), "still held"),
        (lambda d: put(d.engine, d.job_id, input_tokens=1), "input_tokens"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_whatever_is_wrong_is_found(done: Done, spoil: Callable[[Done], object], told: str) -> None:
    spoil(done)
    assert [what for what in done.judged().wrong if told in what]


def test_what_changes_after_its_end_is_found(done: Done) -> None:
    seen: dict[str, Seen] = {done.job_id: ("in_progress", 1, None)}
    assert [what for what in judge(done.engine, done.accepted, seen, done.calls).wrong if "changed after" in what]
