"""Fair scheduling on a simulated clock: priorities are respected, and no tenant and no priority starves."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tpo.jobs.scheduling import QueueHead, Rules, pick_next, with_capacity

MINUTE = 60.0


@dataclass(frozen=True, order=True)
class SimulatedJob:
    """A job of the simulation: its arrival time, tenant, priority and duration, in seconds."""

    arrives: float
    tenant: str
    priority: int = 0
    seconds: float = 1.0


@dataclass(frozen=True)
class SimulatedClaim:
    """A claim of a job: its time, the jobs that were waiting, and the running jobs of each tenant."""

    job: SimulatedJob
    at: float
    waiting: tuple[SimulatedJob, ...]
    running: Counter[str]


def simulate(jobs: Sequence[SimulatedJob], slots: int = 1, rules: Rules | None = None) -> list[SimulatedClaim]:
    """Return all claims, in order, of a queue with this number of slots. Lists replace the database."""
    rules = rules or Rules()
    arriving = sorted(jobs)
    queues: dict[tuple[str, int], list[SimulatedJob]] = defaultdict(list)
    served: dict[tuple[str, int], float] = {}
    last_claims: dict[str, float] = defaultdict(float)
    running: list[tuple[float, str]] = []
    claims: list[SimulatedClaim] = []
    clock = 1.0
    while arriving or any(queues.values()):
        while arriving and arriving[0].arrives <= clock:
            job = arriving.pop(0)
            queues[job.tenant, job.priority].append(job)
        counts = Counter(tenant for _, tenant in running)
        heads = [
            QueueHead(f"{waiting[0].arrives:012.3f}", *key, waiting[0].arrives, served.get(key), last_claims[key[0]])
            for key, waiting in queues.items()
            if waiting
        ]
        head = pick_next(with_capacity(heads, counts, rules), counts, clock, rules) if len(running) < slots else None
        if head is None:
            events = [running[0][0]] if running else []
            clock = min(events + [job.arrives for job in arriving[:1] if job.arrives > clock])
            while running and running[0][0] <= clock:
                heapq.heappop(running)
            continue
        waiting = tuple(job for jobs in queues.values() for job in jobs)
        job = queues[head.tenant, head.priority].pop(0)
        served[head.tenant, head.priority] = last_claims[head.tenant] = clock
        claims.append(SimulatedClaim(job, clock, waiting, counts))
        heapq.heappush(running, (clock + job.seconds, job.tenant))
    return claims


JOBS = st.lists(
    st.builds(
        SimulatedJob,
        arrives=st.integers(0, 600).map(float),
        tenant=st.sampled_from("abcd"),
        priority=st.sampled_from([-3, 0, 0, 0, 2, 100]),
        seconds=st.integers(1, 120).map(float),
    ),
    min_size=1,
    max_size=40,
)
SLOTS = st.integers(1, 5)


@settings(max_examples=300)
@given(JOBS, SLOTS)
def test_scheduling_claims_each_job_exactly_once(jobs: list[SimulatedJob], slots: int) -> None:
    claims = simulate(jobs, slots)
    assert Counter(claim.job for claim in claims) == Counter(jobs)
    assert max(claim.running.total() for claim in claims) < slots


@settings(max_examples=300)
@given(JOBS, SLOTS)
def test_scheduling_lower_priority_needs_longer_wait(jobs: list[SimulatedJob], slots: int) -> None:
    for claim in simulate(jobs, slots):
        above = max(job.priority for job in claim.waiting) - claim.job.priority
        assert claim.at - claim.job.arrives >= above * MINUTE


@settings(max_examples=300)
@given(JOBS, SLOTS)
def test_scheduling_prefers_tenant_with_fewest_running_jobs(jobs: list[SimulatedJob], slots: int) -> None:
    equal = [SimulatedJob(job.arrives, job.tenant, 0, job.seconds) for job in jobs]
    for claim in simulate(equal, slots):
        fewest = min(claim.running[job.tenant] for job in claim.waiting)
        assert claim.running[claim.job.tenant] == fewest


@settings(max_examples=200)
@given(JOBS, SLOTS)
def test_scheduling_is_fifo_per_tenant_and_priority(jobs: list[SimulatedJob], slots: int) -> None:
    seen: dict[tuple[str, int], float] = {}
    for claim in simulate(jobs, slots):
        key = (claim.job.tenant, claim.job.priority)
        assert seen.get(key, 0.0) <= claim.job.arrives
        seen[key] = claim.job.arrives


def positions(claims: Sequence[SimulatedClaim], tenant: str) -> list[int]:
    """Return the numbers of the claims of a tenant, counted from 1."""
    return [number for number, claim in enumerate(claims, 1) if claim.job.tenant == tenant]


def test_scheduling_small_tenant_waits_at_most_twice_as_long() -> None:
    small = [SimulatedJob(10.0, "small", seconds=5) for _ in range(10)]
    big = [SimulatedJob(0.0, "big", seconds=5) for _ in range(1000)]
    for slots in (1, 4):
        expected = positions(simulate(small, slots), "small")
        before = sum(1 for claim in simulate(big, slots) if claim.at < 10.0)
        shared = [at - before for at in positions(simulate(small + big, slots), "small")]
        assert all(b <= 2 * a for a, b in zip(expected, shared, strict=True)), (expected, shared)


def test_scheduling_shares_by_waiting_tenants_not_jobs() -> None:
    jobs = [SimulatedJob(0.0, tenant) for tenant, count in (("a", 300), ("b", 100), ("c", 60)) for _ in range(count)]
    claims = simulate(jobs)
    assert Counter(claim.job.tenant for claim in claims[:180]) == {"a": 60, "b": 60, "c": 60}
    assert Counter(claim.job.tenant for claim in claims[180:260]) == {"a": 40, "b": 40}


def test_scheduling_long_jobs_leave_slots_to_others() -> None:
    long = [SimulatedJob(0.0, "long", seconds=10_000) for _ in range(50)]
    short = [SimulatedJob(0.0, "short", seconds=1) for _ in range(500)]
    claims = simulate(long + short, slots=4)
    started = [claim for claim in claims if claim.at < 200]
    assert Counter(claim.job.tenant for claim in started)["long"] == 2


def test_scheduling_low_priority_is_not_starved_by_flood() -> None:
    flood = [SimulatedJob(float(second), "flood", 5, 1.0) for second in range(2000)]
    low = [SimulatedJob(0.0, "low", 0, 1.0) for _ in range(3)]
    own = [SimulatedJob(0.0, "flood", 3, 1.0) for _ in range(3)]
    claims = simulate(flood + low + own)
    waited = {
        key: [t.at for t in claims if (t.job.tenant, t.job.priority) == key] for key in (("low", 0), ("flood", 3))
    }
    for (_, priority), times in waited.items():
        pause = (5 - priority) * MINUTE
        assert [round(at / pause) for at in times] == [1, 2, 3], times


def test_scheduling_many_priorities_gain_no_share() -> None:
    many = [SimulatedJob(0.0, "many", priority) for priority in range(-9, 1) for _ in range(30)]
    one = [SimulatedJob(0.0, "one", 0) for _ in range(30)]
    claims = simulate(many + one)
    assert positions(claims, "one")[-1] <= 60


def test_running_limit_leaves_slots_to_others() -> None:
    jobs = [SimulatedJob(0.0, tenant, 50 * (tenant == "a"), 10) for tenant in "ab" for _ in range(20)]
    claims = simulate(jobs, slots=4, rules=Rules(max_running=3))
    assert {claim.running["a"] for claim in claims if claim.job.tenant == "a"} == {0, 1, 2}
    assert [claim.job.tenant for claim in claims[:4]] == ["a", "a", "a", "b"]


def test_tenant_limit_overrides_general_limit() -> None:
    heads = [
        QueueHead("1", "a", 0, 0.0, max_running=5),
        QueueHead("2", "b", 0, 0.0),
        QueueHead("3", "c", 0, 0.0, max_running=0),
    ]
    running = {"a": 4, "b": 4}
    assert [head.tenant for head in with_capacity(heads, running, Rules(max_running=2))] == ["a"]
    assert [head.tenant for head in with_capacity(heads, running, Rules())] == ["a", "b"]
    assert pick_next([], running, 1.0, Rules()) is None
