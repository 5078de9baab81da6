"""Quarantine on a simulated clock: poison jobs end, and take no other job with them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo.jobs.quarantine import LostJob, Source, claim_sources, must_yield, split_suspects

ATTEMPTS = 3
LEASE = 30
RESTART = 5
END_OF_TIME = 200_000


@dataclass
class SimulatedJob:
    """A job of the simulation. `dies_at` is the call that kills its worker."""

    name: str
    calls: int
    dies_at: int | None = None
    group: str | None = None
    since: int = 0
    done: int = 0
    failures: int = 0
    ended: str | None = None


@dataclass
class SimulatedWorker:
    """A worker process. `running` holds the time at which each of its jobs ends its call."""

    name: str
    running: dict[str, int] = field(default_factory=dict)
    back_at: int = 0


class Fleet:
    """Workers, a queue and a quarantine. Lists replace the database; all times are whole seconds."""

    def __init__(self, jobs: Sequence[SimulatedJob], workers: int, slots: int, seconds: int) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.workers = [SimulatedWorker(f"worker-{number}") for number in range(workers)]
        self.waiting = list(self.jobs)
        self.lost: list[tuple[int, list[str]]] = []
        self.slots = slots
        self.seconds = seconds
        self.crashes = 0
        self.groups = 0

    def run(self, crash_at: Sequence[int] = ()) -> None:
        """Run until every job has ended. The worker with the most jobs also crashes at the times of `crash_at`."""
        for now in range(END_OF_TIME):
            for worker in self.workers:
                self._end_calls(worker, now)
            for _ in range(crash_at.count(now)):
                self._crash(max(self.workers, key=lambda worker: len(worker.running)), now)
            self._rescue(now)
            for worker in self.workers:
                while worker.back_at <= now and len(worker.running) < self.slots and self._claim(worker, now):
                    assert len({self.jobs[name].group for name in worker.running}) == 1, "suspects share a worker"
            if all(job.ended for job in self.jobs.values()):
                return
        raise AssertionError("some job never ends")

    def _end_calls(self, worker: SimulatedWorker, now: int) -> None:
        due = [name for name, end in worker.running.items() if end <= now]
        if any(self.jobs[name].done == self.jobs[name].dies_at for name in due):
            self._crash(worker, now)
            return
        for name in due:
            job = self.jobs[name]
            job.done, job.failures = job.done + 1, 0
            leaves = job.group is not None or self._yields(worker, now)
            job.group = None
            if job.done == job.calls:
                job.ended = "completed"
                del worker.running[name]
            elif leaves:
                del worker.running[name]
                job.since = now
                self.waiting.append(name)
            else:
                worker.running[name] = now + self.seconds

    def _crash(self, worker: SimulatedWorker, now: int) -> None:
        self.crashes += 1
        self.lost.append((now + LEASE, list(worker.running)))
        worker.running.clear()
        worker.back_at = now + RESTART

    def _rescue(self, now: int) -> None:
        for at, names in [(at, names) for at, names in self.lost if at == now]:
            self.lost.remove((at, names))
            for group in split_suspects([LostJob(name, "default") for name in names]):
                self.groups += 1
                for job in map(self.jobs.__getitem__, group):
                    job.failures += len(names) == 1
                    if job.failures >= ATTEMPTS:
                        job.ended = "failed"
                        continue
                    job.group, job.since = str(self.groups), now
                    self.waiting.append(job.name)

    def _suspects(self) -> list[SimulatedJob]:
        waiting = [self.jobs[name] for name in self.waiting]
        return sorted((job for job in waiting if job.group), key=lambda job: job.since)

    def _yields(self, worker: SimulatedWorker, now: int) -> bool:
        suspects = self._suspects()
        running = [self.jobs[name] for other in self.workers for name in other.running]
        return bool(suspects) and must_yield(
            worker=worker.name,
            live=[other.name for other in self.workers if other.back_at <= now],
            waited=now - suspects[0].since,
            patience=LEASE,
            quarantine_runs=any(job.group for job in running),
        )

    def _claim(self, worker: SimulatedWorker, now: int) -> bool:
        group = next((self.jobs[name].group for name in worker.running if self.jobs[name].group), None)
        suspects = [job for job in self._suspects() if group in (None, job.group)]
        queue = [job for name in self.waiting if (job := self.jobs[name]).group is None]
        for source in claim_sources(
            held=len(worker.running),
            group=group,
            suspects_since=suspects[0].since if suspects else None,
            queue_since=queue[0].since if queue else None,
            yields=group is None and self._yields(worker, now),
        ):
            if jobs := suspects if source is Source.QUARANTINE else queue:
                self.waiting.remove(jobs[0].name)
                worker.running[jobs[0].name] = now + self.seconds
                return True
        return False


def assert_ended(fleet: Fleet) -> None:
    """Assert that exactly the poison jobs failed."""
    ends = {job.name: job.ended for job in fleet.jobs.values()}
    assert ends == {job.name: "completed" if job.dies_at is None else "failed" for job in fleet.jobs.values()}


@settings(max_examples=40, deadline=None)
@given(
    poison=st.dictionaries(st.integers(0, 15), st.integers(0, 3), min_size=1, max_size=3),
    jobs=st.integers(16, 40),
    workers=st.integers(1, 3),
    seconds=st.sampled_from([1, 5, 60, 300]),
)
def test_poison_jobs_fail_no_other_job(poison: dict[int, int], jobs: int, workers: int, seconds: int) -> None:
    made = [SimulatedJob(f"job-{number:02}", 4, poison.get(number)) for number in range(jobs)]
    fleet = Fleet(made, workers, 16, seconds)
    fleet.run()
    assert_ended(fleet)


@pytest.mark.parametrize("position", range(16))
def test_poison_among_16_ends_after_two_shared_crashes(position: int) -> None:
    fleet = Fleet([SimulatedJob(f"job-{n:02}", 4, 0 if n == position else None) for n in range(16)], 1, 16, 5)
    fleet.run()
    assert_ended(fleet)
    assert fleet.crashes == 2 + ATTEMPTS


@pytest.mark.parametrize("seconds", [1, 5])
def test_random_crashes_fail_no_job(seconds: int) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        fleet = Fleet([SimulatedJob(f"job-{number:02}", 4) for number in range(16)], 1, 16, seconds)
        fleet.run([rng.randrange(30 * seconds + 300) for _ in range(10)])
        assert_ended(fleet)


def test_other_jobs_continue_while_poison_is_retried() -> None:
    poison = [SimulatedJob(f"a-{number}", 4, 0) for number in range(8)]
    others = [SimulatedJob(f"b-{number}", 40) for number in range(40)]
    fleet = Fleet([*poison, *others], 2, 4, 10)
    fleet.run()
    assert_ended(fleet)


@given(st.lists(st.tuples(st.uuids().map(str), st.sampled_from("abc")), max_size=200, unique_by=lambda job: job[0]))
def test_groups_cover_all_suspects_and_are_smaller(jobs: list[tuple[str, str]]) -> None:
    lost = [LostJob(*job) for job in jobs]
    groups = split_suspects(lost)
    assert sorted(name for group in groups for name in group) == sorted(job.job_id for job in lost)
    assert all(groups)
    assert all(len(group) < len(lost) for group in groups if len(lost) > 1)
    assert len(groups) <= 4 + 2 * len(lost) ** 0.5


def test_suspects_of_one_tenant_share_a_group() -> None:
    lost = [LostJob(f"job-{number}", "abcd"[number % 4]) for number in range(16)]
    tenants = {job.job_id: job.tenant for job in lost}
    assert [{tenants[name] for name in group} for group in split_suspects(lost)] == [{"a"}, {"b"}, {"c"}, {"d"}]


def test_worker_runs_suspects_apart() -> None:
    def sources(held: int = 0, group: str | None = None, queue: float | None = 9.0, *, yields: bool = False) -> str:
        found = claim_sources(held=held, group=group, suspects_since=10.0, queue_since=queue, yields=yields)
        return " ".join(source.value for source in found)

    assert sources(held=1, group="a") == sources(held=3, group="a", yields=True) == "quarantine"
    assert sources(held=2) == "queue"
    assert sources(held=2, yields=True) == ""
    assert sources() == "queue quarantine"
    assert sources(queue=11.0) == sources(queue=None) == sources(yields=True) == "quarantine queue"


def test_one_worker_yields_after_its_patience() -> None:
    def yields(worker: str, waited: float = 30, *, runs: bool = False) -> bool:
        return must_yield(worker=worker, live=["b", "a"], waited=waited, patience=30, quarantine_runs=runs)

    assert yields("a")
    assert not yields("b")
    assert not yields("a", waited=29)
    assert not yields("a", runs=True)
