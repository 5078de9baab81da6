"""Claims on both databases: fairness, running limits, and paused queues."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from testing.fakes import make_step
from testing.jobs import SERVES, claim, create, create_many, event_types, put, rows
from tpo.core.errors import InvalidInputError
from tpo.db import writing
from tpo.jobs import claims
from tpo.jobs.claims import Pair
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome
from tpo.jobs.scheduling import Rules
from tpo.store import Store
from tpo.tenants.tenants import Limits


def claim_next(store: Store, rules: Rules | None = None, worker: str = "worker-1") -> str | None:
    """Claim the next job and return its id, after checking that it is the expected one."""
    expected = store.queues.next_waiting("policy", "reward", rules)
    claimed = store.leases.claim(worker, 30, rules=rules, **SERVES)
    assert (claimed[0].job_id if claimed else None) == expected
    return expected


def create_for(store: Store, tenant: str, count: int = 1, priority: int = 0) -> list[str]:
    """Create jobs of a tenant and return their ids, the oldest first."""
    return create_sorted(count, store.for_tenant(tenant), priority=priority)


def create_sorted(count: int, store: Store, **kw: Any) -> list[str]:
    """Create jobs and return their ids in queue order. Ids of the same millisecond sort in random order."""
    return sorted(create(store, **kw) for _ in range(count))


def claim_all(store: Store, rules: Rules | None = None) -> list[str]:
    """Claim jobs until none is left, and return their ids in the order of the claims."""
    found = []
    while job_id := claim_next(store, rules):
        found.append(job_id)
    return found


def test_claim_next_takes_lease(store: Store) -> None:
    job_id = create(store, priority=7)
    claimed = store.leases.claim("worker-1", 30, **SERVES)
    assert claimed
    lease, state, another = claimed
    assert another is None
    job = store.jobs.get(job_id)
    assert (lease.job_id, lease.fence, lease.attempt, state) == (job_id, 1, 1, store.jobs.state(job_id))
    assert (job.status, job.lease_owner, job.priority) == ("in_progress", "worker-1", 7)
    assert event_types(store, job_id) == ["job.queued", "job.started", "job.phase"]
    assert store.leases.claim("worker-2", 30, **SERVES) is None


def test_claim_prefers_priority_then_age(store: Store) -> None:
    low, high, lowest = (create(store, priority=p) for p in (-1, 100, -100))
    first, second = create_sorted(2, store)
    assert claim_all(store) == [high, first, second, low, lowest]


def test_claim_alternates_between_tenants(engine: Engine, store: Store) -> None:
    a, b, c = create_for(store, "a", 6), create_for(store, "b", 3), create_for(store, "c", 1)
    for job_id in (order := claim_all(store)):
        assert (
            store.for_tenant("a" if job_id in a else "b" if job_id in b else "c").jobs.get(job_id).status
            == "in_progress"
        )
    assert order == [a[0], b[0], c[0], a[1], b[1], a[2], b[2], *a[3:]]


def test_claim_alternates_after_jobs_end(store: Store) -> None:
    first, *rest = create_for(store, "a", 3)
    other = create_for(store, "b", 2)
    order = []
    while claimed := store.leases.claim("worker-1", 30, **SERVES):
        order.append(claimed[0].job_id)
        store.leases.finish(claimed[0], Outcome("completed"))
    assert order == [first, other[0], rest[0], other[1], rest[1]]


def test_claim_gives_no_advantage_to_many_priorities(engine: Engine, store: Store) -> None:
    many = [create_for(store, "many", 1, -priority)[0] for priority in range(5)]
    for ago, job_id in enumerate(reversed(many)):
        put(engine, job_id, queued_at=store.for_tenant("many").jobs.get(job_id).queued_at - ago)
    one = create_for(store, "one", 5)
    order = []
    while claimed := store.leases.claim("worker-1", 30, rules=Rules(priority_seconds=1e-9), **SERVES):
        order.append(claimed[0].job_id)
        store.leases.finish(claimed[0], Outcome("completed"))
    assert order == [job_id for pair in zip(many, one, strict=True) for job_id in pair]


def test_claim_lets_long_wait_outweigh_priority(engine: Engine, store: Store) -> None:
    high, low, lower = create_for(store, "a", 3, 5), create_for(store, "b", 2, 2), create_for(store, "b", 1, 1)
    for job_id in (*low, *lower):
        put(engine, job_id, queued_at=store.for_tenant("b").jobs.get(job_id).queued_at - 200)
    assert claim_all(store) == [low[0], *high, lower[0], low[1]], "one claim, after which the wait starts again"


def test_claim_ignores_queues_of_other_models(engine: Engine, store: Store) -> None:
    mine, others = create(store), [create(store, priority=9) for _ in range(2)]
    put(engine, others[0], model="other")
    put(engine, others[1], reward_model="other")
    assert claim_all(store) == [mine]


def test_claim_skips_ineligible_queue_heads(engine: Engine, store: Store) -> None:
    waits, late, tried, paused, *ready = create_sorted(6, store)
    put(engine, waits, next_attempt_at=1e12)
    put(engine, late, deadline_at=1.0)
    put(engine, tried, consecutive_failures=3)
    store.jobs.pause(paused)
    assert claim_all(store) == ready


def test_released_job_keeps_queue_position(store: Store) -> None:
    first, second = create_sorted(2, store)
    lease, _ = claim(store, first)
    store.leases.release(lease)
    assert claim_all(store) == [first, second]


def test_claim_skips_unreadable_job(engine: Engine, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    strange, *others = create_sorted(3, store)
    put(engine, strange, prompts={"of": "another version"})
    claimed = [store.leases.claim("worker-1", 30, **SERVES) for _ in range(3)]
    assert [c[0].job_id for c in claimed if c] == others
    job = store.jobs.get(strange)
    assert (job.status, job.consecutive_failures) == ("queued", 1)
    assert (job.next_attempt_at or 0) > job.created_at
    assert strange in caplog.text


def test_claim_respects_running_limits(store: Store) -> None:
    a, b = create_for(store, "a", 4, 50), create_for(store, "b", 4)
    store.tenants.set_limits("b", Limits(running=3))
    rules = Rules(max_running=2)
    assert claim_all(store, rules) == [a[0], a[1], b[0], b[1], b[2]]
    lease = Lease(a[0], "worker-1", 1, 1, 1, 3, 30)
    store.for_tenant("a").jobs.cancel(a[0])
    assert claim_next(store, rules) is None, "it counts as running until its worker finishes it"
    store.leases.finish(lease, Outcome("completed"))
    assert claim_all(store, rules) == [a[2]]
    store.tenants.set_limits("b", Limits(running=0))
    assert claim_all(store, rules) == []
    store.tenants.set_limits("b", Limits())
    store.tenants.set_limits("a", Limits(running=9))
    assert claim_all(store, rules) == [a[3]]


def test_concurrent_claims_are_unique_and_respect_limit(engine: Engine, store: Store) -> None:
    for tenant in "ab":
        create_many(engine, create_for(store, tenant)[0], 29)
    rules = Rules(max_running=4)
    barrier = threading.Barrier(8)
    most: Counter[str] = Counter()
    seen: list[str] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        barrier.wait()
        idle = 0
        while idle < 20:
            claimed = store.leases.claim(f"worker-{number}", 30, rules=rules, **SERVES)
            if claimed is None:
                idle += 1
                continue
            idle = 0
            running = Counter(
                tenant
                for tenant in "ab"
                for _ in store.for_tenant(tenant).jobs.page(limit=100, statuses=["in_progress", "cancelling"])
            )
            with lock:
                seen.append(claimed[0].job_id)
                for tenant, count in running.items():
                    most[tenant] = max(most[tenant], count)
            store.leases.finish(claimed[0], Outcome("completed"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(seen) == len(set(seen)) == 60
    assert max(most.values()) <= 4
    assert store.queues.next_waiting("policy", "reward", rules) is None


def test_concurrent_claims_share_slots_among_tenants(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        claims, "_LOCK_TIMEOUT_MILLISECONDS", 60_000
    )  # no claim is frozen here, however busy the machine is
    for tenant in "ab":
        create_for(store, tenant, 8)
    barrier = threading.Barrier(8)

    def claim_after_barrier(number: int) -> str:
        barrier.wait()
        claimed = store.leases.claim(f"worker-{number}", 30, **SERVES)
        assert claimed
        return claimed.lease.job_id

    with ThreadPoolExecutor(8) as threads:
        taken = set(threads.map(claim_after_barrier, range(8)))
    assert [len([j for j in store.for_tenant(tenant).jobs.page(limit=9) if j.id in taken]) for tenant in "ab"] == [4, 4]


def test_paused_queue_blocks_claims_and_flags_running_jobs(engine: Engine, store: Store) -> None:
    running, waiting, other = create_sorted(3, store)
    put(engine, other, model="other")
    lease, state = claim(store, running)
    assert store.leases.check("worker-1", [running])[running][1].queue_paused is False
    store.queues.pause("policy")
    paused = rows(engine)
    store.queues.pause("policy")
    assert rows(engine) == paused, "pausing again does not change the time of the pause"
    assert claim_next(store) is None
    assert store.leases.check("worker-1", [running])[running][1].queue_paused
    assert store.leases.renew("worker-1", [running], 30)[running][1].queue_paused
    assert store.leases.checkpoint(lease, make_step(state)).queue_paused
    assert store.leases.release(lease) == "queued"
    assert [
        wake_up.job_id for wake_up in store.maintenance.sweep(renotify_seconds=-1, worker_retention_seconds=60)
    ] == [other]
    assert store.leases.claim("worker-1", 30, model="other", reward_model="reward")
    assert store.queues.resume("policy") == [running]
    store.queues.resume("policy")
    assert claim_all(store) == [running, waiting]
    assert not store.leases.check("worker-1", [running])[running][1].queue_paused


def test_queue_page_counts_jobs_and_workers(engine: Engine, store: Store) -> None:
    assert store.queues.page(60) == []
    for pause in (store.queues.pause, store.queues.resume):
        with pytest.raises(InvalidInputError, match="no queue 'policy'"):
            pause("policy")
    store.workers.register("worker-1", concurrency=1, model="served", reward_model="reward")
    store.queues.pause("served")
    claim(store, create(store))
    store.jobs.cancel(create(store))
    store.leases.release(claim(store, create(store))[0], delay_seconds=60)
    found = {queue.model: queue for queue in store.queues.page(60)}
    assert {model: (q.waiting, q.running, q.workers) for model, q in found.items()} == {
        "policy": (1, 1, 0),
        "served": (0, 0, 1),
    }
    assert found["policy"].paused_at is None
    assert found["served"].paused_at is not None


def test_purge_last_claims_removes_old_claims(engine: Engine, store: Store) -> None:
    create(store)
    claim_next(store)
    with writing(engine) as session:
        session.execute(text("UPDATE last_claims SET claimed_at = claimed_at - 90000"))
    assert store.maintenance.purge_last_claims(24 * 3600) == 1
    assert rows(engine)["last_claims"] == []


def test_claim_queries_use_queue_indexes(engine: Engine, store: Store) -> None:
    """Check that the cost of a claim depends on the tenants and priorities that wait, not on the size of the table."""
    create_many(engine, create(store), 2000)
    create_many(engine, create_for(store, "b", 1, 3)[0], 2000, priority=3)
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE jobs"))
    pair = Pair("policy", "reward")
    with writing(engine) as session:
        queue = claims._snapshot_queue(session, pair, Rules())
        assert [(head.tenant, head.priority) for head in queue.heads] == [("b", 3), ("default", 0)]
        head = queue.next()
        assert head
        dialect = engine.dialect.name
        queries: list[tuple[Any, dict[str, Any]]] = [
            (claims._HEADS, asdict(pair)),
            (claims._OLDEST, claims._which(pair, head)),
            (claims._next_pair(dialect, None), {}),
            (claims._running(dialect), {}),
        ]
        explain_keyword = {"sqlite": "EXPLAIN QUERY PLAN", "postgresql": "EXPLAIN"}[engine.dialect.name]

        def explain(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
            return f"{explain_keyword} {statement}", parameters

        for query, values in queries:
            event.listen(engine, "before_cursor_execute", explain, retval=True)
            try:
                plan = "\n".join(
                    str(tuple(row)) for row in session.connection().execute(query, values).cursor.fetchall()
                )
            finally:
                event.remove(engine, "before_cursor_execute", explain)
            assert "jobs_in_line" in plan or "jobs_running" in plan, plan
            assert "SCAN jobs'" not in plan, plan
            assert "Seq Scan on jobs" not in plan, plan


def test_claim_names_another_waiting_job(store: Store) -> None:
    first, second = create_sorted(2, store)
    third = create(store.for_tenant("b"), priority=-5)
    found = []
    while claimed := store.leases.claim("worker-1", 30, **SERVES):
        found.append((claimed.lease.job_id, claimed.another))
    assert found == [(first, third), (second, third), (third, None)]


def test_frozen_claim_does_not_block_others(engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine.dialect.name == "sqlite":
        return  # SQLite has one writer, which blocks all others in any case
    monkeypatch.setattr(claims, "_LOCK_TIMEOUT_MILLISECONDS", 50)
    jobs = create_sorted(3, store)
    claim_next(store)
    with writing(engine) as frozen:
        mine = claims._claim(frozen, Pair("policy", "reward"), Rules(), "worker-1", 30)
        assert mine
        other = store.leases.claim("worker-2", 30, **SERVES)
        assert other
        assert {mine.lease.job_id, other.lease.job_id} == set(jobs[1:])
