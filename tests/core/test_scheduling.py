"""Promise 11, on a simulated clock: a higher priority goes first, and neither a tenant nor a priority starves."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tpo.jobs.scheduling import QueueHead, Rules, pick_next, with_capacity

MINUTE = 60.0


@dataclass(frozen=True, order=True)
class Wanted:
    """A job of the simulation: when it comes, and how long it runs."""

    arrives: float
    tenant: str
    priority: int = 0
    seconds: float = 1.0


@dataclass(frozen=True)
class Ran:
    """A turn that was given."""

    job: Wanted
    at: float
    waiting: tuple[Wanted, ...]
    running: Counter[str]


def simulate(jobs: Sequence[Wanted], slots: int = 1, rules: Rules | None = None) -> list[Ran]:
    """All turns, in their order, of a queue with so many slots. What the database does is done in lists here."""
    rules = rules or Rules()
    coming = sorted(jobs)
    line: dict[tuple[str, int], list[Wanted]] = defaultdict(list)
    served: dict[tuple[str, int], float] = {}
    last: dict[str, float] = defaultdict(float)
    running: list[tuple[float, str]] = []
    turns: list[Ran] = []
    clock = 1.0
    while coming or any(line.values()):
        while coming and coming[0].arrives <= clock:
            job = coming.pop(0)
            line[job.tenant, job.priority].append(job)
        counts = Counter(tenant for _, tenant in running)
        heads = [
            QueueHead(f"{waiting[0].arrives:012.3f}", *key, waiting[0].arrives, served.get(key), last[key[0]])
            for key, waiting in line.items()
            if waiting
        ]
        head = pick_next(with_capacity(heads, counts, rules), counts, clock, rules) if len(running) < slots else None
        if head is None:
            events = [running[0][0]] if running else []
            clock = min(events + [job.arrives for job in coming[:1] if job.arrives > clock])
            while running and running[0][0] <= clock:
                heapq.heappop(running)
            continue
        waiting = tuple(job for jobs in line.values() for job in jobs)
        job = line[head.tenant, head.priority].pop(0)
        served[head.tenant, head.priority] = last[head.tenant] = clock
        turns.append(Ran(job, clock, waiting, counts))
        heapq.heappush(running, (clock + job.seconds, job.tenant))
    return turns


JOBS = st.lists(
    st.builds(
        Wanted,
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
def test_scheduling_claims_each_job_exactly_once(jobs: list[Wanted], slots: int) -> None:
    turns = simulate(jobs, slots)
    assert Counter(turn.job for turn in turns) == Counter(jobs)
    assert max(turn.running.total() for turn in turns) < slots


@settings(max_examples=300)
@given(JOBS, SLOTS)
def test_scheduling_lower_priority_needs_longer_wait(jobs: list[Wanted], slots: int) -> None:
    for turn in simulate(jobs, slots):
        above = max(job.priority for job in turn.waiting) - turn.job.priority
        assert turn.at - turn.job.arrives >= above * MINUTE


@settings(max_examples=300)
@given(JOBS, SLOTS)
def test_scheduling_prefers_tenant_with_fewest_running_jobs(jobs: list[Wanted], slots: int) -> None:
    equal = [Wanted(job.arrives, job.tenant, 0, job.seconds) for job in jobs]
    for turn in simulate(equal, slots):
        fewest = min(turn.running[job.tenant] for job in turn.waiting)
        assert turn.running[turn.job.tenant] == fewest


@settings(max_examples=200)
@given(JOBS, SLOTS)
def test_scheduling_is_fifo_per_tenant_and_priority(jobs: list[Wanted], slots: int) -> None:
    seen: dict[tuple[str, int], float] = {}
    for turn in simulate(jobs, slots):
        key = (turn.job.tenant, turn.job.priority)
        assert seen.get(key, 0.0) <= turn.job.arrives
        seen[key] = turn.job.arrives


def positions(turns: Sequence[Ran], tenant: str) -> list[int]:
    return [number for number, turn in enumerate(turns, 1) if turn.job.tenant == tenant]


def test_scheduling_small_tenant_waits_at_most_twice_as_long() -> None:
    small = [Wanted(10.0, "small", seconds=5) for _ in range(10)]
    big = [Wanted(0.0, "big", seconds=5) for _ in range(1000)]
    for slots in (1, 4):
        alone = positions(simulate(small, slots), "small")
        before = sum(1 for turn in simulate(big, slots) if turn.at < 10.0)
        beside = [at - before for at in positions(simulate(small + big, slots), "small")]
        assert all(b <= 2 * a for a, b in zip(alone, beside, strict=True)), (alone, beside)


def test_scheduling_shares_by_waiting_tenants_not_jobs() -> None:
    jobs = [Wanted(0.0, tenant) for tenant, count in (("a", 300), ("b", 100), ("c", 60)) for _ in range(count)]
    turns = simulate(jobs)
    assert Counter(turn.job.tenant for turn in turns[:180]) == {"a": 60, "b": 60, "c": 60}
    assert Counter(turn.job.tenant for turn in turns[180:260]) == {"a": 40, "b": 40}


def test_scheduling_long_jobs_leave_slots_to_others() -> None:
    long = [Wanted(0.0, "long", seconds=10_000) for _ in range(50)]
    short = [Wanted(0.0, "short", seconds=1) for _ in range(500)]
    turns = simulate(long + short, slots=4)
    begun = [turn for turn in turns if turn.at < 200]
    assert Counter(turn.job.tenant for turn in begun)["long"] == 2


def test_scheduling_low_priority_is_not_starved_by_flood() -> None:
    flood = [Wanted(float(second), "flood", 5, 1.0) for second in range(2000)]
    low = [Wanted(0.0, "low", 0, 1.0) for _ in range(3)]
    own = [Wanted(0.0, "flood", 3, 1.0) for _ in range(3)]
    turns = simulate(flood + low + own)
    waited = {key: [t.at for t in turns if (t.job.tenant, t.job.priority) == key] for key in (("low", 0), ("flood", 3))}
    for (_, priority), times in waited.items():
        pause = (5 - priority) * MINUTE
        assert [round(at / pause) for at in times] == [1, 2, 3], times


def test_scheduling_many_priorities_gain_no_share() -> None:
    many = [Wanted(0.0, "many", priority) for priority in range(-9, 1) for _ in range(30)]
    one = [Wanted(0.0, "one", 0) for _ in range(30)]
    turns = simulate(many + one)
    assert positions(turns, "one")[-1] <= 60


def test_running_limit_leaves_slots_to_others() -> None:
    jobs = [Wanted(0.0, tenant, 50 * (tenant == "a"), 10) for tenant in "ab" for _ in range(20)]
    turns = simulate(jobs, slots=4, rules=Rules(max_running=3))
    assert {turn.running["a"] for turn in turns if turn.job.tenant == "a"} == {0, 1, 2}
    assert [turn.job.tenant for turn in turns[:4]] == ["a", "a", "a", "b"]


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
